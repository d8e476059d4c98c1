// The dashboard: keeps the status that the coordinator sends, and draws what has changed. Text becomes text nodes only.
import { chart, count, decimals, draw, groupMap, groupStyle, listed, make, many, mark } from "./drawing.js";

const RETRY_MS = 5000;
const STALE_MS = 6000; // The coordinator sends an event every second.
const MAX_EVENTS = 300;
const WORK = { select: "selecting", train: "training", evaluate: "evaluating" };
const ANSWERS = { select: "Reports", train: "Updates" };
const HEADLINES = {
  enrolling: "Waiting for sites", selecting: "Selecting rows", grouping: "Grouping centroids", finishing: "Finishing",
  completed: "Completed", stopped: "Stopped", failed: "Failed",
};
const OVER = ["completed", "stopped", "failed"];

let status = {};
let newest = 0, last = ""; // number and id of the last journal line on the page
let mapped; // run and selection that the map shows
let source, openedAt = 0, heardAt = 0, retry;

// Elements.

const $ = (id) => document.getElementById(id);

function say(id, ...parts) {
  const element = $(id), text = parts.map((part) => part.textContent ?? part).join("");
  // A screen reader would read the same text again.
  if (element.textContent !== text) element.replaceChildren(...parts);
}

function bar(id, whole, parts) {
  const element = $(id);
  Object.entries(parts).forEach(([name, value], index) => {
    const part = element.children[index] ?? element.appendChild(make("span", { class: name }));
    part.className = name;
    part.style.width = `${whole > 0 ? Math.min(100, (100 * value) / whole) : 0}%`;
  });
  [...element.children].slice(Object.keys(parts).length).forEach((part) => part.remove());
}

// Values. 64-bit integers come as text.

const small = (...parts) => make("small", {}, ...parts);

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let scaled = Number(value), unit = 0;
  while (scaled >= 1000 && unit < units.length - 1) [scaled, unit] = [scaled / 1000, unit + 1];
  return `${scaled.toFixed(unit && scaled < 100 ? 1 : 0)} ${units[unit]}`;
}

