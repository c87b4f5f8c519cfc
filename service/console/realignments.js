// Realignments: the list with its filters, and one job from its start to its report.

import { get, post, remove } from "./api.js";
import { adapterNames, jobRow } from "./adapters.js";
import { code, command, confirmed, empty, facts, fresh, h, loading, put, say, unasked } from "./dom.js";
import { downloadAdapter, downloadFile } from "./download.js";
import { counted, duration, named, shown, time } from "./format.js";
import {
  STATUS,
  STRENGTH,
  actionButton,
  adapterLink,
  badge,
  curl,
  errorBox,
  filterForm,
  isOpen,
  methodLine,
  pages,
  withFilters,
} from "./parts.js";
import { hasCurve } from "./maps.js";
import { reportView } from "./report.js";
import { draft } from "./start.js";
import { follow } from "./sse.js";

const isPair = (text) => text.indexOf("=") > 0;

/** #/realignments?status=…: newest first. */
export function realignmentsView(main, { signal, query, replace }) {
  const wanted = {
    status: query.get("status") ?? "",
    adapter_id: query.get("adapter_id") ?? "",
    reference_id: query.get("reference_id") ?? "",
    metadata: isPair(query.get("metadata") ?? "") ? query.get("metadata") : "",
  };

  function asked() {
    const { metadata, ...rest } = wanted;
    const at = metadata.indexOf("=");
    return at > 0 ? { ...rest, [`metadata[${metadata.slice(0, at).trim()}]`]: metadata.slice(at + 1).trim() } : rest;
  }

  const any = () => Object.values(wanted).some(Boolean);
  const nothing = h("div");
  const names = adapterNames(signal);
  const list = pages({
    async fetch(after) {
      const [page, known] = await Promise.all([
        get("v1/realignments", { query: { limit: 20, after, ...asked() }, signal }),
        names,
      ]);
      return { ...page, data: page.data.map((job) => ({ job, known })) };
    },
    row: ({ job, known }) => jobRow(job, known),
    label: "realignments",
    nothing,
    signal,
    isLive: ({ job }) => isOpen(job),
  });
  const sayNothing = () =>
    put(
      nothing,
      any()
        ? empty("No realignment matches these filters.")
        : empty("No realignments yet.", h("a", { href: "#/" }, "Drop an adapter")),
    );

  const fault = h("p", { class: "fault small", role: "alert" });
  function set(name, value) {
    const text = value.trim();
    if (name === "metadata") {
      const slip = Boolean(text) && !isPair(text);
      fault.textContent = slip ? "Write key=value, for example customer=c-17." : "";
      metadata.setAttribute("aria-invalid", String(slip));
      if (slip) return;
    }
    wanted[name] = text;
    replace(withFilters("#/realignments", wanted));
    sayNothing();
    list.restart();
  }

  const status = h(
    "select",
    { id: fresh("status"), on: { change: (event) => set("status", event.target.value) } },
    h("option", { value: "" }, "Any"),
    Object.entries(STATUS).map(([value, [label]]) => h("option", { value, selected: wanted.status === value }, label)),
  );
  const reference = h(
    "select",
    { id: fresh("reference"), on: { change: (event) => set("reference_id", event.target.value) } },
    h("option", { value: "" }, "Any"),
    wanted.reference_id ? h("option", { value: wanted.reference_id, selected: true }, wanted.reference_id) : null,
  );
  get("v1/references", { signal }).then(
    (page) => {
      for (const { id, name } of page.data) {
        if (id === wanted.reference_id) reference.querySelector("option[selected]").textContent = shown(name, 60);
        else reference.append(h("option", { value: id }, shown(name, 60)));
      }
    },
    () => {},
  );
  const choice = h("div", { class: "actions choice-of", role: "status" });
  /** The realignments of one adapter are asked for: where several have the name, which one is meant. */
  function choose(name, ids) {
    const one = (id) =>
      h(
        "button",
        {
          type: "button",
          class: "small",
          on: {
            click: () => {
              put(choice);
              adapter.value = id;
              adapter.focus();
              set("adapter_id", id);
            },
          },
        },
        h("code", null, id),
      );
    put(
      choice,
      h("span", null, `${ids.length} adapters are called so; until you choose one, all are listed. The newest first:`),
      ids.slice(0, 8).map(one),
    );
    say(`${ids.length} adapters are called ${shown(name, 60)}. Choose one.`);
  }
  const adapter = h("input", {
    id: fresh("adapter"),
    type: "text",
    value: wanted.adapter_id,
    placeholder: "its name, or adp_…",
    spellcheck: "false",
    list: fresh("adapters"),
    on: {
      change: async (event) => {
        const text = event.target.value.trim();
        const ids = [...(await names)].filter(([, name]) => text && name === text).map(([id]) => id);
        put(choice);
        adapter.setAttribute("aria-invalid", "false");
        if (ids.length > 1) return choose(text, ids);
        if (!ids.length && text && !text.startsWith("adp_")) {
          adapter.setAttribute("aria-invalid", "true");
          put(choice, h("span", { class: "fault" }, "None of the newest hundred adapters is called so. Write its id."));
          return;
        }
        set("adapter_id", ids[0] ?? text);
      },
    },
  });
  // The newest by name: two of one name are told apart by their ids.
  const suggestions = h("datalist", { id: adapter.getAttribute("list") });
  names.then((known) =>
    put(
      suggestions,
      [...known].map(([id, name]) => h("option", { value: id }, shown(name || id, 80))),
    ),
  );
  const metadata = h("input", {
    id: fresh("metadata"),
    type: "text",
    value: wanted.metadata,
    placeholder: "key=value",
    spellcheck: "false",
    on: { change: (event) => set("metadata", event.target.value) },
  });
  sayNothing();
  put(
    main,
    h("h1", null, "Realignments"),
    filterForm(
      [
        ["Status", status],
        ["Reference", reference],
        ["Adapter", adapter, suggestions],
        ["Metadata", metadata, fault],
      ],
      () => list.reload(),
    ),
    choice,
    list.element,
  );
}

