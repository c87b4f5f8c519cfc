// Adapters: the drop zone, the list, and what one adapter is.

import { ApiError, events, get, remove } from "./api.js";
import { code, command, confirmed, copyButton, empty, facts, fresh, h, loading, put, say } from "./dom.js";
import { downloadAdapter, downloadFile } from "./download.js";
import { count, counted, duration, named, percent, plain, shown, size, time } from "./format.js";
import {
  AGAIN_SECONDS,
  actionButton,
  adapterLink,
  badge,
  curl,
  errorBox,
  every,
  filterForm,
  isUsed,
  methodLine,
  pages,
  withFilters,
} from "./parts.js";
import { startForm } from "./start.js";
import { NoAdapter, chosen, deliver, dropped, judged, refuses, unfinished } from "./upload.js";

// The upload under way and what became of the last one. Not a page's: it goes on while others are looked at.
const upload = { running: null, state: h("div", { class: "upload-state" }) };
addEventListener("beforeunload", (event) => {
  if (upload.running) event.preventDefault();
});
// Whoever signs in next is told nothing of the last one's upload.
const LEFT = new DOMException("Signed out.", "AbortError");
const isLeft = (signal) => signal.reason === LEFT;
events.addEventListener("left", () => {
  upload.running?.abort(LEFT);
  put(upload.state);
});

/** #/: drop an adapter, and what goes on. */
export function homeView(main, { signal, go }) {
  put(
    main,
    h("h1", null, "Repair an adapter"),
    h(
      "p",
      { class: "lead" },
      "Drop the folder that PEFT saved. It is checked on arrival; you choose what to do with it on the next page.",
    ),
    dropZone({ signal, go }),
    h("div", { class: "columns" }, openJobs(signal), recent(signal)),
  );
}