function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  const two = (value) => String(value).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)} h` : `${minutes}:${two(whole % 60)} min`;
}

// Sections. Each is drawn again when one of its keys has changed.

const SECTIONS = [
  [["phase", "round_number", "spec", "message", "paused", "problems", "warnings", "leader", "version"], showHeadline],
  [["phase", "closed_rounds", "running_s", "spec"], showRounds],
  [["cohort"], showAnswers],
  [["trained_rows", "pool_rows", "spec"], showSamples],
  [["closed_rounds", "evaluations", "validations", "best_round", "spec"], showQuality],
  [["sites", "site_states", "bytes_received"], showSites],
  [["selection", "round_number", "spec"], loadGroups],
  [["run_id", "spec", "checkpoint", "model_fingerprint", "model_given_by", "model_confirmed"], showAbout],
];

function show(keys) {
  $("run").hidden = !status.run_id;
  for (const [needs, section] of SECTIONS) {
    if ((section === showHeadline || status.run_id) && needs.some((key) => keys.includes(key))) section();
  }
}

function showHeadline() {
  const { run_id, phase, round_number, spec, leader, problems = {} } = status;
  let headline = HEADLINES[phase] ?? `Round ${round_number} of ${spec?.rounds.count}`, message = status.message;
  // The headline says it already.
  message = message?.replace(/^round \d+ of \d+: /, "");
  if (phase === "enrolling") message ||= `The run starts with ${many(spec.rounds.min_sites, "site")}.`;
  if (!run_id) {
    headline = "Standing by";
    message = leader
      ? `The coordinator at ${leader} leads the run. This page shows the run when its own coordinator takes over.`
      : "This coordinator does not lead the run.";
  }
  say("headline", headline);
  say("message", message ?? "");
  const notices = Object.entries(problems).filter(([kind]) => kind !== "standby").map(([, problem]) => `Not ready: ${problem}.`);
  notices.push(...(status.warnings ?? []).map((warning) => `${warning}.`));
  if (status.paused != null) notices.unshift(`The run is paused: ${status.paused}.`);
  say("notice", notices.join(" "));
  $("notice").hidden = !notices.length;
  say("version", `fedhds-server ${status.version}`);
  document.title = `${headline} · fedhds`;
}

function showRounds() {
  const { closed_rounds: closed, spec, running_s } = status, last = closed.at(-1);
  const done = last ? last.round_number : 0;
  say("rounds-figure", count(done), small(` of ${count(spec.rounds.count)} closed`));
  bar("rounds-bar", spec.rounds.count, { done });
  const gap = last?.product_gap, off = gap != null ? `, and averaging A and B apart was ${decimals(100 * gap, 2)}% off the mean of their products` : "";
  const took = last ? `; the last round took ${decimals(last.seconds, 1)} s${off}` : "";
  say("rounds-note", running_s ? `${OVER.includes(status.phase) ? "Ran" : "Running"} for ${duration(running_s)}${took}` : "Not yet started");
}

function showAnswers() {
  const { cohort } = status;
  say("answers-name", ANSWERS[cohort?.task] ?? "Answers");
  if (!cohort) {
    say("answers-figure", "–");
    bar("answers-bar", 0, {});
    say("answers-note", "No cohort has open tasks");
    return;
  }
  const { answered, working, failed, disconnected, target, quorum, deadline_s } = cohort;
  const size = answered + working + failed + disconnected;
  say("answers-figure", count(answered), small(` of ${count(Math.max(target, quorum))}, quorum ${count(quorum)}`));
  bar("answers-bar", size, { answered, working, failed, disconnected });
  const parts = Object.entries({ working, failed, disconnected }).filter(([, value]) => value);
  const texts = parts.map(([name, value]) => `${count(value)} ${name}`);
  if (deadline_s != null) texts.push(deadline_s > 0 ? `deadline in ${duration(deadline_s)}` : "deadline reached");
  say("answers-note", `Cohort of ${count(size)}${texts.length ? `: ${texts.join(", ")}` : ""}`);
}

function showSamples() {
  const used = Number(status.trained_rows), pool = Number(status.pool_rows);
  say("samples-figure", count(used), small(` of ${count(pool)}`));
  bar("samples-bar", pool, { used });
  const bound = status.spec.selection.schedule === "one-shot" ? "" : "at most ";
  say("samples-note", pool ? `${bound}${decimals((100 * used) / pool, 1)}% of the rows of all sites` : "No site has rows yet");
}

function showQuality() {
  const { closed_rounds: closed, evaluations, validations, spec } = status, rounds = spec.rounds.count;
  const points = (lines, value) =>
    lines.map((line) => [line.round_number, Number(value(line))]).filter(([, number]) => Number.isFinite(number));
  const measured = (metric) => points(evaluations, ({ metrics }) => metrics[metric]);
  const trained = closed.filter((line) => line.contributor_count);
  const validated = points(validations, ({ metrics }) => metrics.loss);
  const losses = { training: points(trained, ({ loss }) => loss), validation: validated, "held-out": measured("loss") };
  chart($("loss-chart"), "Loss on held-out rows", losses, { rounds, floor: Infinity });
  chart($("rouge-chart"), "Rouge-L on held-out rows", { rouge: measured("rouge_l") }, { rounds, floor: 0 });
  const lines = new Map();
  for (const line of closed) lines.set(line.round_number, { ...line, training: trained.includes(line) ? line.loss : NaN });
  for (const line of evaluations) lines.set(line.round_number, { ...lines.get(line.round_number), ...line });
  for (const [number, validation] of validated) lines.set(number, { ...lines.get(number), validation });
  // With several evaluators, no minority of them moves the median far.
  const both = ({ metrics = {}, medians = {}, evaluators }, name) =>
    decimals(metrics[name], 4) + (evaluators > 1 ? ` (median ${decimals(medians[name], 4)})` : "");
  const rows = [...lines].sort(([a], [b]) => b - a).map(([number, line]) =>
    make("tr", {}, make("th", { scope: "row" }, String(number)),
      ...[both(line, "loss"), both(line, "rouge_l"), decimals(line.validation, 4), decimals(line.training, 4), line.samples ? count(line.samples) : "–",
        String(line.contributor_count ?? "–"), decimals(line.seconds, 1)].map((text) => make("td", {}, text))));
  $("rounds-rows").replaceChildren(...rows);
  const all = closed.length ? closed.at(-1).round_number : 0;
  say("rounds-caption", `Results by round, newest first. Round 0 is the base model.${
    validated.length ? ` By validation, round ${status.best_round} is the best.` : ""}${
    closed.length < all ? ` The table has ${closed.length} of ${count(all)} rounds, evenly spaced.` : ""}`);
}

// Far above what rows that differ do, and far below what hostile sites like to send.
const UNLIKE = 3;

function showSites() {
  const rows = [];
  const trouble = (site) => Boolean(site.rejections || site.last_error || ["lost", "quarantined"].includes(site.state));
  for (const site of [...status.sites].sort((one, other) => trouble(other) - trouble(one))) {
    const works = site.state === "enrolled" && WORK[site.task];
    const state = [works || site.state, site.evaluates && !works && "evaluates", site.delivered && "has the adapter"].filter(Boolean).join(", ");
    rows.push(make("tr", {},
      make("th", { scope: "row" }, site.site),
      make("td", {}, make("span", { class: `state ${works ? "working" : site.state}` }, state)),
      make("td", { class: "number" }, site.evaluates && site.rows === "0" ? "–" : count(site.rows)),
      make("td", { class: "number" }, bytes(site.bytes_received))));
    const { distance } = site.last_update ?? {}, unlike = distance > UNLIKE && `its last update is ${decimals(distance, 1)} times as far from the others as usual`;
    const error = [unlike, site.rejections && `${many(site.rejections, "result")} rejected`, site.last_error].filter(Boolean).join("; ");
    if (error) rows.push(make("tr", { class: "error" }, make("td", { colspan: "4" }, error)));
  }
  $("sites-rows").replaceChildren(...rows);
  $("sites-list").hidden = !rows.length;
  const { enrolled = 0, connecting = 0, lost = 0, left = 0, evicted = 0, quarantined = 0 } = status.site_states;
  const live = enrolled + connecting, excluded = evicted + quarantined, all = live + lost + left + excluded;
  say("live-figure", count(live), small(` live of ${count(all)}`));
  bar("live-bar", all, { live, lost, excluded });
  const others = Object.entries({ connecting, lost, left, evicted, quarantined }).filter(([, value]) => value);
  say("live-note", [...others.map(([state, value]) => `${count(value)} ${state}`), `sent ${bytes(status.bytes_received)}`].join(", "));
  say("sites-note", !all ? "No site has enrolled yet." : all === status.sites.length ? ""
    : `The list has ${status.sites.length} of ${count(all)} sites, those with errors or a task first; fedhds status lists all.`);
}

function showAbout() {
  const { model, peft, selection, rounds, aggregation, privacy } = status.spec, noise = privacy.selection;
  say("run-id", `run ${status.run_id}`);
  const { model_fingerprint: digest, model_given_by: site, model_confirmed: confirmed } = status;
  const facts = {
    "Base model": model.name,
    "Its fingerprint": digest ? `${digest}, ${confirmed ? "confirmed" : `given by site ${site}, not confirmed`}` : "no site has registered",
    "PEFT method": [peft.method, peft.rank && `rank ${peft.rank}`].filter(Boolean).join(", "),
    Selection: `${selection.strategy.name}, ${selection.schedule}`, Budget: selection.budget,
    "Selection noise": noise.noise_multiplier ? `multiplier ${noise.noise_multiplier}, clipping norm ${noise.clip_norm}` : "none",
    Cohort: `${decimals(100 * rounds.cohort_fraction, 0)}% of the sites`, Quorum: rounds.quorum,
    Deadline: rounds.deadline ? duration(rounds.deadline) : "none",
    Aggregator: aggregation.aggregator.name, "Server optimizer": aggregation.optimizer.name,
    "Wire type": aggregation.wire_dtype, Checkpoint: status.checkpoint || "none yet",
  };
  $("about").replaceChildren(...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

// The map of groups.

async function loadGroups() {
  const { selection, run_id } = status, current = `${run_id}/${selection}`;
  if (current === mapped) return;
  if (selection == null) {
    $("groups-shown").hidden = true;
    say("groups-note", status.round_number ? "Another coordinator made the selection; its run folder has the map." : "The map comes with the first selection.");
  } else {
    try {
      const answer = await fetch("selection.json");
      if (!answer.ok) throw new Error(await answer.text());
      const groups = await answer.json();
      if (status.selection !== selection) return;
      mapped = current;
      showGroups(groups);
    } catch (error) {
      say("groups-note", `The map could not be loaded: ${error.message}`);
    }
  }
}

function showGroups(selection) {
  const { round_number, notes, groups, group_count, dropped_count } = selection;
  const title = round_number ? `Selection of round ${round_number}` : "Selection before the first round";
  say("groups-note", `${title}: ${notes.at(-1) ?? `the strategy ${status.spec.selection.strategy.name} does not compare sites`}.`);
  $("groups-shown").hidden = !group_count && !dropped_count;
  const rows = groups.map((group, index) =>
    make("tr", {},
      make("th", { scope: "row" }, make("span", { class: `swatch ${groupStyle(group, index)}` }), String(index + 1)),
      make("td", {}, listed(group.members, group.clusters), " ", small(`${many(group.clusters, "cluster")} of ${many(group.sites, "site")}`)),
      make("td", {}, listed(group.winners, group.winner_count))));
  const more = group_count - groups.length;
  if (more > 0) {
    rows.push(make("tr", {}, make("td", { colspan: "3" }, `and ${many(more, "group")} more, in selection-${round_number}.json of the run folder`)));
  }
  $("groups-rows").replaceChildren(...rows);
  groupMap($("groups-map"), selection);
  const legend = [["of several sites, merged into a numbered group", "shared k0", false], ["of one site", "alone", false],
    ["gives rows", "shared k0", true], ["dropped", "dropped", false]].slice(0, dropped_count ? 4 : 3);
  $("groups-legend").replaceChildren(...legend.map(([text, style, gives]) =>
    make("li", {}, draw("svg", { viewBox: "0 0 18 14" }, mark(9, 7, 1, style, gives)), text)));
}

// Events and the connection.

function showLine({ number, at, message, trouble }) {
  if (Number(number) <= newest) return;
  newest = Number(number);
  const time = new Date(1000 * at), list = $("events-list");
  list.prepend(make("li", { class: trouble ? "event trouble" : "event" },
    make("time", { datetime: time.toISOString(), title: time.toLocaleString() }, time.toLocaleTimeString([], { hour12: false })),
    make("p", {}, ...(trouble ? [make("span", { class: "unseen" }, "Trouble: ")] : []), message)));
  if (list.children.length > MAX_EVENTS) list.lastChild.remove();
  const earlier = newest - list.children.length;
  say("events-note", earlier > 0 ? `Newest first; ${many(earlier, "earlier one")} not shown` : "Newest first");
}

function connection(kind, text) {
  $("connection").className = kind;
  say("connection", text);
}

function lost() {
  const last = heardAt && new Date(heardAt).toLocaleTimeString([], { hour12: false });
  if (OVER.includes(status.phase)) connection("over", `The run is over; its coordinator ended at ${last}`);
  else connection("lost", heardAt ? `Disconnected since ${last}; trying again` : "The coordinator does not answer, or too many pages are open; trying again");
}

const HANDLERS = {
  snapshot(all) {
    status = all;
    show(SECTIONS.flatMap(([keys]) => keys));
  },
  changes(changed) {
    Object.assign(status, changed);
    show(Object.keys(changed));
  },
  line: showLine,
  // The coordinator's journal is not the one that the page shows.
  history() {
    newest = 0;
    last = "";
    $("events-list").replaceChildren();
  },
  again: connect, // The coordinator ends a stream after a while, in case that nobody reads it.
};

function connect() {
  clearTimeout(retry);
  source?.close();
  if (document.hidden) return; // A browser has six connections to a host, and a hidden page needs none.
  openedAt = Date.now();
  source = new EventSource(last ? `events?after=${encodeURIComponent(last)}` : "events");
  for (const [kind, handle] of Object.entries(HANDLERS)) {
    source.addEventListener(kind, (event) => {
      heardAt = Date.now();
      connection("live", "Live");
      handle(JSON.parse(event.data));
      if (kind === "line") last = event.lastEventId;
    });
  }
  source.addEventListener("error", () => {
    lost();
    if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, RETRY_MS);
  });
}

document.addEventListener("visibilitychange", connect);
setInterval(() => {
  if (source?.readyState === EventSource.OPEN && Date.now() - Math.max(openedAt, heardAt) > STALE_MS) lost();
}, 1000);
connect();
