// The report, rendered from its JSON.

import { get } from "./api.js";
import { code, command, facts, fresh, h, put } from "./dom.js";
import { downloadAdapter, downloadFile } from "./download.js";
import { change, count, counted, named, number, percent, plain, shown, size } from "./format.js";
import { evaluationView } from "./evaluation.js";
import { curve, hasCurve, heatmaps, layerLines } from "./maps.js";
import { actionButton, curl } from "./parts.js";

const FIRST_LINES = 60;

/** All of a report as one element; changed(job): an evaluation was added or taken out. */
export function reportView(report, { job, signal, changed }) {
  const analyze = report.mode === "analyze";
  const sweep = report.variants.length > 1;
  const twoSides = !analyze && report.summary.repaired > 0;
  // Where all were, a mark in every cell would tell nothing.
  const some = twoSides && report.summary.repaired < report.summary.modules;
  const but = h("span");
  const caution = h("div");
  const evaluated = (now) => {
    const found = now.result.evaluation;
    put(but, found ? "But for the evaluation above, this report" : "This report");
    put(caution, found?.caution ? h("p", { class: "note caution strong" }, shown(found.caution, 600)) : null);
  };
  evaluated(job);
  const behaviour =
    report.output &&
    evaluationView(job, report, {
      signal,
      changed: (now) => {
        evaluated(now);
        changed(now);
      },
    });
  return h(
    "div",
    { class: "report" },
    h(
      "section",
      { "aria-labelledby": "report-title" },
      h("h2", { id: "report-title" }, "Report"),
      h("p", { class: "lead" }, headline(report), "."),
      caution,
      sweep
        ? h(
            "p",
            { class: "soft small" },
            `All figures, maps and tables but the comparison are those of the first strength that was asked for, ${plain(report.variants[0].strength)}.`,
          )
        : null,
      tiles(report, twoSides),
      warnings(report),
    ),
    sweep && !analyze ? variants(report, job, signal) : null,
    behaviour,
    h(
      "section",
      { "aria-labelledby": "why-title" },
      h("h2", { id: "why-title" }, "What was done, and why"),
      h(
        "div",
        { class: "reasons" },
        reason(analyze ? "What a repair would do" : "What was done", done(report)),
        reason(`Method: ${report.method.type}`, recommendation(report)),
        reason(
          "What similarity means here",
          `${report.method.similarity.slice(0, 1).toUpperCase()}${report.method.similarity.slice(1)}.`,
        ),
        reason(`Lineage: ${report.lineage}`, lineage(report)),
      ),
      h(
        "p",
        { class: "note" },
        h("strong", null, "Safer, not safe. "),
        but,
        " measures weights, not behaviour. Before you rely on the adapter, try it on your own task, on harmful requests, and on harmless ones that it must not decline.",
      ),
    ),
    h(
      "section",
      { "aria-labelledby": "maps-title" },
      h("h2", { id: "maps-title" }, twoSides ? "Before, after and difference" : "Module by module"),
      h(
        "p",
        { class: "soft" },
        "A row is a layer, a column a kind of projection. Dark is the lowest similarity.",
        twoSides ? " In the difference, orange fell, white did not change and purple rose." : null,
        some ? " ● marks what was repaired, ◐ where only some modules of a cell were." : null,
      ),
      heatmaps(report, twoSides, some),
    ),
    byLayer(report, twoSides, signal),
    modules(report, twoSides),
    side(report, job),
    h(
      "section",
      { "aria-labelledby": "repeat-title" },
      h("h2", { id: "repeat-title" }, "From what it was made"),
      facts([
        [
          "Input",
          [
            code(report.input.sha256, "the input's SHA-256"),
            h("div", { class: "soft small" }, size(report.input.bytes)),
          ],
        ],
        [
          "Output",
          report.output
            ? [
                code(report.output.sha256, "the output's SHA-256"),
                h(
                  "div",
                  { class: "soft small" },
                  size(report.output.bytes),
                  report.output.sha256 === report.input.sha256 ? ", the same file as the input" : null,
                ),
              ]
            : "none: this was a measurement",
        ],
        [
          "Reference",
          [named(report.reference.name), h("div", null, code(report.reference.sha256, "the reference's SHA-256"))],
        ],
        ["Base model", named(report.base_model)],
        ["Ran on", `${shown(report.environment.device)}, ${shown(report.environment.dtype)}`],
        [
          "Seconds",
          Object.entries(report.timings)
            .map(([name, value]) => `${shown(name, 30)} ${value.toFixed(2)}`)
            .join(", "),
        ],
      ]),
      h(
        "details",
        null,
        h("summary", null, "Check it again, offline"),
        command(
          "safegraft verify REPORT.json --adapter ADAPTER_DIR --reference REFERENCE_DIR",
          "Command that runs the report's claims again",
        ),
      ),
    ),
    glossary(),
  );
}