/** The drop zone, with what became of the last drop inside of it. */
function dropZone({ signal, go }) {
  const folder = h("input", {
    type: "file",
    webkitdirectory: true,
    class: "hidden",
    tabindex: "-1",
    "aria-hidden": "true",
  });
  const archive = h("input", {
    type: "file",
    accept: ".tar,.zip",
    class: "hidden",
    tabindex: "-1",
    "aria-hidden": "true",
  });
  const { state } = upload;
  if (!upload.running && !state.hasChildNodes()) {
    const left = unfinished();
    if (left.length)
      put(
        state,
        h(
          "p",
          { class: "soft" },
          "Not sent to its end: ",
          named(left.map(({ name, bytes }) => `${name} (${size(bytes)})`).join(", "), 300),
          ". Drop the same files again and it goes on where it was.",
        ),
      );
  }
  const zone = h(
    "section",
    { class: upload.running ? "drop busy" : "drop", "aria-labelledby": "drop-title" },
    h("h2", { id: "drop-title" }, "Drop an adapter here"),
    h(
      "p",
      { class: "soft" },
      "A folder with ",
      h("code", null, "adapter_config.json"),
      " and ",
      h("code", null, "adapter_model.safetensors"),
      ", or one .tar or .zip of it.",
    ),
    h(
      "div",
      { class: "actions center" },
      h("button", { type: "button", class: "primary", on: { click: () => folder.click() } }, "Choose a folder"),
      h("button", { type: "button", on: { click: () => archive.click() } }, "Choose an archive"),
    ),
    folder,
    archive,
    state,
  );

  async function take(reading) {
    if (upload.running) return say("An upload is under way.");
    const here = (upload.running = new AbortController());
    zone.classList.add("busy");
    const view = progressView(() => here.abort());
    let label = "";
    try {
      put(state, loading("Looking at what was dropped …"));
      const items = await reading;
      label = items.length ? items[0].path.split("/")[0] : "";
      const delivery = judged(items);
      ({ label } = delivery);
      put(state, view.element);
      view.begin(delivery);
      view.tell({
        phase: "sending",
        hashes: [],
        sent: 0,
        resumed: 0,
        total: delivery.files.reduce((sum, file) => sum + file.size, 0),
      });
      say(`Uploading ${shown(label || "the adapter")}.`);
      const name = shown(label, 200);
      const adapter = await deliver({ ...delivery, name }, { onState: view.tell, signal: here.signal });
      if (isLeft(here.signal)) return;
      if (delivery.left.length)
        sessionStorage.setItem(`safegraft.left.${adapter.id}`, JSON.stringify(delivery.left.slice(0, 200)));
      put(state);
      if (signal.aborted) {
        // Another page is looked at: it is not taken away.
        put(state, h("p", null, adapterLink(adapter.id, adapter.name), " has arrived."));
        say(`${shown(adapter.name || "The adapter")} has arrived.`);
        return;
      }
      say("The adapter is ready.");
      go(`#/adapters/${adapter.id}`);
    } catch (error) {
      if (isLeft(here.signal)) return;
      if (error.name === "AbortError" || here.signal.aborted) {
        put(state, h("p", { class: "soft" }, "Stopped. Drop the same files again and it goes on where it was."));
      } else {
        const refused = refuses(error);
        const title =
          error instanceof NoAdapter || refused
            ? `${label ? shown(label) : "This"} cannot be taken`
            : "The upload did not get through";
        const more =
          error instanceof ApiError && !refused
            ? h("p", { class: "soft" }, "Drop the same files again and it goes on where it was.")
            : null;
        put(state, errorBox(error, { title }), more);
        if (signal.aborted) say(title);
        else state.scrollIntoView({ block: "nearest" });
      }
    } finally {
      state.closest(".drop")?.classList.remove("busy");
      folder.value = archive.value = "";
      if (upload.running === here) upload.running = null;
    }
  }

  let over = 0;
  const withFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  zone.addEventListener("dragenter", (event) => {
    if (withFiles(event)) {
      over++;
      zone.classList.add("over");
    }
  });
  zone.addEventListener("dragleave", () => {
    if (--over <= 0) {
      over = 0;
      zone.classList.remove("over");
    }
  });
  // A file that is dropped beside the zone would otherwise replace the page.
  addEventListener(
    "dragover",
    (event) => {
      if (withFiles(event)) event.preventDefault();
    },
    { signal },
  );
  addEventListener(
    "drop",
    (event) => {
      if (!withFiles(event)) return;
      event.preventDefault();
      over = 0;
      zone.classList.remove("over");
      take(dropped(event.dataTransfer));
    },
    { signal },
  );
  folder.addEventListener("change", () => folder.files.length && take(Promise.resolve(chosen(folder.files))));
  archive.addEventListener("change", () => archive.files.length && take(Promise.resolve(chosen(archive.files))));
  return zone;
}

function progressView(stop) {
  const title = h("p", { class: "strong" });
  const bar = h("progress", { max: "1", value: 0, "aria-label": "Sent" });
  const line = h("p", { class: "soft small" });
  const left = h("p", { class: "soft small" });
  const cancel = h("button", { type: "button", on: { click: stop } }, "Stop");
  const began = performance.now();
  return {
    element: h("div", { class: "uploading" }, title, bar, line, left, cancel),
    begin(delivery) {
      const what =
        delivery.kind === "archive"
          ? named(delivery.files[0].name)
          : [named(delivery.label || "The folder"), `, ${counted(delivery.files.length, "file")}`];
      put(title, what);
      if (delivery.left.length)
        put(
          left,
          `Not sent, because the service would not keep it: ${shown(delivery.left.slice(0, 3).join(", "), 120)}${delivery.left.length > 3 ? ` and ${delivery.left.length - 3} more` : ""}.`,
        );
    },
    tell({ phase, sent, total, resumed, note, hashes }) {
      bar.value = total ? sent / total : 0;
      const rate = (sent - resumed) / ((performance.now() - began) / 1000);
      const rest = rate > 0 ? (total - sent) / rate : Infinity;
      const again = resumed ? `, ${size(resumed)} were there already` : "";
      const digests = hashes.map(({ name, sha256 }) =>
        h("code", { class: "block" }, `${sha256.slice(0, 16)}…  ${shown(name, 60)}`),
      );
      if (phase === "reading") {
        bar.removeAttribute("value");
        put(line, "Hashed and sent. The service reads it and checks every key and value …", digests);
      } else if (phase === "waiting") {
        put(line, h("strong", null, "Waiting for the connection. "), `${shown(note)} It goes on by itself.`);
      } else {
        put(
          line,
          `${percent(total ? sent / total : 0)} of ${size(total)}, hashed while it is sent${again}${rest > 3 && Number.isFinite(rest) ? `; ${duration(rest)} left` : ""}`,
          digests,
        );
      }
    },
  };
}

