// The heatmap and the curve, out of a report's numbers. Order, colours and scale are those of safegraft/report, so that
// the console's pictures and the report's are the same.

import { h, put, s } from "./dom.js";
import { change, counted, number, percent, plain, shown, signed } from "./format.js";

const USUAL_KINDS = [
  "q_proj",
  "k_proj",
  "v_proj",
  "qkv_proj",
  "query_key_value",
  "c_attn",
  "o_proj",
  "out_proj",
  "dense",
  "gate_proj",
  "up_proj",
  "gate_up_proj",
  "c_fc",
  "down_proj",
  "c_proj",
];
const MAX_KINDS = 24;
const OTHERS = "others";
// ColorBrewer's YlGnBu, reversed and without its palest end: lightness rises all the way, so the order survives any
// colour blindness and a grey print.
export const COLOURS = ["#0b1f5c", "#253494", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#e9f5b0"];
// ColorBrewer's PuOr for differences: orange fell, white stayed, purple rose.
export const DIFFERENCES = [
  "#7f3b08",
  "#b35806",
  "#e08214",
  "#fdb863",
  "#fee0b6",
  "#f7f7f7",
  "#d8daeb",
  "#b2abd2",
  "#8073ac",
  "#542788",
  "#2d004b",
];
const MARK = ["", "◐", "●"];

/** The red, green and blue of a scale at 0 to 1. */
export function colour(position, colours = COLOURS) {
  const place = Math.min(1, Math.max(0, position)) * (colours.length - 1);
  const index = Math.min(Math.floor(place), colours.length - 2);
  const [first, second] = [colours[index], colours[index + 1]].map((text) =>
    [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)),
  );
  return first.map((value, at) => Math.round(value + (second[at] - value) * (place - index)));
}

