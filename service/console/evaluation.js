// What was measured of an adapter's behaviour, before and after: shown, added and taken out again.

import { ApiError, ask, remove } from "./api.js";
import { command, confirmed, fresh, h, loading, put, s, say } from "./dom.js";
import { downloadFile } from "./download.js";
import { count, named, number, plain, shown } from "./format.js";
import { actionButton, errorBox } from "./parts.js";

// As safegraft/report/words.py says them.
const MEASURES = [
  ["harm_score", "Harm score", "harmful prompts that were not declined; lower is better"],
  ["over_refusal", "Over-refusal", "harmless prompts that were declined; lower is better"],
  ["task_accuracy", "Task accuracy", "right answers to the customer’s task; higher is better"],
];
const MAX_BYTES = 65536;

/** A section of a job's report; changed(job) hears of the job as the API answers it. */
export function evaluationView(job, report, { changed, signal }) {
  const title = fresh("evaluation");
  const path = `v1/realignments/${job.id}/evaluation`;
  const body = h("div");
  const element = h(
    "section",
    { "aria-labelledby": title },
    h("h2", { id: title, tabindex: "-1" }, "How it behaves"),
    body,
  );

  function show() {
    const found = job.result.evaluation;
    put(body, found ? measured(found, report) : nothing(report), found ? actions() : adding("Evaluation"));
  }

  // One request at a time: two answers would settle in any order.
  let busy = false;
  async function alone(work) {
    if (busy) return;
    busy = true;
    body.setAttribute("aria-busy", "true");
    try {
      await work();
    } finally {
      busy = false;
      body.removeAttribute("aria-busy");
    }
  }

  function settle(answer, told) {
    if (signal.aborted) return;
    job = answer;
    show();
    changed(job);
    say(told);
    // What was pressed is gone: the keyboard goes on from here.
    element.querySelector("h2").focus();
  }

  function adding(label) {
    const id = fresh("file");
    const where = h("div", { "aria-live": "polite" });
    const field = h("input", { type: "file", id, accept: ".json,application/json" });
    field.addEventListener("change", () =>
      alone(async () => {
        const [file] = field.files;
        if (!file) return;
        put(where, loading("Sending the evaluation …"));
        field.disabled = true;
        try {
          const answer = await ask(path, { method: "PUT", json: await read(file), signal });
          settle(await answer.json(), "The evaluation was added.");
        } catch (error) {
          if (!signal.aborted) put(where, errorBox(error));
        } finally {
          field.disabled = false;
          // The same file, mended, is a change again.
          field.value = "";
        }
      }),
    );
    return h("div", { class: "field added" }, h("label", { for: id }, label), field, where);
  }

  function actions() {
    const table = actionButton(
      "Table",
      (tell) =>
        downloadFile(`v1/realignments/${job.id}/report.evaluation.csv`, `${job.id}.evaluation.csv`, { onState: tell }),
      { "aria-label": "Table of the evaluation, as CSV" },
    );
    const taken = actionButton(
      "Take it out",
      async () => {
        const sure = await confirmed({
          title: "Take the evaluation out of the report?",
          text: ["The report is then as it was before. The evaluation can be added again."],
          action: "Take it out",
        });
        if (sure) await alone(async () => settle(await remove(path), "The evaluation was taken out."));
      },
      { class: "danger-quiet" },
    );
    return [
      h("div", { class: "actions" }, table.button, taken.button),
      table.where,
      taken.where,
      h("details", null, h("summary", null, "Replace it"), adding("Another evaluation")),
    ];
  }

  show();
  return element;
}