function openJobs(signal) {
  const place = h("div", null, loading("Loading …"));
  const counts = h("span", { class: "soft" });
  let live = false;
  async function ask() {
    try {
      const [names, running, queued, last] = await Promise.all([
        adapterNames(signal),
        get("v1/realignments", { query: { status: "running", limit: 5 }, signal }),
        get("v1/realignments", { query: { status: "queued", limit: 100 }, signal }),
        get("v1/realignments", { query: { limit: 5 }, signal }),
      ]);
      const open = [...running.data, ...queued.data.slice(0, 5)];
      live = open.length > 0;
      put(
        counts,
        ` ${running.data.length}${running.has_more ? "+" : ""} running, ${queued.data.length}${queued.has_more ? "+" : ""} queued`,
      );
      const shownJobs = [...open, ...last.data.filter((job) => !open.some(({ id }) => id === job.id))].slice(0, 6);
      put(
        place,
        shownJobs.length
          ? h(
              "ul",
              { class: "rows tight" },
              shownJobs.map((job) => h("li", null, jobRow(job, names))),
            )
          : empty("No realignments yet.", "They appear here once an adapter has been started."),
      );
    } catch (error) {
      if (!signal.aborted) put(place, errorBox(error, { retry: ask }));
    }
  }
  ask();
  every(AGAIN_SECONDS, signal, () => live && !isUsed(place) && ask());
  return h(
    "section",
    { "aria-labelledby": "open-title" },
    h("h2", { id: "open-title" }, "Realignments", counts),
    place,
    h("p", null, h("a", { href: "#/realignments" }, "All realignments")),
  );
}

function recent(signal) {
  const place = h("div", null, loading("Loading …"));
  (async () => {
    try {
      const page = await get("v1/adapters", { query: { limit: 6 }, signal });
      put(
        place,
        page.data.length
          ? h(
              "ul",
              { class: "rows tight" },
              page.data.map((adapter) => h("li", null, adapterRow(adapter))),
            )
          : empty("No adapters yet.", "The first one is dropped above."),
      );
    } catch (error) {
      if (!signal.aborted) put(place, errorBox(error));
    }
  })();
  return h(
    "section",
    { "aria-labelledby": "recent-title" },
    h("h2", { id: "recent-title" }, "Adapters"),
    place,
    h("p", null, h("a", { href: "#/adapters" }, "All adapters")),
  );
}

function adapterRow(adapter) {
  return h(
    "div",
    { class: "row" },
    h(
      "div",
      { class: "what" },
      adapterLink(adapter.id, adapter.name || adapter.id),
      h("div", { class: "soft small" }, adapter.base_model ? named(adapter.base_model, 60) : "no label for its base"),
    ),
    h(
      "div",
      { class: "meta small" },
      h("span", null, `rank ${adapter.rank}`),
      h("span", null, size(adapter.bytes)),
      adapter.origin.realignment_id
        ? h("span", { class: "tag" }, adapter.origin.unchanged ? "unchanged" : "repaired")
        : null,
    ),
    h("div", { class: "when soft small" }, time(adapter.created_at)),
  );
}

/** Names of the newest adapters by id, so that jobs, which only know ids, can be told apart. */
export async function adapterNames(signal) {
  const page = await get("v1/adapters", { query: { limit: 100 }, signal }).catch(() => ({ data: [] }));
  return new Map(page.data.map(({ id, name }) => [id, name]));
}