function luminance(rgb) {
  const [red, green, blue] = rgb
    .map((value) => value / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function onto(rgb) {
  const light = 1.05 / (luminance(rgb) + 0.05);
  const dark = (luminance(rgb) + 0.05) / (luminance([11, 18, 32]) + 0.05);
  return light > dark ? "#ffffff" : "#0b1220";
}

/** The range of values in steps of 0.05, at least 0.1 wide: rounding noise must not look like damage. */
export function scaleOf(values) {
  const known = values.filter(Number.isFinite).map((value) => Math.min(1, Math.max(-1, value)));
  if (!known.length) return { low: 0, high: 1 };
  let low = Math.floor(Math.min(...known) * 20 + 1e-6) / 20;
  let high = Math.ceil(Math.max(...known) * 20 - 1e-6) / 20;
  if (high - low < 0.1) {
    low = Number((high - 0.1).toFixed(2));
    if (low < -1) [low, high] = [-1, -0.9];
  }
  return { low, high };
}

/** As far below 0 as above it, in steps of 0.05 and at least to 0.1, so that 0 is the middle's colour. */
export function aroundZero(values) {
  const largest = Math.max(0, ...values.filter(Number.isFinite).map(Math.abs));
  const end = Math.max(0.1, Math.ceil(Math.min(2, largest) * 20 - 1e-6) / 20);
  return { low: -end, high: end };
}

const mean = (values) => {
  const known = values.filter(Number.isFinite);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : NaN;
};

/** A report's modules by layer and kind: {layers, kinds, cells: Map("layer|kind" → cell), averaged}. */
export function gridOf(modules) {
  const counts = new Map();
  for (const { kind } of modules) counts.set(kind, (counts.get(kind) ?? 0) + 1);
  const rank = (kind) => (USUAL_KINDS.includes(kind) ? USUAL_KINDS.indexOf(kind) : USUAL_KINDS.length);
  let kinds = [...counts.keys()].sort((a, b) => rank(a) - rank(b));
  if (kinds.length > MAX_KINDS) {
    const frequent = [...counts]
      .sort((a, b) => b[1] - a[1])
      .slice(0, MAX_KINDS - 1)
      .map(([kind]) => kind)
      .filter((kind) => kind !== OTHERS);
    kinds = [...kinds.filter((kind) => frequent.includes(kind)), OTHERS];
  }
  const groups = new Map();
  for (const line of modules) {
    const kind = kinds.includes(line.kind) ? line.kind : OTHERS;
    const where = `${line.layer}|${kind}`;
    groups.set(where, [...(groups.get(where) ?? []), line]);
  }
  const cells = new Map();
  for (const [where, lines] of groups) {
    const before = mean(lines.map((line) => line.similarity_before));
    const after = mean(lines.map((line) => line.similarity_after));
    cells.set(where, {
      before,
      after,
      difference: after - before,
      modules: lines.length,
      repaired: lines.filter((line) => line.repaired).length,
    });
  }
  const layers = [...new Set(modules.map(({ layer }) => layer))].sort((a, b) => (a === null) - (b === null) || a - b);
  return { layers, kinds, cells, averaged: [...cells.values()].some((cell) => cell.modules > 1) };
}

/** Maps beside each other, one colour scale for before and after, one for the difference. */
export function heatmaps(report, twoSides, marked) {
  const grid = gridOf(report.modules);
  const cells = [...grid.cells.values()];
  const scale = scaleOf(cells.flatMap((cell) => [cell.before, cell.after]));
  const sides = twoSides
    ? [
        ["before", "Before", scale],
        ["after", "After", scale],
        ["difference", "Difference", aroundZero(cells.map((cell) => cell.difference))],
      ]
    : [["before", "Similarity", scale]];
  // What is pointed at in one map is told below all of them.
  const told = [];
  const short = grid.kinds.map((kind) => kind.replace(/_proj$/, "") || kind);
  const labels = new Set(short).size === short.length ? short : grid.kinds;
  return h(
    "div",
    { class: `maps${grid.kinds.length > 9 ? " wide" : ""}` },
    sides.map(([side, title, range]) => map(grid, labels, side, title, range, { twoSides, marked, told })),
  );
}

function map(grid, labels, side, title, scale, { twoSides, marked, told }) {
  const difference = side === "difference";
  const figure = difference ? signed : number;
  const readouts = new Map();
  told.push((where) => readouts.get(where)?.());
  const readout = h("p", { class: "readout small soft" }, "Point at a cell, or move with the arrow keys.");
  const cells = [];
  const body = grid.layers.map((layer, row) =>
    h(
      "tr",
      null,
      h("th", { scope: "row" }, layer ?? "other"),
      grid.kinds.map((kind, column) => {
        const cell = grid.cells.get(`${layer}|${kind}`);
        if (!cell) return h("td", { class: "none" }, h("span", { class: "hidden" }, "none"));
        const value = cell[side];
        const rgb = colour((value - scale.low) / (scale.high - scale.low), difference ? DIFFERENCES : COLOURS);
        const mark = twoSides && cell.repaired ? (cell.repaired === cell.modules ? 2 : 1) : 0;
        const text = `${figure(value, 3)}${mark ? `, ${mark === 2 ? "repaired" : "partly repaired"}` : ""}`;
        const td = h(
          "td",
          {
            tabindex: "-1",
            style: {
              "background-color": Number.isFinite(value) ? `rgb(${rgb.join(" ")})` : "transparent",
              color: onto(rgb),
            },
            data: { row, column },
          },
          mark && marked && !difference ? h("i", { "aria-hidden": "true" }, MARK[mark]) : null,
          h("span", { class: "hidden" }, text),
        );
        readouts.set(`${row}|${column}`, () =>
          put(
            readout,
            h("strong", null, figure(value, 4)),
            ` · ${layer === null ? "outside of the layers" : `layer ${layer}`}, ${shown(kind, 60)}${cell.modules > 1 ? `, mean of ${cell.modules} modules` : ""}${twoSides ? `: ${number(cell.before, 3)} → ${number(cell.after, 3)}, ${mark ? (mark === 2 ? "repaired" : `${cell.repaired} of ${cell.modules} repaired`) : "left as it was"}` : ""}`,
          ),
        );
        const show = () => told.forEach((tell) => tell(`${row}|${column}`));
        td.addEventListener("mouseenter", show);
        td.addEventListener("focus", show);
        cells.push(td);
        return td;
      }),
    ),
  );
  if (cells.length) cells[0].tabIndex = 0;
  const table = h(
    "table",
    {
      role: "grid",
      "aria-label": `${title}: layers by kind of projection`,
      class: grid.layers.length > 40 ? "dense" : "",
    },
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("th", { scope: "col" }, h("span", { class: "hidden" }, "Layer")),
        labels.map((label, index) => h("th", { scope: "col", title: shown(grid.kinds[index], 60) }, shown(label, 24))),
      ),
    ),
    h("tbody", null, body),
  );
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    const from = event.target.closest("td");
    if (!move || !from) return;
    event.preventDefault();
    let row = Number(from.dataset.row);
    let column = Number(from.dataset.column);
    for (;;) {
      row += move[0];
      column += move[1];
      if (row < 0 || column < 0 || row >= grid.layers.length || column >= grid.kinds.length) return;
      const to = cells.find((cell) => Number(cell.dataset.row) === row && Number(cell.dataset.column) === column);
      if (to) {
        from.tabIndex = -1;
        to.tabIndex = 0;
        to.focus();
        return;
      }
    }
  });
  return h(
    "figure",
    { class: "map" },
    h("figcaption", null, title),
    h("div", { class: "map-scroll" }, table),
    difference ? differenceLegend(scale, title) : legend(scale, title),
    readout,
  );
}