function byLayer(report, twoSides, signal) {
  const lines = layerLines(report, twoSides, signal);
  if (!lines) return null;
  return h(
    "section",
    { "aria-labelledby": "layers-title" },
    h("h2", { id: "layers-title" }, "Similarity by layer"),
    h("p", { class: "soft" }, "The mean of each layer's modules."),
    lines,
  );
}

// Word for word as safegraft/report/template.html says them.
export const TERMS = [
  ["Update", "What the fine-tuning adds to the model’s weights. A LoRA adapter is a compact form of it."],
  ["Module", "One weight matrix of the model that the adapter changes, such as the query projection of layer 12."],
  ["Reference", "The operator’s record, made once per model, of what safe behaviour looks like inside each module."],
  [
    "Similarity",
    "How well a module’s update agrees with what the reference records as safe: 1 at most, higher is better. What exactly is compared depends on the method and is said above.",
  ],
  [
    "Kept, changed by",
    "Kept is the share of the original update still present after the repair: 100\u00a0% is all, 0\u00a0% none, less than that means turned round. Changed by is the size of the difference in units of the original update; above 100\u00a0% the difference is larger than the update was. The two need not add up to 100\u00a0%: a repair also moves weights on which the adapter’s usual inputs hardly depend, and little of what it does to them.",
  ],
];

function glossary() {
  return h("section", { "aria-labelledby": "terms-title" }, h("h2", { id: "terms-title" }, "Five terms"), facts(TERMS));
}

/** What was done to the modules, or would have been; word for word as safegraft/report/words.py says it. */
export function done(report) {
  const { explanation, type } = report.method;
  const would = `Of a repaired module the report would say: “${explanation}”`;
  if (report.mode === "analyze") {
    const nothing = "This run measured and changed nothing.";
    return type === "none" ? nothing : `${nothing} ${would}`;
  }
  const beside = report.warnings.some((warning) => warning.code === "side_car");
  return report.summary.repaired || beside || type === "none" ? explanation : `No module was changed. ${would}`;
}

/** How many modules act more on safety prompts than on general ones at one strength, as words.py says it. */
export function leaning(report, { similarity_after: after }) {
  const even = report.method.break_even;
  if (after.min >= even) return "none";
  return after.median < even ? "most" : "some";
}

/** Numbers by their size, also those within names: layer 2 comes before layer 10. */
function compared(a, b) {
  if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
  return a < b ? -1 : a > b ? 1 : 0;
}

function reason(title, text) {
  return h("div", null, h("h3", null, title), h("p", null, shown(text, 1200)));
}

/** The sentence that the report brings along; one that was written before it had any is told by its plainest figures. */
export function headline({ headline: sentence, mode, summary }) {
  if (sentence) return shown(sentence, 1000);
  const measured = `${counted(summary.modules, "module")} measured`;
  return mode === "analyze" ? measured : `${measured}, ${count(summary.repaired)} repaired`;
}

/** Where the adapter comes from, and how that was seen; word for word as safegraft/report/words.py says it. */
export function lineage(report) {
  const cosine = number(report.lineage_similarity ?? 0);
  if (report.lineage === "continued")
    return `It was trained further from the provider's aligned adapter, so it contains that alignment: both updates point in similar directions (median cosine ${cosine}; for unrelated adapters it is near 0).`;
  const how =
    report.lineage_similarity === null
      ? "There was no aligned update to compare its own with."
      : `It is unrelated to the provider's aligned adapter (median cosine of the updates ${cosine}; for related ones it is well above 0).`;
  const otherwise =
    "An adapter that was trained on the model without alignment looks the same, and nothing here would give that alignment back to it.";
  if (report.lineage === "foreign")
    return `${how} Its label for its base model is unknown to the reference. It is taken to sit on the aligned model, which nobody has confirmed: make sure of it. ${otherwise}`;
  return `${how} So it is taken to have been trained on top of the aligned model and to be served there. ${otherwise}`;
}

function recommendation(report) {
  const { method, reason: why } = report.recommendation;
  if (method === report.method.type) return `It is the one that is recommended for this adapter and reference: ${why}`;
  if (method === "none") return `No method is recommended for this adapter and reference: ${why}`;
  return `Had no method been named, ${method} would have run: ${why}`;
}