/** One line of a list of jobs. */
export function jobRow(job, names = new Map()) {
  const about = names.get(job.adapter_id);
  const progress =
    job.status === "running" && job.progress.total
      ? ` ${percent(job.progress.done / job.progress.total)} of ${job.progress.stage}`
      : "";
  return h(
    "div",
    { class: "row" },
    h(
      "div",
      { class: "what" },
      h("a", { href: `#/realignments/${job.id}` }, about ? [named(about, 80), ", ", methodLine(job)] : methodLine(job)),
      h("div", { class: "soft small" }, h("code", null, job.id), about ? null : [" · ", adapterLink(job.adapter_id)]),
    ),
    h(
      "div",
      { class: "meta small" },
      badge(job.status),
      progress ? h("span", { class: "soft" }, progress) : null,
      job.error ? h("span", { class: "soft" }, job.error.code) : null,
      job.result?.evaluation?.caution ? h("span", { class: "tag caution" }, "its evaluation speaks against it") : null,
    ),
    h("div", { class: "when soft small" }, time(job.finished_at ?? job.started_at ?? job.created_at)),
  );
}

const ORIGINS = [
  ["", "Any"],
  ["uploaded", "Uploaded"],
  ["realigned", "Made by a realignment"],
];

/** #/adapters?name=…: newest first. */
export function adaptersView(main, { signal, query, replace }) {
  const wanted = Object.fromEntries(["name", "base_model", "origin"].map((key) => [key, query.get(key) ?? ""]));
  const nothing = h("div");
  const list = pages({
    fetch: (after) => get("v1/adapters", { query: { limit: 20, after, ...wanted }, signal }),
    row: adapterRow,
    label: "adapters",
    nothing,
    signal,
  });
  const sayNothing = () =>
    put(
      nothing,
      Object.values(wanted).some(Boolean)
        ? empty("No adapter matches these filters.")
        : empty("No adapters yet.", h("a", { href: "#/" }, "Drop the first one")),
    );
  function set(key, value) {
    wanted[key] = value.trim();
    replace(withFilters("#/adapters", wanted));
    sayNothing();
    list.restart();
  }
  const text = (key, placeholder) =>
    h("input", {
      id: fresh(key),
      type: "text",
      value: wanted[key],
      placeholder,
      spellcheck: "false",
      on: { change: (event) => set(key, event.target.value) },
    });
  const origin = h(
    "select",
    { id: fresh("origin"), on: { change: (event) => set("origin", event.target.value) } },
    ORIGINS.map(([value, label]) => h("option", { value, selected: wanted.origin === value }, label)),
  );
  sayNothing();
  put(
    main,
    h("h1", null, "Adapters"),
    h("p", { class: "lead" }, "What was uploaded, and what realignments made of it. Newest first."),
    filterForm(
      [
        ["Name", text("name", "a part of it")],
        ["Base model", text("base_model", "its label, exactly")],
        ["Origin", origin],
      ],
      () => list.reload(),
    ),
    list.element,
  );
}

const SERVERS = [
  ["peft", "PEFT"],
  ["vllm", "vLLM"],
  ["lorax", "LoRAX"],
  ["tgi", "TGI"],
];