function legend(scale, title) {
  const [low, high] = [number(scale.low), number(scale.high)];
  return bar([low, high], `${title}: colours from ${low}, dark, to ${high}, pale`, COLOURS);
}

function differenceLegend(scale, title) {
  const [low, high] = [signed(scale.low), signed(scale.high)];
  const label = `${title}: colours from ${low}, orange, through 0, white, to ${high}, purple`;
  return bar([`fell ${low}`, `rose ${high}`], label, DIFFERENCES);
}

function bar([low, high], label, colours) {
  // An odd number, so that a scale's middle has its own.
  const width = 25;
  return h(
    "div",
    { class: "legend small soft", role: "img", "aria-label": label },
    h("span", { "aria-hidden": "true" }, low),
    s(
      "svg",
      { viewBox: `0 0 ${width} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
      Array.from({ length: width }, (_, index) =>
        s("rect", {
          x: index,
          y: 0,
          width: 1.02,
          height: 1,
          fill: `rgb(${colour(index / (width - 1), colours).join(",")})`,
        }),
      ),
    ),
    h("span", { "aria-hidden": "true" }, high),
  );
}

const LINES = [
  ["kept", "kept, 1 is the whole update", (summary) => summary.kept],
  ["edit", "changed by, in units of the update", (summary) => summary.edit],
  ["likeness", "median similarity", (summary) => summary.similarity_after.median],
];

// Two and three times an update's size are usual; what changed it by many times must not flatten the other lines.
const HIGHEST = 4;
const UNSEEN = 0.02;
const CUT = "What lies above the chart is drawn on its upper edge.";

/** Where the chart's axis begins and ends, its step, and whether a value lies above it; as in safegraft/report/curve.py. */
export function axisOf(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = least >= -0.2 && most <= 1.4 ? 0.2 : 0.5;
  const low = Math.floor(Math.max(-1, Math.min(0, least)) / step + 1e-9) * step;
  const high = Math.ceil(Math.max(1, Math.min(HIGHEST, most - UNSEEN)) / step - 1e-9) * step;
  return { low, high, step, cut: most > high + UNSEEN };
}

function axisOfReport(report) {
  const values = report.variants.flatMap(({ summary }) => LINES.map(([, , take]) => take(summary)));
  return axisOf(values.filter(Number.isFinite));
}

/** Whether the strengths did different things; as in safegraft/report/curve.py. */
export function hasCurve({ variants }) {
  return LINES.some(([, , take]) => {
    const values = variants.map(({ summary }) => take(summary)).filter(Number.isFinite);
    return values.length > 1 && Math.max(...values) - Math.min(...values) >= 1e-6;
  });
}

/** Kept, edit and similarity over the strengths, told exactly by pointer and keys. Drawn again when its width changes. */
export function curve(report, signal) {
  return chart({
    keys: LINES,
    hint: "Point at a strength, or move with the arrow keys.",
    cut: axisOfReport(report).cut,
    draw: (width, tell) => drawing(report, width, width < 560 ? 300 : 340, tell),
    signal,
  });
}

/** Each layer's mean similarity, before and after; null where there are no two layers to draw a line through. */
export function layerLines(report, twoSides, signal) {
  const lines = report.layers
    .filter((line) => line.layer !== null)
    .filter((line) => Number.isFinite(line.similarity_before) && Number.isFinite(line.similarity_after))
    .sort((a, b) => a.layer - b.layer);
  if (new Set(lines.map(({ layer }) => layer)).size < 2) return null;
  return chart({
    keys: twoSides
      ? [
          ["edit", "before"],
          ["kept", "after"],
        ]
      : [["edit", "similarity"]],
    hint: "Point at a layer, or move with the arrow keys.",
    draw: (width, tell) => layerDrawing(lines, twoSides, width, width < 560 ? 240 : 280, tell),
    signal,
  });
}

/** A chart with its keys and a line that tells what is pointed at. keys: [class, text]; draw(width, tell) gives the SVG. */
function chart({ keys, hint, draw, signal, cut = false }) {
  const place = h("div", { class: "curve" });
  const readout = h("p", { class: "readout small soft" }, hint);
  const redraw = () => {
    const width = Math.round(place.clientWidth);
    if (width > 0 && width !== Number(place.dataset.width)) {
      place.dataset.width = String(width);
      put(
        place,
        draw(width, (...told) => put(readout, ...told)),
      );
    }
  };
  const watch = new ResizeObserver(redraw);
  watch.observe(place);
  signal.addEventListener("abort", () => watch.disconnect());
  return h(
    "div",
    null,
    h(
      "ul",
      { class: "keys small" },
      keys.map(([name, text]) =>
        h(
          "li",
          null,
          s(
            "svg",
            { viewBox: "0 0 34 10", "aria-hidden": "true" },
            s("line", { class: `${name}-line`, x1: 1, x2: 33, y1: 5, y2: 5 }),
            marker(name, 17, 5),
          ),
          text,
        ),
      ),
    ),
    cut ? h("p", { class: "soft small" }, CUT) : null,
    place,
    readout,
  );
}

/** What is pointed at, one stripe each. items: [[what, its figures]], edges: where stripes begin, and the last one's end. */
function stripesOf(items, edges, top, bottom, tell) {
  return items.map(([at, figures], index) => {
    const stripe = s("rect", {
      class: "stripe",
      x: edges[index],
      y: top,
      width: edges[index + 1] - edges[index],
      height: bottom - top,
      tabindex: index ? -1 : 0,
      role: "img",
      "aria-label": at + figures,
    });
    const show = () => tell(h("strong", null, at), figures);
    stripe.addEventListener("mouseenter", show);
    stripe.addEventListener("focus", show);
    return stripe;
  });
}

/** Left and right arrows go from stripe to stripe. */
function withArrows(svg, stripes) {
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const from = stripes.indexOf(event.target);
    if (!move || from < 0) return;
    event.preventDefault();
    const to = stripes[from + move];
    if (!to) return;
    stripes[from].setAttribute("tabindex", "-1");
    to.setAttribute("tabindex", "0");
    to.focus();
  });
  return svg;
}

/** A chart's drawing with its rules, one for each tick and told with that many digits, below what is drawn. */
function framed({ width, height, left, right, ticks, y, digits, label }, ...drawn) {
  return s(
    "svg",
    { class: "lines", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label },
    ticks.map((value) => [
      s("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
      s("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, digits)),
    ]),
    drawn,
  );
}

const halfway = (places) => places.slice(1).map((place, index) => (place + places[index]) / 2);

function layerDrawing(lines, twoSides, width, height, tell) {
  const [left, right, top, bottom] = [40, width - 10, 12, height - 44];
  const [first, last] = [lines[0].layer, lines.at(-1).layer];
  const x = (layer) => left + 10 + ((layer - first) / (last - first)) * (right - left - 20);
  const { low, high } = scaleOf(lines.flatMap((line) => [line.similarity_before, line.similarity_after]));
  const y = (value) => bottom - ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * (bottom - top);
  const step = [0.02, 0.05, 0.1, 0.2, 0.5].find((size) => (high - low) / size <= 5.001) ?? 0.5;
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-6); at <= Math.floor(high / step + 1e-6); at++) ticks.push(at * step);
  const every = [1, 2, 5, 10, 20, 50, 100].find((size) => size >= (last - first + 1) / (width / 64)) ?? 200;
  const stripes = stripesOf(
    lines.map((line) => [
      `Layer ${line.layer}`,
      twoSides
        ? `: ${number(line.similarity_before, 4)} before, ${number(line.similarity_after, 4)} after; ${line.repaired} of ${counted(line.modules, "module")} repaired`
        : `: ${number(line.similarity_before, 4)}, mean of ${counted(line.modules, "module")}`,
    ]),
    [left, ...halfway(lines.map(({ layer }) => x(layer))), right],
    top,
    bottom,
    tell,
  );
  const sides = [["edit", "similarity_before"], ...(twoSides ? [["kept", "similarity_after"]] : [])];
  const label = `Mean similarity of ${lines.length} layers${twoSides ? ", before and after" : ""}; the table below has every module.`;
  const svg = framed(
    { width, height, left, right, ticks, y, digits: step < 0.1 ? 2 : 1, label },
    lines
      .filter(({ layer }) => layer % every === 0)
      .map(({ layer }) => s("text", { x: x(layer), y: bottom + 18, "text-anchor": "middle" }, String(layer))),
    s("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, "layer"),
    sides.map(([name, side]) =>
      s("polyline", {
        class: `${name}-line`,
        points: lines.map((line) => `${x(line.layer).toFixed(1)},${y(line[side]).toFixed(1)}`).join(" "),
      }),
    ),
    sides.map(([name, side]) => lines.map((line) => marker(name, x(line.layer), y(line[side])))),
    stripes,
  );
  return withArrows(svg, stripes);
}

function marker(name, x, y) {
  if (name === "kept") return s("circle", { class: "kept-dot", cx: x, cy: y, r: 4 });
  if (name === "edit") return s("rect", { class: "edit-dot", x: x - 3.5, y: y - 3.5, width: 7, height: 7 });
  return s("path", { class: "likeness-dot", d: `M${x} ${y - 5}l4.5 8h-9z` });
}

function drawing(report, width, height, tell) {
  const runs = [...report.variants].sort((a, b) => a.strength - b.strength);
  const parameter = shown(report.strength_parameter ?? "strength", 60);
  const [left, right, top, bottom] = [40, width - 14, 22, height - 50];
  const [first, last] = [runs[0].strength, runs.at(-1).strength];
  // A decade on an even axis would leave the smallest strengths on top of each other.
  const logarithmic = first > 0 && last / first > 10;
  const share = (strength) =>
    logarithmic ? Math.log(strength / first) / Math.log(last / first) : (strength - first) / (last - first || 1);
  const x = (strength) => left + 26 + share(strength) * (right - left - 52);
  const { low, high, step } = axisOfReport(report);
  const y = (value) => bottom - ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * (bottom - top);
  const ticks = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, index) => low + index * step);
  const edges = [left, ...halfway(runs.map(({ strength }) => x(strength))), right];
  let lastLabel = -Infinity;
  const stripes = stripesOf(
    runs.map(({ strength, summary }) => [
      `${parameter} ${plain(strength)}`,
      `: kept ${percent(summary.kept)}, changed by ${change(summary.edit)}, median similarity ${number(summary.similarity_after.median)}`,
    ]),
    edges,
    top,
    bottom,
    tell,
  );
  const label = `Kept, changed by and median similarity over ${runs.length} values of ${parameter}; the table below has the figures.`;
  const svg = framed(
    { width, height, left, right, ticks, y, digits: 1, label },
    runs.map(({ strength }, index) => {
      if (x(strength) - lastLabel < 38 && index > 0) return null;
      lastLabel = x(strength);
      return s("text", { x: x(strength), y: bottom + 20, "text-anchor": "middle" }, plain(strength));
    }),
    s(
      "text",
      { x: (left + right) / 2, y: height - 10, "text-anchor": "middle" },
      `${parameter}${logarithmic ? ", on a logarithmic scale" : ""}`,
    ),
    LINES.map(([name, , take]) =>
      s("polyline", {
        class: `${name}-line`,
        points: runs
          .filter(({ summary }) => Number.isFinite(take(summary)))
          .map(({ strength, summary }) => `${x(strength).toFixed(1)},${y(take(summary)).toFixed(1)}`)
          .join(" "),
      }),
    ),
    LINES.map(([name, , take]) =>
      runs.map(({ strength, summary }) =>
        Number.isFinite(take(summary)) ? marker(name, x(strength), y(take(summary))) : null,
      ),
    ),
    stripes,
  );
  return withArrows(svg, stripes);
}