// Milliseconds after which the estimate of the end is asked for again.
const REFRESH = 3000;
const STAGES = [
  ["waiting", "Waiting"],
  ["fetch", "Fetch"],
  ["compare", "Compare"],
  ["score", "Score"],
  ["patch", "Patch"],
  ["publish", "Publish"],
  ["done", "Done"],
];

// They repair every module whatever its similarity, so that a repair by them does not measure it beforehand. Antidote of
// density 0 repairs none, and measures.
const UNSCORED = ["gram", "antidote"];

/** Whether a job has the stage "score". Which method runs for auto is only known once that stage was reached. */
export function isScored({ mode, method }, reached) {
  if (reached || mode === "analyze" || method.density === 0) return true;
  return ![...UNSCORED, "auto"].includes(method.type);
}

/** #/realignments/{id}: live until it has ended, then its report. */
export async function realignmentView(main, { signal, id, go }) {
  put(main, h("h1", null, "Realignment"), loading("Loading the realignment …"));
  let job = await get(`v1/realignments/${encodeURIComponent(id)}`, { signal });
  const adapter = await get(`v1/adapters/${encodeURIComponent(job.adapter_id)}`, { signal }).catch(() => null);
  const reference = await get(`v1/references/${encodeURIComponent(job.reference_id)}`, { signal }).catch(() => null);
  if (signal.aborted) return;

  document.title = `${shown(adapter?.name || "Realignment", 60)}, ${methodLine(job)} · safegraft`;
  const state = h("div", { class: "title-state" });
  const title = h(
    "h1",
    { tabindex: "-1" },
    adapter ? ["Realignment of ", named(adapter.name || adapter.id, 80)] : "Realignment",
  );
  const actions = h("div", { class: "actions" });
  const outcome = h("div");
  const progress = progressCard();
  const live = h("section", { "aria-labelledby": "progress-title" });
  const result = h("div");
  const events = h("ol", { class: "events" });
  const seen = new Set();
  let shownEnd = false;
  let counted_ = false;

  put(
    main,
    h("p", { class: "crumb" }, h("a", { href: "#/realignments" }, "Realignments")),
    h("div", { class: "title" }, title, state),
    actions,
    outcome,
    live,
    result,
    h(
      "section",
      { "aria-labelledby": "facts-title" },
      h("h2", { id: "facts-title" }, "The request"),
      facts([
        ["Id", code(job.id, "the realignment's id")],
        [
          "Adapter",
          [
            adapterLink(job.adapter_id, adapter?.name),
            adapter ? null : h("span", { class: "soft" }, ", deleted since"),
          ],
        ],
        [
          "Reference",
          reference
            ? [named(reference.name), " ", h("code", { class: "soft" }, job.reference_id)]
            : h("code", null, job.reference_id),
        ],
        ["Method", methodLine(job)],
        ["Parameters", h("code", { class: "wrap" }, shown(JSON.stringify(parametersOf(job)), 600))],
        ["Strengths", job.strengths.length ? job.strengths.join(", ") : null],
        ["Output rank", job.output_rank],
        [
          "Metadata",
          Object.keys(job.metadata).length
            ? h(
                "ul",
                { class: "chips" },
                Object.entries(job.metadata).map(([key, value]) => h("li", null, named(`${key}=${value}`, 80))),
              )
            : null,
        ],
        ["Batch", job.batch_id ? h("code", null, job.batch_id) : null],
        ["Created", time(job.created_at)],
      ]),
    ),
    h("section", { "aria-labelledby": "events-title" }, h("h2", { id: "events-title" }, "What happened"), events),
    h(
      "details",
      null,
      h("summary", null, "The same by curl"),
      command(curl(`v1/realignments/${job.id}`), "Command that shows this realignment"),
      command(
        curl(`v1/realignments/${job.id}/events`, { options: "N" }).replace("-H", "-H 'accept: text/event-stream' -H"),
        "Command that follows this realignment",
      ),
      command(curl("v1/realignments", { json: again(job) }), "Command that starts the same realignment"),
    ),
  );

  function told(event) {
    if (seen.has(event.id)) return;
    seen.add(event.id);
    events.append(
      h(
        "li",
        null,
        h("span", { class: "soft small" }, time(event.created_at)),
        h("span", null, shown(event.message, 1000)),
      ),
    );
  }

  function show() {
    put(
      state,
      badge(job.status),
      job.finished_at
        ? h(
            "span",
            { class: "soft small" },
            time(job.finished_at),
            job.started_at ? `, after ${duration(job.finished_at - job.started_at)}` : null,
          )
        : null,
    );
    if (isOpen(job)) {
      put(live, h("h2", { id: "progress-title" }, "Progress"), progress.element);
      progress.show(job);
      if (!actions.querySelector("[data-cancel]")) put(actions, cancelButton());
      if (job.status === "queued" && !counted_) countQueued();
      const stop = actions.querySelector("[data-cancel]");
      if (job.status === "cancelling") stop.setAttribute("aria-disabled", "true");
      return;
    }
    live.hidden = true;
    if (shownEnd) return;
    shownEnd = true;
    unasked(); // whether to cancel what has ended
    showEnd();
  }

  /** How many wait with it: of this tenant, which is all that a key may know. */
  async function countQueued() {
    counted_ = true;
    const page = await get("v1/realignments", { query: { status: "queued", limit: 100 }, signal }).catch(() => null);
    const older = page?.data.filter((other) => other.id !== job.id && other.created_at <= job.created_at).length ?? 0;
    if (older)
      progress.queue(
        `${older}${page.has_more ? " or more" : ""} of your own ${older === 1 ? "waits" : "wait"} before it.`,
      );
  }

  function cancelButton() {
    const cancel = actionButton(
      "Cancel",
      async () => {
        const sure = await confirmed({
          title: "Cancel this realignment?",
          text: ["It stops at the next module, and leaves no result."],
          action: "Cancel it",
        });
        if (!sure) return;
        job = await post(`v1/realignments/${job.id}/cancel`);
        say("Cancellation was asked for.");
        show();
      },
      { "data-cancel": true },
    );
    put(outcome, cancel.where);
    return cancel.button;
  }

  function showEnd() {
    const wheres = [];
    const buttons = [];
    const add = (made) => {
      buttons.push(made.button);
      wheres.push(made.where);
    };
    if (job.status === "succeeded") {
      const single = job.result.adapter_id && job.result.variants.length < 2;
      if (single) {
        const same = job.result.summary?.repaired === 0;
        add(
          actionButton(
            same ? "Download the adapter, unchanged" : "Download the patched adapter",
            async (tell) => downloadAdapter(await get(`v1/adapters/${job.result.adapter_id}`), tell),
            { class: same ? "" : "primary" },
          ),
        );
        buttons.push(h("a", { class: "button", href: `#/adapters/${job.result.adapter_id}` }, "Show it"));
      }
      for (const [form, label] of [
        ["html", "Report as HTML"],
        ["json", "JSON"],
        ["csv", "CSV"],
      ]) {
        add(
          actionButton(
            label,
            (tell) =>
              downloadFile(`v1/realignments/${job.id}/report.${form}`, `${job.id}.report.${form}`, { onState: tell }),
            { "aria-label": `Report as ${form.toUpperCase()}` },
          ),
        );
      }
    }
    if (adapter) {
      const other = () => {
        draft(job);
        go(`#/adapters/${job.adapter_id}`);
      };
      buttons.push(h("button", { type: "button", on: { click: other } }, "Other parameters"));
    }
    add(deleteButton());
    const held = actions.contains(document.activeElement);
    put(actions, buttons);
    // What had the keyboard is gone: it goes on from the top.
    if (held) title.focus();
    put(outcome, wheres);
    if (job.status === "failed") {
      const theirs = job.error.class === "user";
      put(
        result,
        errorBox(
          { ...job.error, code: job.error.code, message: job.error.message },
          { title: theirs ? "It failed: another request is needed" : "It failed on the service's side" },
        ),
        h(
          "p",
          { class: "soft" },
          theirs
            ? ["Change what the message names and start again from ", adapterLink(job.adapter_id, adapter?.name), "."]
            : `After ${counted(job.attempt, "attempt")}. The operator finds the cause in the worker's log, under this realignment's id, and can queue it again.`,
        ),
      );
    } else if (job.status === "cancelled") {
      put(result, h("div", { class: "note" }, h("p", null, "It was cancelled and left no result.")));
    } else if (job.status === "succeeded") {
      showReport();
    }
  }

  async function showReport() {
    const place = h("div", null, loading("Reading the report …"));
    put(result, place);
    try {
      const report = await get(`v1/realignments/${job.id}/report`, { signal });
      const view = reportView(report, { job, signal, changed: (now) => (job = now) });
      view.append(files(report));
      put(place, view);
    } catch (error) {
      if (!signal.aborted) put(place, errorBox(error, { title: "The report could not be read.", retry: showReport }));
    }
  }

  /** The pictures for slides, and where it all comes from: those that this report has. */
  function files(report) {
    const figures = [
      ["report.png", "Maps"],
      ["report.changes.png", "Largest changes"],
      new Set(report.layers.map(({ layer }) => layer).filter((layer) => layer !== null)).size > 1 && [
        "report.layers.png",
        "Similarity by layer",
      ],
      hasCurve(report) && ["report.strengths.png", "Strengths"],
      report.variants.length > 1 && ["report.strengths.csv", "Table of strengths"],
      ["provenance", "Provenance"],
    ].filter(Boolean);
    const made = figures.map(([path, label]) => {
      const kind = path.endsWith(".png") ? "a picture" : path.endsWith(".csv") ? "CSV" : "JSON";
      return actionButton(
        label,
        (tell) =>
          downloadFile(`v1/realignments/${job.id}/${path}`, `${job.id}.${path}${kind === "JSON" ? ".json" : ""}`, {
            onState: tell,
          }),
        { "aria-label": `${label}, as ${kind}` },
      );
    });
    return h(
      "section",
      { "aria-labelledby": "files-title" },
      h("h2", { id: "files-title" }, "For slides and records"),
      h(
        "p",
        { class: "soft" },
        "The same figures as pictures of 1920 × 1080, and what was made from what, signed where the operator has a key.",
      ),
      h(
        "div",
        { class: "actions" },
        made.map(({ button }) => button),
      ),
      made.map(({ where }) => where),
    );
  }

  function deleteButton() {
    const made = job.result
      ? [job.result.adapter_id, ...job.result.variants.map((one) => one.adapter_id)].filter(
          (one, index, all) => one && all.indexOf(one) === index,
        )
      : [];
    const box = h("input", { type: "checkbox", name: "adapters", id: fresh("box") });
    return actionButton(
      "Delete",
      async () => {
        const sure = await confirmed({
          title: "Delete this realignment?",
          text: ["Its record, events and report are deleted. This cannot be undone."],
          extra: made.length
            ? h(
                "label",
                { class: "line", for: box.id },
                box,
                made.length === 1
                  ? "Also delete the adapter that it made"
                  : `Also delete the ${made.length} adapters that it made`,
              )
            : null,
          action: "Delete it",
        });
        if (!sure) return;
        await remove(`v1/realignments/${job.id}`, { adapters: sure.adapters ? "true" : "" }).catch((error) => {
          // Another tab was faster.
          if (error.status !== 404) throw error;
        });
        say("Deleted.");
        go("#/realignments");
      },
      { class: "danger-quiet" },
    );
  }

  let asked = Date.now();

  /** What only the whole job tells: its times. */
  async function refresh() {
    asked = Date.now();
    const now = await get(`v1/realignments/${job.id}`, { signal }).catch(() => null);
    if (!now || !isOpen(job)) return;
    job = { ...job, attempt: now.attempt, started_at: now.started_at, estimated_finish: now.estimated_finish };
    show();
  }

  async function poll() {
    job = await get(`v1/realignments/${job.id}`, { signal });
    const page = await get(`v1/realignments/${job.id}/events`, { query: { limit: 100 }, signal });
    page.data.forEach(told);
    show();
  }

  show();
  if (!isOpen(job)) {
    get(`v1/realignments/${job.id}/events`, { query: { limit: 100 }, signal }).then(
      (page) => page.data.forEach(told),
      () => {},
    );
    return;
  }
  await follow(`v1/realignments/${job.id}/events`, {
    signal,
    poll,
    ended: () => !isOpen(job),
    onState: progress.connection,
    onEvent({ type, data }) {
      const body = JSON.parse(data);
      if (type !== "progress") {
        told(body);
        // A progress tells neither when the job began nor when it may end.
        if (type === "started") refresh();
        return;
      }
      if (Date.now() - asked > REFRESH) refresh();
      job = { ...job, status: isOpen(body) ? body.status : job.status, progress: body.progress };
      show();
    },
  });
  if (!signal.aborted && !isOpen(job))
    say(
      `The realignment has ${STATUS[job.status][0].toLowerCase()}.`
        .replace("has failed", "failed")
        .replace("has cancelled", "was cancelled"),
    );
}