/** #/adapters/{id} */
export async function adapterView(main, { signal, id, go }) {
  put(main, h("h1", null, "Adapter"), loading("Loading the adapter …"));
  const [adapter, references, jobs] = await Promise.all([
    get(`v1/adapters/${encodeURIComponent(id)}`, { signal }),
    get("v1/references", { signal }),
    get("v1/realignments", { query: { adapter_id: id, limit: 100 }, signal }),
  ]);
  if (signal.aborted) return;
  document.title = `${shown(adapter.name || "Adapter", 60)} · safegraft`;
  const form = h("div", null, loading("Loading methods and references …"));
  put(
    main,
    h("p", { class: "crumb" }, h("a", { href: "#/adapters" }, "Adapters")),
    h("h1", null, named(adapter.name || "Adapter without a name")),
    h("p", { class: "lead" }, sentence(adapter)),
    spokenAgainst(adapter, signal),
    warnings(adapter, references.data),
    h(
      "section",
      { class: "split", "aria-label": "What it is" },
      h(
        "div",
        null,
        h("h2", null, "What it is"),
        facts([
          [
            "Base model",
            adapter.base_model
              ? [named(adapter.base_model), h("div", { class: "soft small" }, "the label in its configuration")]
              : "no label",
          ],
          ["Rank, alpha", `${adapter.rank}, ${plain(adapter.alpha)}`],
          [
            "Targets",
            h(
              "ul",
              { class: "chips" },
              adapter.target_modules.map((kind) => h("li", null, named(kind, 60))),
            ),
          ],
          ["Modules", `${count(adapter.modules)} with ${count(adapter.parameters)} parameters, ${adapter.dtype}`],
          ["Lineage", lineageOf(adapter, jobs.data, signal)],
          [
            "Origin",
            adapter.origin.realignment_id
              ? [
                  "made by ",
                  h(
                    "a",
                    { href: `#/realignments/${adapter.origin.realignment_id}` },
                    h("code", null, adapter.origin.realignment_id),
                  ),
                ]
              : "uploaded",
          ],
          ["Created", time(adapter.created_at)],
          ["Deleted", adapter.expires_at ? time(adapter.expires_at) : null],
          ["Id", code(adapter.id, "the adapter's id")],
        ]),
      ),
      h(
        "div",
        null,
        h("h2", null, "Where it loads"),
        h(
          "ul",
          { class: "servers" },
          SERVERS.map(([key, label]) => {
            const { ok, reason } = adapter.compatibility[key];
            return h(
              "li",
              null,
              h("span", { class: `mark ${ok ? "good" : "bad"}`, "aria-hidden": "true" }, ok ? "✓" : "✕"),
              h(
                "div",
                null,
                h("span", { class: "strong" }, label),
                h("span", { class: "hidden" }, ok ? " loads it." : " does not load it."),
                reason ? h("div", { class: "soft small" }, shown(reason)) : null,
              ),
            );
          }),
        ),
        h("p", { class: "soft small" }, "As far as its configuration and keys tell."),
      ),
    ),
    h("section", { id: "start", "aria-labelledby": "start-title" }, h("h2", { id: "start-title" }, "Realign it"), form),
    jobsSection(adapter, jobs, signal),
    filesSection(adapter, go),
  );
  if (references.data.length) startForm(form, { adapter, references: references.data, signal, go });
  else put(form, empty("Nothing can be started without a reference."));
}

function sentence(adapter) {
  const what = `A LoRA adapter of rank ${adapter.rank} on ${counted(adapter.modules, "module")}, ${size(adapter.bytes)}`;
  return adapter.base_model ? [`${what}, for `, named(adapter.base_model, 80), "."] : `${what}.`;
}

/** What was measured against serving what a realignment made: whoever downloads it here may not have seen its report. */
function spokenAgainst(adapter, signal) {
  const place = h("div");
  const made = adapter.origin.realignment_id;
  if (made && !adapter.origin.unchanged) {
    get(`v1/realignments/${made}`, { signal }).then(
      ({ result }) => {
        const caution = result?.adapter_id === adapter.id ? result.evaluation?.caution : null;
        if (caution) {
          const report = h("a", { href: `#/realignments/${made}` }, "The report");
          put(place, h("p", { class: "note caution strong" }, shown(caution, 600), " ", report, " tells more."));
        }
      },
      () => {},
    );
  }
  return place;
}