function tiles({ summary, warnings: found }, twoSides) {
  const unseen = found.some((warning) => warning.code === "biases_added") ? ", without the biases" : "";
  const tile = (label, figure, text, part = null) =>
    h(
      "div",
      { class: "tile" },
      h("dt", null, label),
      h("dd", { class: "figure" }, figure),
      h("dd", { class: "soft small" }, part === null ? null : meter(part), text),
    );
  const before = summary.similarity_before;
  const after = summary.similarity_after;
  return h(
    "dl",
    { class: "tiles" },
    twoSides
      ? [
          tile(
            "Similarity, median",
            [number(before.median), h("small", null, " → "), number(after.median)],
            `lowest ${number(before.min)} → ${number(after.min)}`,
          ),
          tile(
            "Repaired",
            [count(summary.repaired), h("small", null, ` of ${count(summary.modules)}`)],
            "modules",
            summary.repaired / summary.modules,
          ),
          tile("Kept", percent(summary.kept), "of the fine-tuning's update", summary.kept),
          tile(
            "Changed by",
            change(summary.edit).replace(" times its size", " ×"),
            summary.truncation_error > 0
              ? `of the update${unseen}; at most ${percent(summary.truncation_error, 1)} of a module lost to its rank`
              : `of the update's size${unseen}`,
          ),
        ]
      : [
          tile(
            "Similarity, median",
            number(before.median),
            `lowest ${number(before.min)}, highest ${number(before.max)}`,
          ),
          tile("Modules", count(summary.modules), "measured"),
        ],
  );
}

function meter(part) {
  const filled = h("span", { style: { width: `${Math.min(100, Math.max(0, 100 * part))}%` } });
  return h("span", { class: "meter", "aria-hidden": "true" }, filled);
}

function warnings(report) {
  const lines = [
    ...report.warnings.map(({ code: name, message }) => [
      shown(message, 1000),
      " ",
      h("code", { class: "soft" }, shown(name, 60)),
    ]),
  ];
  if (report.dropped_files.length)
    lines.push(`Left out of the patched adapter: ${shown(report.dropped_files.join(", "), 400)}.`);
  return lines.length
    ? h(
        "div",
        { class: "note caution", role: "note", "aria-label": "Warnings" },
        h(
          "ul",
          null,
          lines.map((line) => h("li", null, line)),
        ),
      )
    : null;
}

function variants(report, job, signal) {
  const ids = new Map(job.result.variants.map(({ strength, adapter_id }) => [strength, adapter_id]));
  const lines = [...report.variants].sort((a, b) => a.strength - b.strength);
  const lean = typeof report.method.break_even === "number";
  const where = h("div", { "aria-live": "polite" });
  const rows = lines.map(({ strength, summary, output }) => {
    const id = ids.get(strength);
    const get_ = actionButton("Download", async (tell) => downloadAdapter(await get(`v1/adapters/${id}`), tell), {
      class: "small",
      "aria-label": `Download the adapter of strength ${plain(strength)}`,
    });
    where.append(get_.where);
    return h(
      "tr",
      null,
      h("th", { scope: "row", class: "num" }, plain(strength)),
      h("td", { class: "num" }, percent(summary.kept, 1)),
      h("td", { class: "num" }, percent(summary.edit, 1)),
      h("td", { class: "num" }, number(summary.similarity_after.median, 4)),
      lean ? h("td", null, leaning(report, summary)) : null,
      h("td", { class: "num" }, `${count(summary.repaired)} of ${count(summary.modules)}`),
      h("td", null, output ? h("code", { title: output.sha256 }, output.sha256.slice(0, 12)) : "–"),
      h("td", { class: "do" }, id ? [get_.button, h("a", { href: `#/adapters/${id}` }, "show")] : null),
    );
  });
  const heads = [
    ["Strength", "num"],
    ["Kept", "num"],
    ["Changed by", "num"],
    ["Similarity", "num"],
    ...(lean ? [["Still lean to safety prompts", ""]] : []),
    ["Repaired", "num"],
    ["Output, SHA-256", ""],
    ["Adapter", ""],
  ];
  return h(
    "section",
    { "aria-labelledby": "variants-title" },
    h("h2", { id: "variants-title" }, "The strengths, side by side"),
    h(
      "p",
      { class: "soft" },
      "How much of the update is left, what the repair cost, and how similar the modules became. Which one serves is told by trying them.",
    ),
    hasCurve(report)
      ? curve(report, signal)
      : h("p", null, "All strengths did the same, so there is no chart of them."),
    h(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of the strengths" },
      h(
        "table",
        { class: "data" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            heads.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)),
          ),
        ),
        h("tbody", null, rows),
      ),
    ),
    where,
  );
}