/** The parameters that were asked for: of several strengths each job has its own. */
function parametersOf({ method, strengths }) {
  const { [strengths.length ? STRENGTH[method.type] : ""]: _, ...rest } = method;
  return rest;
}

/** The request that made a job, as far as the job tells. */
function again(job) {
  const body = { adapter_id: job.adapter_id, reference_id: job.reference_id, method: parametersOf(job) };
  if (job.mode !== "patch") body.mode = job.mode;
  if (job.strengths.length) body.strengths = job.strengths;
  if (job.output_rank !== "customer") body.output_rank = job.output_rank;
  if (Object.keys(job.metadata).length) body.metadata = job.metadata;
  return body;
}

function progressCard() {
  const steps = h(
    "ol",
    { class: "steps" },
    STAGES.slice(0, -1).map(([stage, label]) => h("li", { data: { stage } }, h("span", null, label))),
  );
  let reached = false;
  const label = fresh("progress");
  const bar = h("progress", { max: "1", value: 0, "aria-labelledby": label });
  const line = h("p", { id: label });
  const more = h("p", { class: "soft small" });
  const queue = h("p", { class: "soft small" });
  const connection = h("p", { class: "soft small connection", role: "status" });
  return {
    element: h("div", { class: "card progress-card" }, steps, bar, line, more, queue, connection),
    queue(text) {
      queue.textContent = text;
    },
    show(job) {
      const { stage, done, total } = job.progress;
      if (stage !== "waiting") queue.textContent = "";
      reached ||= stage === "score";
      steps.querySelector("[data-stage=score]").hidden = !isScored(job, reached);
      const at = STAGES.findIndex(([name]) => name === stage);
      [...steps.children].forEach((step, index) => {
        step.className = index < at ? "past" : index === at ? "now" : "";
        if (index === at) step.setAttribute("aria-current", "step");
        else step.removeAttribute("aria-current");
      });
      if (total) bar.value = done / total;
      else if (stage === "waiting") bar.value = 0;
      else bar.removeAttribute("value");
      put(
        line,
        stage === "waiting"
          ? job.status === "queued"
            ? `Waiting for a worker${job.attempt ? ", once more" : ""}.`
            : "A worker has taken it."
          : total
            ? `${STAGES[at]?.[1] ?? stage}: ${done} of ${counted(total, "module")}`
            : `${STAGES[at]?.[1] ?? stage} …`,
      );
      put(
        more,
        job.started_at ? ["Started ", time(job.started_at)] : ["Queued ", time(job.created_at)],
        job.attempt > 1 ? `, attempt ${job.attempt}` : null,
        !job.estimated_finish
          ? null
          : job.estimated_finish * 1000 > Date.now() + 1000
            ? [", expected to end ", time(job.estimated_finish)]
            : ", expected to end any moment",
      );
    },
    connection(state) {
      const text = {
        live: "Live.",
        polling: "All streams are taken: asked every two seconds.",
        waiting: "No connection. Tried again by itself; the realignment goes on without this page.",
      }[state];
      connection.textContent = text;
      connection.classList.toggle("lost", state === "waiting");
    },
  };
}