function warnings(adapter, references) {
  const left = JSON.parse(sessionStorage.getItem(`safegraft.left.${adapter.id}`) ?? "[]");
  const dropped_ = [...adapter.dropped_files, ...left];
  const known = references.some((reference) => reference.labels.includes(adapter.base_model));
  const lines = [
    !references.length &&
      "No reference is installed, so nothing can be realigned yet. The operator adds one with safegraft reference add.",
    references.length > 0 &&
      !known &&
      !adapter.origin.realignment_id && [
        "No installed reference knows the label of its base model. If names and shapes of its layers fit, it can be realigned all the same; make sure that it was trained on the reference's model.",
      ],
    dropped_.length > 0 && [
      `${counted(dropped_.length, "file")} ${dropped_.length === 1 ? "was" : "were"} left out, because only weights, configuration, tokenizer, chat template and README travel, never code or pickles: `,
      named(dropped_.slice(0, 8).join(", ") + (dropped_.length > 8 ? " …" : ""), 400),
    ],
    !adapter.compatibility.peft.ok && [
      "PEFT, as most people run it, does not load this adapter as it is: ",
      shown(adapter.compatibility.peft.reason ?? ""),
      ".",
    ],
    adapter.origin.unchanged && [
      "Its weights are those of the adapter that came, byte for byte: the ",
      h("a", { href: `#/realignments/${adapter.origin.realignment_id}` }, "realignment"),
      " repaired nothing in it, or delivered its repair in a side-car file beside it.",
    ],
    adapter.expires_at && ["It is deleted ", time(adapter.expires_at), ", as the operator keeps adapters."],
  ].filter(Boolean);
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

function lineageOf(adapter, jobs, signal) {
  const measured = jobs.find((job) => job.status === "succeeded");
  if (!measured) {
    return [
      "not measured yet",
      h(
        "div",
        { class: "soft small" },
        "Only the weights tell whether it was trained further from the provider's adapter (continued) or on top of the aligned model (fresh). The first realignment, or a mere measurement, says it.",
      ),
    ];
  }
  const place = h("span", null, "…");
  get(`v1/realignments/${measured.id}/report`, { signal }).then(
    (report) =>
      put(
        place,
        h("span", { class: "strong" }, report.lineage),
        LINEAGE[report.lineage] ?? "",
        h(
          "div",
          { class: "soft small" },
          "measured by ",
          h("a", { href: `#/realignments/${measured.id}` }, h("code", null, measured.id)),
        ),
      ),
    () => put(place, "the report that measured it cannot be read"),
  );
  return place;
}

const LINEAGE = {
  continued: ": trained further from the provider's aligned adapter",
  fresh: ": taken to have been trained on top of the aligned model",
  foreign: ": like fresh, but its label for the base model is unknown to the reference",
};

function jobsSection(adapter, jobs, signal) {
  if (!jobs.data.length) return null;
  return h(
    "section",
    { "aria-labelledby": "jobs-title" },
    h("h2", { id: "jobs-title" }, "Its realignments"),
    h(
      "ul",
      { class: "rows" },
      jobs.data.slice(0, 10).map((job) => h("li", null, jobRow(job, new Map([[adapter.id, adapter.name]])))),
    ),
    jobs.data.length > 10
      ? h("p", null, h("a", { href: `#/realignments?adapter_id=${adapter.id}` }, "All of them"))
      : null,
  );
}

function filesSection(adapter, go) {
  const whole = actionButton("Download (.tar)", (tell) => downloadAdapter(adapter, tell), { class: "primary" });
  const gone = actionButton(
    "Delete adapter",
    async () => {
      const sure = await confirmed({
        title: "Delete this adapter?",
        text: [
          `${shown(adapter.name || adapter.id)} and its bytes are deleted. This cannot be undone.`,
          "Reports of realignments stay; realignments that still need it fail.",
        ],
        action: "Delete it",
      });
      if (!sure) return;
      await remove(`v1/adapters/${adapter.id}`);
      say("Deleted.");
      go("#/adapters");
    },
    { class: "danger-quiet" },
  );
  return h(
    "section",
    { "aria-labelledby": "files-title" },
    h("h2", { id: "files-title" }, "Files"),
    h(
      "ul",
      { class: "rows" },
      adapter.files.map((file) => {
        const one = actionButton(
          "Download",
          (tell) =>
            downloadFile(`v1/adapters/${adapter.id}/files/${encodeURIComponent(file.name)}`, file.name, {
              bytes: file.bytes,
              sha256: file.sha256,
              onState: tell,
              elsewhere: "Download the whole adapter, or use curl -L.",
            }),
          { class: "small", "aria-label": `Download ${shown(file.name)}` },
        );
        return h(
          "li",
          null,
          h(
            "div",
            { class: "row file" },
            h(
              "div",
              { class: "what" },
              h("code", null, shown(file.name)),
              h(
                "div",
                { class: "soft small digest" },
                h("code", null, `sha256:${file.sha256}`),
                copyButton(file.sha256, `the SHA-256 of ${shown(file.name)}`),
              ),
            ),
            h("div", { class: "meta small" }, size(file.bytes)),
            h("div", { class: "when" }, one.button),
          ),
          one.where,
        );
      }),
    ),
    h("div", { class: "actions" }, whole.button, gone.button),
    whole.where,
    gone.where,
    h(
      "details",
      null,
      h("summary", null, "The same by curl"),
      command(
        curl(`v1/adapters/${adapter.id}/download`, { options: `o ${adapter.id}.tar` }),
        "Command that downloads the adapter",
      ),
    ),
  );
}
