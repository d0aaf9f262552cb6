"use strict";

// Elements

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  return dress(element, attributes, children);
}

function draw(name, attributes = {}, ...children) { // the same, of SVG
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  return dress(element, attributes, children);
}

function dress(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function number(value) { // as the tables have it
  if (value === null || value === undefined) return "";
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4)) return value.toFixed(4);
  return Number(value.toPrecision(3)).toString();
}

// Sections

for (const section of document.querySelectorAll("main > section")) {
  const link = make("a", { href: "#" + section.id }, section.querySelector("h2").textContent);
  document.getElementById("contents").append(link);
}

// Tables: a button in each head sorts, a field above filters

for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.onclick = () => sort(table, heads, column);
    head.append(button);
  });
  if (table.tBodies[0].rows.length > 2) addFilter(table);
}

function sort(table, heads, column) {
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // nothing comes last, either way
    const order = typeof a === typeof b && typeof a === "number"
      ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
  table.dispatchEvent(new Event("arranged"));
}

function key(cell) {
  const value = cell.dataset.value;
  return value === undefined ? cell.textContent : value === "" ? "" : Number(value);
}

function addFilter(table) {
  const field = make("input", { type: "search", placeholder: "all these words" });
  const rows = [...table.tBodies[0].rows];
  const count = make("output", {}, `${rows.length} rows`);
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const left = rows.filter((row) => !row.hidden).length;
    count.value = left === rows.length ? `${left} rows` : `${left} of ${rows.length} rows`;
    table.dispatchEvent(new Event("arranged"));
  };
  const label = make("label", {}, "Filter ", field);
  table.parentElement.before(make("div", { class: "controls" }, label, count));
}

// Curves

const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "", "", "", "", "6 3", "6 3"]; // of each colour, in report.css
if (data) beginCurves();

function beginCurves() {
  const table = document.querySelector("#settings table");
  const rows = [...table.tBodies[0].rows]; // in the order of data.settings
  const names = Object.keys(data.metrics).map((name) => make("option", {}, name));
  const metric = make("select", {}, ...names), log = make("input", { type: "checkbox" });
  const panels = document.getElementById("panels");
  panels.before(make("div", { class: "controls" },
    make("label", {}, "Metric ", metric), make("label", {}, log, " logarithmic")));

  function show() {
    for (const old of table.querySelectorAll(".swatch")) old.remove();
    const chosen = [...table.tBodies[0].rows].filter((row) => !row.hidden).slice(0, DASHES.length);
    const lines = chosen.map((row, i) => {
      row.cells[0].prepend(swatch(i));
      return { i, ...data.settings[rows.indexOf(row)] };
    });
    panels.replaceChildren(...data.metrics[metric.value].map(
      (name) => panel(name, lines.filter((line) => name in line.curves), log.checked)));
    for (const figure of panels.children) figure.fit();
  }
  metric.onchange = log.onchange = show;
  table.addEventListener("arranged", show);
  show();
  let width = panels.clientWidth; // phones are turned
  new ResizeObserver(() => {
    if (panels.clientWidth !== width) { width = panels.clientWidth; show(); }
  }).observe(panels);
}

function swatch(i) {
  const line = draw("line", { x1: 0, x2: 24, y1: 5, y2: 5, style: stroke(i), "stroke-width": 3 });
  return draw("svg", { class: "swatch", viewBox: "0 0 24 10", "aria-hidden": "true" }, line);
}

function stroke(i) {
  return `stroke: var(--s${i}); stroke-dasharray: ${DASHES[i] || "none"}`;
}

/** A figure of one "split/metric": fit() draws it as wide as it stands on the page. */
function panel(name, lines, log) {
  const curves = lines.map((line) => ({ ...line, ...line.curves[name] }))
    .map((curve) => ({ ...curve, steps: data.grids[curve.grid] }));
  const step = make("p", { "aria-live": "polite" });
  const values = curves.map(() => make("data"));
  const legend = make("ul", {}, ...curves.map((curve, k) =>
    make("li", {}, swatch(curve.i), make("span", {}, curve.label), values[k])));
  const figure = make("figure", {}, make("h3", {}, name));
  const all = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);

  function tell(at) { // what the legend says: values at the step nearest to `at`
    step.textContent = `step ${at.toLocaleString("en")}`;
    curves.forEach((curve, k) => {
      const i = nearest(curve.steps, at), n = typeof curve.n === "number" ? curve.n : curve.n[i];
      const range = n > 1 ? ` (${number(curve.low[i])} to ${number(curve.high[i])}, n = ${n})` : "";
      const ended = at > curve.steps[i] && i === curve.steps.length - 1;
      const last = ended ? `, last at ${curve.steps[i].toLocaleString("en")}` : "";
      values[k].textContent = at < curve.steps[0] ? "" : number(curve.mean[i]) + range + last;
    });
  }

  figure.fit = () => {
    if (!all.length) return figure.append(make("p", {}, "no setting above has it"));
    const plot = plotted(name, curves, log, figure.clientWidth);
    let cursor = all.length - 1;
    const move = (i) => {
      cursor = Math.max(0, Math.min(all.length - 1, i));
      plot.point(all[cursor]);
      tell(all[cursor]);
    };
    const follow = (event) => move(nearest(all, plot.stepAt(event)));
    plot.svg.onpointermove = plot.svg.onpointerdown = follow;
    plot.svg.onkeydown = (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -all.length, End: all.length }[event.key];
      if (by) { move(cursor + by); event.preventDefault(); }
    };
    tell(all[cursor]);
    figure.append(plot.svg, make("figcaption", {}, step, legend));
  };
  return figure;
}