function modules(report, twoSides) {
  const columns = [
    ["Module", (line) => line.name, (line) => h("code", null, shown(line.name, 120)), "name"],
    ["Layer", (line) => line.layer ?? Infinity, (line) => line.layer ?? "–", "num"],
    ["Rank", (line) => line.rank, (line) => String(line.rank), "num"],
    ...(twoSides
      ? [["Repaired", (line) => Number(line.repaired), (line) => (line.repaired ? "● yes" : "no"), ""]]
      : []),
    [
      twoSides ? "Before" : "Similarity",
      (line) => line.similarity_before,
      (line) => number(line.similarity_before, 4),
      "num",
    ],
    ...(twoSides
      ? [
          ["After", (line) => line.similarity_after, (line) => number(line.similarity_after, 4), "num"],
          ["Kept", (line) => line.kept, (line) => percent(line.kept, 1), "num"],
          ["Changed by", (line) => line.edit, (line) => percent(line.edit, 1), "num"],
          ["Rank loss", (line) => line.truncation_error, (line) => percent(line.truncation_error, 1), "num"],
        ]
      : []),
  ];
  let by = twoSides
    ? columns.findIndex(([name]) => name === "Changed by")
    : columns.findIndex(([name]) => name === "Similarity");
  let down = twoSides;
  let all = false;
  const id = fresh("filter");
  const body = h("tbody");
  const more = h("div");
  const filter = h("input", { id, type: "search", placeholder: "layers.3, q_proj …", on: { input: () => show() } });
  const heads = columns.map(([name, , , kind], index) =>
    h(
      "th",
      { scope: "col", class: kind },
      h(
        "button",
        {
          type: "button",
          on: {
            click: () => {
              down = by === index ? !down : kind === "num";
              by = index;
              show();
            },
          },
        },
        name,
      ),
    ),
  );

  function show() {
    heads.forEach((head, index) =>
      index === by
        ? head.setAttribute("aria-sort", down ? "descending" : "ascending")
        : head.removeAttribute("aria-sort"),
    );
    const take = columns[by][1];
    const text = filter.value.trim().toLowerCase();
    const found = report.modules.filter((line) => !text || line.name.toLowerCase().includes(text));
    found.sort((a, b) => compared(take(a), take(b)) * (down ? -1 : 1));
    const lines = all ? found : found.slice(0, FIRST_LINES);
    put(
      body,
      lines.length
        ? lines.map((line) =>
            h(
              "tr",
              null,
              columns.map(([, , text_, kind]) => h("td", { class: kind }, text_(line))),
            ),
          )
        : h("tr", null, h("td", { colspan: columns.length }, "No module has that in its name.")),
    );
    put(
      more,
      found.length > lines.length
        ? h(
            "button",
            {
              type: "button",
              on: {
                click: () => {
                  all = true;
                  show();
                },
              },
            },
            `Show all ${count(found.length)}`,
          )
        : null,
    );
  }

  show();
  return h(
    "section",
    { "aria-labelledby": "modules-title" },
    h("h2", { id: "modules-title" }, "All modules"),
    h("div", { class: "field inline" }, h("label", { for: id }, "Only with"), filter),
    h(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of all modules" },
      h("table", { class: "data" }, h("thead", null, h("tr", null, heads)), body),
    ),
    more,
  );
}

function side(report, job) {
  const names = Object.entries(report.side_cars);
  if (!names.length) return null;
  return h(
    "section",
    { "aria-labelledby": "side-title" },
    h("h2", { id: "side-title" }, "Side-cars"),
    h("p", { class: "soft" }, "The repair is in files beside the adapter. Without them it behaves as it did."),
    h(
      "ul",
      { class: "rows" },
      names.map(([name, sha256]) => {
        const one = actionButton(
          "Download",
          (tell) =>
            downloadFile(sideCarPath(job, name), name, {
              sha256,
              onState: tell,
              elsewhere: "The adapter's archive does not hold it either: use the command by curl below.",
            }),
          { class: "small", "aria-label": `Download ${shown(name)}` },
        );
        return h(
          "li",
          null,
          h("div", { class: "row" }, h("div", { class: "what" }, h("code", null, shown(name))), one.button),
          one.where,
        );
      }),
    ),
    h(
      "details",
      null,
      h("summary", null, "The same by curl"),
      names.map(([name]) =>
        command(
          curl(sideCarPath(job, name), { options: `Lo '${name.replaceAll("'", "'\\''")}'` }),
          `Command that downloads ${shown(name)}`,
        ),
      ),
    ),
  );
}

function sideCarPath(job, name) {
  return `v1/realignments/${job.id}/side_car/${encodeURIComponent(name)}`;
}