function nothing(report) {
  const continued = report.lineage === "continued";
  const first = report.variants.length > 1 ? `, of strength ${plain(report.variants[0].strength)},` : "";
  return [
    h(
      "p",
      null,
      `Nothing was measured yet. Whoever has the model can ask it with the adapter that came and with the patched one${first} and add what was counted:`,
    ),
    command(
      `safegraft evaluate ADAPTER_DIR PATCHED_DIR --base MODEL${continued ? "" : " --aligned ALIGNED_ADAPTER_DIR"} \\
  --harmful harmful.csv --benign benign.csv --task task.jsonl --report report.json --out evaluation.json`,
      "Command that measures an adapter before and after",
    ),
    h("p", { class: "soft small" }, "Take prompts that the reference was not built from."),
  ];
}

function measured(found, report) {
  const rows = MEASURES.filter(([name]) => found.before[name] && found.after[name]);
  const first = report.variants.length > 1 ? `, at ${plain(report.variants[0].strength)}` : "";
  return [
    h("p", null, shown(found.summary, 1000)),
    h(
      "ul",
      { class: "keys" },
      [
        ["before", "before"],
        ["after", `after${first}`],
      ].map(([name, text]) =>
        h(
          "li",
          null,
          s(
            "svg",
            { viewBox: "0 0 34 10", "aria-hidden": "true" },
            s("line", { class: `${name}-whisker`, x1: 0, x2: 34, y1: 5, y2: 5 }),
            s("circle", { class: `${name}-dot`, cx: 17, cy: 5, r: 4 }),
          ),
          text,
        ),
      ),
    ),
    h(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of how it behaves" },
      h(
        "table",
        { class: "data behaviour" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            h("th", { scope: "col" }, "Measure"),
            h("th", { scope: "col", class: "num" }, "Before"),
            h("th", { scope: "col", class: "num" }, "After"),
            h("th", { scope: "col", class: "drawn" }, "From 0 to 1"),
          ),
        ),
        h(
          "tbody",
          null,
          rows.map(([name, label, what]) =>
            h(
              "tr",
              null,
              h("th", { scope: "row" }, h("span", { class: "strong" }, label), h("div", { class: "soft small" }, what)),
              [found.before[name], found.after[name]].map(cell),
              h("td", { class: "drawn" }, whiskers(found.before[name], found.after[name])),
            ),
          ),
        ),
      ),
    ),
    h(
      "p",
      { class: "soft small" },
      "Judged by: ",
      named(found.judge),
      ". Below each share stand its 95 % interval (Wilson’s, over prompts) and what was counted. The intervals do not tell how well the judge judges.",
    ),
  ];
}

function cell(share) {
  return h(
    "td",
    { class: "num" },
    h("span", { class: "strong" }, number(share.share)),
    h("div", null, `${number(share.low)} to ${number(share.high)}`),
    h("div", { class: "soft small" }, `${count(share.hits)} of ${count(share.total)}`),
  );
}

/** Both shares with their intervals, as safegraft/report/template.html draws them. */
function whiskers(before, after) {
  const x = (value) => (6 + 228 * value).toFixed(1);
  return s(
    "svg",
    { class: "whiskers", viewBox: "0 0 240 30", "aria-hidden": "true" },
    [0, 0.25, 0.5, 0.75, 1].map((at) => s("line", { class: "rule", x1: x(at), x2: x(at), y1: 0, y2: 30 })),
    [
      ["before", before, 9],
      ["after", after, 21],
    ].map(([name, share, y]) => [
      s("line", { class: `${name}-whisker`, x1: x(share.low), x2: x(share.high), y1: y, y2: y }),
      s("circle", { class: `${name}-dot`, cx: x(share.share), cy: y, r: 4 }),
    ]),
  );
}

/** What a file holds as JSON; its meaning is the API's to judge. */
async function read(file) {
  if (file.size > MAX_BYTES) {
    throw new ApiError("The file is no evaluation: that has some hundred bytes.", { code: "not_an_evaluation" });
  }
  try {
    return JSON.parse(await file.text());
  } catch (error) {
    throw new ApiError(`${file.name} is no JSON: ${error.message}`, { code: "not_an_evaluation" });
  }
}