function nearest(steps, at) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < at) low = middle + 1; else high = middle;
  }
  return low > 0 && at - steps[low - 1] < steps[low] - at ? low - 1 : low;
}

/** The plot: its svg; point(step) marks a step, stepAt(event) is the one under a pointer. */
function plotted(name, curves, log, width) {
  const height = Math.round(Math.max(200, Math.min(320, width * 0.6)));
  const scaled = (value) => log ? Math.log10(value) : value;
  const fits = (value) => value !== null && (!log || value > 0);
  const seen = curves.flatMap((c) => [c.mean, c.low || [], c.high || []]).flat().filter(fits);
  const steps = curves.flatMap((c) => [c.steps[0], c.steps.at(-1)]);
  const [bottom, top] = extent(seen.map(scaled));
  const [first, last] = extent(steps);
  const marks = log ? logTicks(bottom, top) : ticks(bottom, top, 5);
  const texts = marks.map((value) => label(value, marks));
  const left = 12 + 7 * Math.max(0, ...texts.map((text) => text.length));
  const x = (value) => left + (width - left - 8) * (value - first) / (last - first);
  const y = (value) => 8 + (height - 32) * (top - scaled(value)) / (top - bottom);

  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, tabindex: 0,
    role: "img", "aria-label": `${name} against the step; arrow keys move from value to value` });
  marks.forEach((value, i) => svg.append(
    draw("line", { class: "grid", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
    draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, texts[i])));
  const across = ticks(first, last, Math.max(2, Math.min(6, width / 110)));
  for (const value of across.filter(Number.isInteger)) svg.append(
    draw("text", { x: Math.min(x(value), width - 20), y: height - 6, "text-anchor": "middle" },
      value.toLocaleString("en")));
  for (const c of curves) {
    const fill = `fill: var(--s${c.i})`, points = [];
    for (const [from, to] of stretches(c.mean, fits)) {
      const at = (values, i) => `${x(c.steps[i]).toFixed(1)},${y(values[i]).toFixed(1)}`;
      const there = Array.from({ length: to - from }, (_, k) => from + k);
      const path = there.map((i) => at(c.mean, i)).join(" ");
      if (c.low) {
        const edge = there.filter((i) => fits(c.low[i]) && fits(c.high[i]));
        const upper = edge.map((i) => at(c.high, i)), lower = edge.map((i) => at(c.low, i));
        const around = [...upper, ...lower.reverse()].join(" ");
        svg.append(draw("polygon", { class: "band", points: around,
          style: `${fill}; stroke: var(--s${c.i})` }));
      }
      points.push(draw("polyline", { class: "mean", points: path, style: stroke(c.i) }));
      if (c.mean.length <= 40) points.push(...there.map((i) => draw("circle",
        { cx: x(c.steps[i]), cy: y(c.mean[i]), r: 2.5, style: fill })));
    }
    svg.append(...points);
  }
  const cursor = draw("line", { class: "cursor", y1: 8, y2: height - 24, visibility: "hidden" });
  svg.append(cursor);
  return {
    svg,
    point: (step) => dress(cursor, { x1: x(step), x2: x(step), visibility: "visible" }, []),
    stepAt: (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * width / box.width;
      return first + (at - left) / (width - left - 8) * (last - first);
    },
  };
}

function extent(values) { // never empty, never of no length
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  const room = low === high ? Math.abs(low) * 0.1 || 1 : 0;
  return [low - room, high + room];
}

function stretches(values, fits) { // [from, to) of values that fit, one after another
  const found = [];
  values.forEach((value, i) => {
    if (!fits(value)) return;
    const open = found.at(-1);
    if (open && open[1] === i) open[1] = i + 1; else found.push([i, i + 1]);
  });
  return found;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / by - 1e-9); i * by <= high + by * 1e-9; i++) {
    found.push(Number((i * by).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) { // powers of ten, or where there are few also their multiples
  const found = [];
  const each = high - low > 3 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const n of each) {
      const value = Number((n * 10 ** power).toPrecision(2));
      if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
    }
  }
  return found.length > 1 ? found : ticks(10 ** low, 10 ** high, 4);
}

function label(value, marks) {
  const most = Math.max(...marks.map(Math.abs));
  if (most >= 1e5 || (most < 1e-3 && most > 0)) return value.toExponential().replace("e+", "e");
  return value.toLocaleString("en", { maximumFractionDigits: 6 });
}
