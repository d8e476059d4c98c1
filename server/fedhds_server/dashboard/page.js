// The status page: keeps the coordinator's status as it is sent, and draws what has changed. Text becomes text nodes only.
import { chart, count, decimals, draw, groupMap, groupStyle, listed, make, many, mark } from "./drawing.js";

const RETRY_MS = 5000;
const STALE_MS = 6000; // The coordinator says something every second.
const MOST_EVENTS = 300;
const WORK = { select: "selecting", train: "training", evaluate: "measuring" };
const HEADLINES = {
  enrolling: "Waiting for sites", selecting: "Selecting rows", grouping: "Grouping centroids", finishing: "Finishing",
  completed: "Completed", stopped: "Stopped", failed: "Failed",
};
const OVER = ["completed", "stopped", "failed"];

let status = {};
let newest = 0; // number of the last line of the journal shown
let mapped; // run and selection that the map shows
let source, openedAt = 0, heardAt = 0, retry;

// Elements.

const $ = (id) => document.getElementById(id);

function say(id, ...parts) {
  const shown = $(id), text = parts.map((part) => part.textContent ?? part).join("");
  // The same text again would be read out again.
  if (shown.textContent !== text) shown.replaceChildren(...parts);
}

function bar(id, whole, parts) {
  const shown = $(id);
  Object.entries(parts).forEach(([name, value], index) => {
    const part = shown.children[index] ?? shown.appendChild(make("span", { class: name }));
    part.className = name;
    part.style.width = `${whole > 0 ? Math.min(100, (100 * value) / whole) : 0}%`;
  });
  [...shown.children].slice(Object.keys(parts).length).forEach((part) => part.remove());
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

// Sections. Each is drawn anew when one of its keys has changed.

const SECTIONS = [
  [["phase", "round", "run", "message", "paused", "problems", "leader", "version"], showHeadline],
  [["phase", "closed_rounds", "running_s", "run"], showRounds],
  [["collection"], showAnswers],
  [["trained_rows", "pool_rows", "run"], showSamples],
  [["closed_rounds", "evaluations", "run"], showQuality],
  [["sites", "site_states", "bytes_received"], showSites],
  [["selection", "round", "run"], loadGroups],
  [["run_id", "run", "checkpoint"], showAbout],
];

function show(keys) {
  $("run").hidden = !status.run_id;
  for (const [of, section] of SECTIONS) {
    if ((section === showHeadline || status.run_id) && of.some((key) => keys.includes(key))) section();
  }
}

function showHeadline() {
  const { run_id, phase, round, run, leader, problems = {} } = status;
  let headline = HEADLINES[phase] ?? `Round ${round} of ${run?.rounds}`, message = status.message;
  // What the headline says already.
  message = message?.replace(/^round \d+ of \d+: /, "");
  if (phase === "enrolling") message ||= `The run begins with ${many(run.min_sites, "site")}.`;
  if (!run_id) {
    headline = "Standing by";
    message = leader
      ? `The coordinator at ${leader} leads the run. This page shows the run when its own coordinator takes over.`
      : "This coordinator does not lead the run.";
  }
  say("headline", headline);
  say("message", message ?? "");
  const wrong = Object.entries(problems).filter(([kind]) => kind !== "standby").map(([, problem]) => `Not ready: ${problem}.`);
  if (status.paused != null) wrong.unshift(`The run is paused: ${status.paused}.`);
  say("notice", wrong.join(" "));
  $("notice").hidden = !wrong.length;
  say("version", `fedhds-server ${status.version}`);
  document.title = `${headline} · fedhds`;
}

function showRounds() {
  const { closed_rounds: closed, run, running_s } = status, last = closed.at(-1);
  const done = last ? last.round : 0;
  say("rounds-figure", count(done), small(` of ${count(run.rounds)} closed`));
  bar("rounds-bar", run.rounds, { done });
  const took = last ? `; the last round took ${decimals(last.seconds, 1)} s` : "";
  say("rounds-note", running_s ? `${OVER.includes(status.phase) ? "Ran" : "Running"} for ${duration(running_s)}${took}` : "Not yet started");
}

function showAnswers() {
  const open = status.collection;
  say("answers-name", open ? { select: "Reports", train: "Updates" }[open.task] : "Answers");
  if (!open) {
    say("answers-figure", "–");
    bar("answers-bar", 0, {});
    say("answers-note", "Nothing is being collected");
    return;
  }
  const { answered, working, failed, away, target, quorum, deadline_s } = open;
  const cohort = answered + working + failed + away;
  say("answers-figure", count(answered), small(` of ${count(Math.max(target, quorum))}, quorum ${count(quorum)}`));
  bar("answers-bar", cohort, { answered, working, failed, away });
  const parts = { "at work": working, failed, away };
  const told = Object.entries(parts).filter(([, value]) => value).map(([name, value]) => `${count(value)} ${name}`);
  if (deadline_s != null) told.push(deadline_s > 0 ? `deadline in ${duration(deadline_s)}` : "deadline reached");
  say("answers-note", `Cohort of ${count(cohort)}${told.length ? `: ${told.join(", ")}` : ""}`);
}

function showSamples() {
  const used = Number(status.trained_rows), pool = Number(status.pool_rows);
  say("samples-figure", count(used), small(` of ${count(pool)}`));
  bar("samples-bar", pool, { used });
  const bound = status.run.schedule === "one-shot" ? "" : "at most ";
  say("samples-note", pool ? `${bound}${decimals((100 * used) / pool, 1)} % of the rows that sites hold` : "No site has rows yet");
}

function showQuality() {
  const { closed_rounds: closed, evaluations, run } = status;
  const of = (lines, key) => lines.map((line) => [line.round, Number(line[key])]).filter(([, value]) => Number.isFinite(value));
  const trained = closed.filter((line) => line.contributor_count);
  const series = { training: of(trained, "loss"), "held-out": of(evaluations, "loss") }, rouge = { rouge: of(evaluations, "rouge_l") };
  chart($("loss-chart"), "Loss on held-out rows", series, { rounds: run.rounds, floor: Infinity });
  chart($("rouge-chart"), "Rouge-L on held-out rows", rouge, { rounds: run.rounds, floor: 0 });
  const lines = new Map();
  for (const line of closed) lines.set(line.round, { ...line, training: trained.includes(line) ? line.loss : NaN });
  for (const { round, loss, rouge_l } of evaluations) lines.set(round, { ...lines.get(round), held: loss, rouge_l });
  const rows = [...lines].sort(([a], [b]) => b - a).map(([round, line]) =>
    make("tr", {}, make("th", { scope: "row" }, String(round)),
      ...[decimals(line.held, 4), decimals(line.rouge_l, 4), decimals(line.training, 4), line.samples ? count(line.samples) : "–",
        String(line.contributor_count ?? "–"), decimals(line.seconds, 1)].map((text) => make("td", {}, text))));
  $("rounds-rows").replaceChildren(...rows);
  const all = closed.length ? closed.at(-1).round : 0;
  say("rounds-caption", `What every round gave, newest first. Round 0 is the base model.${
    closed.length < all ? ` Shown are ${closed.length} of ${count(all)} rounds, evenly spaced.` : ""}`);
}

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
    const wrong = [site.rejections && `${many(site.rejections, "result")} rejected`, site.last_error].filter(Boolean).join("; ");
    if (wrong) rows.push(make("tr", { class: "error" }, make("td", { colspan: "4" }, wrong)));
  }
  $("sites-rows").replaceChildren(...rows);
  $("sites-list").hidden = !rows.length;
  const { enrolled = 0, connecting = 0, lost = 0, left = 0, evicted = 0, quarantined = 0 } = status.site_states;
  const live = enrolled + connecting, shutOut = evicted + quarantined, all = live + lost + left + shutOut;
  say("live-figure", count(live), small(` live of ${count(all)}`));
  bar("live-bar", all, { live, lost, "shut-out": shutOut });
  const others = Object.entries({ connecting, lost, left, evicted, quarantined }).filter(([, value]) => value);
  say("live-note", [...others.map(([state, value]) => `${count(value)} ${state}`), `sent ${bytes(status.bytes_received)}`].join(", "));
  say("sites-note", !all ? "No site has enrolled yet." : all === status.sites.length ? ""
    : `Shown are ${status.sites.length} of ${count(all)}, those with errors or a task first; fedhds status lists all.`);
}

