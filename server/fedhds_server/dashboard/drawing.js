// Elements, numbers, line charts and the map of groups, drawn from values alone.

const COLORS = 8;
const NUMBERED_GROUPS = 30;
const MIN_SPAN = 0.01; // A smaller difference is no trend.

export function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function draw(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export const count = (value) => Number(value).toLocaleString("en");
export const many = (value, noun) => `${count(value)} ${noun}${Number(value) === 1 ? "" : "s"}`;
export const decimals = (value, digits) => (Number.isFinite(Number(value)) ? Number(value).toFixed(digits) : "–");
export const listed = (names, all) => names.join(", ") + (all > names.length ? ` and ${count(all - names.length)} more` : "");

// Charts.

const redraws = new Map();
const observer = new ResizeObserver((entries) => entries.forEach(({ target }) => redraws.get(target)?.()));

// Keeps in `host` what `drawing` gives for its width, so that text is never scaled.
function keep(host, drawing) {
  let width;
  redraws.set(host, () => {
    if (host.clientWidth === width || !host.clientWidth) return;
    width = host.clientWidth;
    host.replaceChildren(drawing(width));
  });
  observer.observe(host);
  redraws.get(host)();
}

function ticks(low, high, limit) {
  const rough = (high - low) / limit || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

// A line for each of `series`, {class: [[round, value], ...]}; the last one is what the chart is about.
export function chart(host, name, series, { rounds, floor }) {
  const points = Object.values(series).flat(), measured = Object.values(series).at(-1);
  if (!points.length) {
    redraws.delete(host);
    host.replaceChildren(make("p", { class: "quiet" }, "No evaluation yet."));
    return;
  }
  const values = points.map(([, value]) => value), last = Math.max(1, ...points.map(([round]) => round));
  // A long run starts with a chart of its first rounds; one of all rounds would be empty but for its edge.
  const end = Math.min(Math.max(rounds, last), Math.max(8, 2 ** Math.ceil(Math.log2(last + 1))));
  const low = Math.min(floor, ...values), levels = ticks(low, Math.max(...values, low + MIN_SPAN), 4);
  const digits = Math.max(0, ...levels.map((level) => (String(+level.toPrecision(6)).split(".")[1] ?? "").length));
  const text = ([round, value]) => `${decimals(value, 3)} in round ${round}`;
  const label = `${name}: ${measured.length ? [measured[0], measured.at(-1)].map(text).join(", ") : "not measured yet"}. The table below has all values.`;
  keep(host, (width) => {
    const height = 168, left = 14 + 6 * levels.at(-1).toFixed(digits).length, right = 46, top = 10, bottom = 22;
    const x = (round) => (left + ((width - left - right) * round) / end).toFixed(1);
    const y = (value) => (height - bottom - ((height - top - bottom) * (value - levels[0])) / (levels.at(-1) - levels[0])).toFixed(1);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    for (const level of levels) {
      svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
        draw("text", { x: left - 6, y: +y(level) + 4, "text-anchor": "end" }, level.toFixed(digits)));
    }
    for (const round of ticks(0, end, Math.max(2, Math.floor(width / 70)))) {
      if (round > end || !Number.isInteger(round)) continue;
      svg.append(draw("text", { x: x(round), y: height - 6, "text-anchor": "middle" }, String(round)));
    }
    for (const [style, line] of Object.entries(series)) {
      svg.append(draw("polyline", { class: style, points: line.map(([round, value]) => `${x(round)},${y(value)}`).join(" ") }));
      for (const [round, value] of line.length > 40 ? line.slice(-1) : line) {
        svg.append(draw("circle", { class: style, cx: x(round), cy: y(value), r: style === "training" ? 2 : 3 },
          draw("title", {}, `round ${round}: ${decimals(value, 4)}`)));
      }
    }
    const [round, value] = measured.at(-1) ?? points.at(-1);
    svg.append(draw("text", { class: "last", x: +x(round) + 8, y: +y(value) + 4 }, decimals(value, 3)));
    return svg;
  });
}

// The map of groups.

export const groupStyle = (group, index) => (group.sites > 1 ? `shared k${index % COLORS}` : "alone");

// What stands for `clusters` centroids at one place.
export function mark(x, y, clusters, style, gives) {
  const radius = Math.min(14, 2.8 + 1.2 * Math.sqrt(clusters));
  if (style === "dropped") return draw("path", { class: style, d: `M${x - 2.5} ${y - 2.5}l5 5m0 -5l-5 5` });
  if (!gives) return draw("circle", { class: style, cx: x, cy: y, r: radius, "fill-opacity": 0.75 });
  const corner = { x: -radius, y: -radius, width: 2 * radius, height: 2 * radius };
  return draw("rect", { class: `${style} gives`, ...corner, transform: `translate(${x} ${y}) rotate(45)` });
}

export function groupMap(host, { groups, group_count, shared_count, dropped, dropped_count }) {
  const dots = [...groups.flatMap((group) => group.dots), ...dropped];
  host.hidden = !dots.length;
  const label = `${many(group_count, "group")} of centroids, ${shared_count} of them of several sites; ${many(dropped_count, "centroid")} in none. The table below lists them.`;
  const range = (axis) => [Math.min(...dots.map((dot) => dot[axis])), Math.max(...dots.map((dot) => dot[axis]))];
  const [[west, east], [south, north]] = [range(0), range(1)], margin = 24;
  keep(host, (width) => {
    const height = Math.round(Math.min(440, Math.max(260, width * 0.8)));
    const scale = Math.min((width - 2 * margin) / (east - west || 1), (height - 2 * margin) / (north - south || 1));
    const x = (dot) => +(width / 2 + (dot[0] - (west + east) / 2) * scale).toFixed(1);
    const y = (dot) => +(height / 2 - (dot[1] - (south + north) / 2) * scale).toFixed(1);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    svg.append(...dropped.map((dot) => mark(x(dot), y(dot), 1, "dropped", false)));
    const numbers = [];
    // The largest on top.
    for (const [index, group] of [...groups.entries()].reverse()) {
      if (!group.dots.length) continue;
      const hub = [0, 1].map((axis) => group.dots.reduce((sum, dot) => sum + dot[axis], 0) / group.dots.length);
      const style = groupStyle(group, index), spokes = group.dots.length > 1 ? group.dots : [];
      svg.append(draw("g", {}, draw("title", {}, `group ${index + 1}: ${listed(group.members, group.clusters)}`),
        ...spokes.map((dot) => draw("line", { class: `spoke ${style}`, x1: x(hub), y1: y(hub), x2: x(dot), y2: y(dot) })),
        ...group.dots.map((dot) => mark(x(dot), y(dot), dot[2], style, dot[3]))));
      const top = group.dots.reduce((one, other) => (other[1] > one[1] ? other : one));
      if (group.sites > 1 && index < NUMBERED_GROUPS) numbers.push(draw("text", { x: x(top), y: y(top) - 8 }, String(index + 1)));
    }
    svg.append(...numbers);
    return svg;
  });
}