function showAbout() {
  const { run } = status;
  say("run-id", `run ${status.run_id}`);
  const facts = {
    Strategy: `${run.strategy}, ${run.schedule}`, Budget: run.budget, "Base model": run.model,
    Cohort: `${decimals(100 * run.cohort_fraction, 0)} % of the sites`, Quorum: run.quorum,
    Deadline: run.deadline ? duration(run.deadline) : "none",
    Noise: run.noise_multiplier ? `multiplier ${run.noise_multiplier}, clipping norm ${run.clip_norm}` : "none",
    "Adapter on the wire": `rank ${run.lora_rank}, ${run.wire_dtype}`, Checkpoint: status.checkpoint || "none yet",
  };
  $("about").replaceChildren(...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

// The map of groups.

async function loadGroups() {
  const { selection, run, run_id } = status, wanted = `${run_id}/${selection}`;
  if (wanted === mapped) return;
  if (selection == null) $("groups-shown").hidden = true;
  if (["full", "random"].includes(run.strategy)) {
    say("groups-note", `The strategy ${run.strategy} does not compare sites: there are no centroids.`);
  } else if (selection == null) {
    say("groups-note", status.round ? "The selection was made by another coordinator, whose run folder has the map." : "The map comes with the first selection.");
  } else {
    try {
      const answer = await fetch("selection.json");
      if (!answer.ok) throw new Error(await answer.text());
      const groups = await answer.json();
      if (status.selection !== selection) return;
      mapped = wanted;
      showGroups(groups);
    } catch (error) {
      say("groups-note", `The map could not be loaded: ${error.message}`);
    }
  }
}

function showGroups(selection) {
  const { round, notes, groups, group_count, dropped_count } = selection;
  say("groups-note", `${round ? `Selection of round ${round}` : "Selection before the first round"}: ${notes.at(-1) ?? "nothing was noted"}.`);
  $("groups-shown").hidden = false;
  const rows = groups.map((group, index) =>
    make("tr", {},
      make("th", { scope: "row" }, make("span", { class: `swatch ${groupStyle(group, index)}` }), String(index + 1)),
      make("td", {}, listed(group.members, group.clusters), " ", small(`${many(group.clusters, "cluster")} of ${many(group.sites, "site")}`)),
      make("td", {}, listed(group.winners, group.winner_count))));
  const more = group_count - groups.length;
  if (more > 0) {
    rows.push(make("tr", {}, make("td", { colspan: "3" }, `and ${many(more, "group")} more, in selection-${round}.json of the run folder`)));
  }
  $("groups-rows").replaceChildren(...rows);
  groupMap($("groups-map"), selection);
  const legend = [["of several sites, merged into a numbered group", "shared k0", false], ["of one site alone", "alone", false],
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
  if (list.children.length > MOST_EVENTS) list.lastChild.remove();
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
  else connection("lost", heardAt ? `Disconnected since ${last}; trying again` : "The coordinator does not answer, or too many look at this page; trying again");
}

const HANDLERS = {
  snapshot(all) {
    if (all.run_id && all.run_id !== status.run_id) {
      newest = 0;
      $("events-list").replaceChildren();
    }
    status = all;
    show(SECTIONS.flatMap(([keys]) => keys));
  },
  changes(changed) {
    Object.assign(status, changed);
    show(Object.keys(changed));
  },
  line: showLine,
};

function connect() {
  clearTimeout(retry);
  source?.close();
  if (document.hidden) return; // A browser has six connections to a host, and a hidden page needs none.
  openedAt = Date.now();
  source = new EventSource("events");
  for (const [kind, handle] of Object.entries(HANDLERS)) {
    source.addEventListener(kind, (event) => {
      heardAt = Date.now();
      connection("live", "Live");
      handle(JSON.parse(event.data));
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
