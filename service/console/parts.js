// Pieces of pages that several views share.

import { address, advice, events } from "./api.js";
import { code, h, loading, put, say } from "./dom.js";
import { named, plain, shown } from "./format.js";

/** An error beside what it is about: the API's sentence, its code, the request's id, and what to do. */
export function errorBox(error, { title = "", retry = null } = {}) {
  const hint = advice(error);
  const box = h(
    "div",
    { class: "note fault-note", role: "alert" },
    title ? h("p", { class: "strong" }, title) : null,
    h("p", null, shown(error.message, 2000)),
    hint ? h("p", null, hint) : null,
    h(
      "p",
      { class: "soft small" },
      h("code", null, shown(error.code ?? error.name)),
      error.param ? [" at ", h("code", null, shown(error.param))] : null,
      error.requestId ? [" · request ", code(error.requestId, "the request id")] : null,
    ),
    retry ? h("button", { type: "button", on: { click: retry } }, "Try again") : null,
  );
  if (retry && error.code === "unreachable") {
    events.addEventListener("online", () => box.isConnected && retry(), { once: true });
  }
  return box;
}

export const STATUS = {
  queued: ["Queued", "wait"],
  running: ["Running", "go"],
  cancelling: ["Cancelling", "wait"],
  succeeded: ["Succeeded", "good"],
  failed: ["Failed", "bad"],
  cancelled: ["Cancelled", "off"],
};

export function badge(status) {
  const [text, kind] = STATUS[status] ?? [status, "off"];
  return h("span", { class: `badge ${kind}` }, text);
}

export function isOpen(job) {
  return ["queued", "running", "cancelling"].includes(job.status);
}

// What GET /v1/methods calls `strength_parameter`: lists do not wait for it.
export const STRENGTH = {
  nlsr: "skip_share",
  gram: "general_weight",
  safelora: "threshold",
  antidote: "density",
  safetylock: "strength",
};

/** gram 0.3, or gram, 3 strengths from 0.1 to 1: as one line. */
export function methodLine(job) {
  const { strengths, method } = job;
  const own = strengths[0] ?? method[STRENGTH[method.type]];
  const ends = [Math.min(...strengths), Math.max(...strengths)].map(plain);
  const many = strengths.length > 1 ? `, ${strengths.length} strengths from ${ends.join(" to ")}` : "";
  const chosen = job.result?.method ? `${job.result.method}, as recommended` : "recommended method";
  const what = method.type === "auto" ? chosen : method.type;
  const at = !many && typeof own === "number" ? ` ${plain(own)}` : "";
  return `${what}${at}${many}${job.mode === "analyze" ? ", measured only" : ""}`;
}

/** A link to an adapter by its name, or by its id where the name is not known. */
export function adapterLink(id, name) {
  return h("a", { href: `#/adapters/${encodeURIComponent(id)}` }, name ? named(name) : h("code", null, id));
}

/** What an action left: runs it, keeps its button busy, and shows its error in `where`. */
export function acting(button, where, work) {
  return async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    // Not `disabled`, which would throw the keyboard's focus away.
    button.setAttribute("aria-disabled", "true");
    put(where);
    try {
      await work((text) => put(where, h("span", { class: "soft small" }, text)));
    } catch (error) {
      if (error.name !== "AbortError") put(where, errorBox(error));
    } finally {
      button.removeAttribute("aria-disabled");
    }
  };
}

/** A button with a place beside it for what came of it. */
export function actionButton(label, work, properties = {}) {
  const where = h("div", { class: "outcome", "aria-live": "polite" });
  const button = h("button", { type: "button", ...properties }, label);
  button.addEventListener("click", acting(button, where, work));
  return { button, where };
}

/** What a list is narrowed by, each [label, control, …what stands below it], and a button that asks again. */
export function filterForm(fields, again) {
  return h(
    "form",
    { class: "filters", "aria-label": "Filters", on: { submit: (event) => event.preventDefault() } },
    fields.map(([label, control, ...below]) =>
      h("div", { class: "field" }, h("label", { for: control.id }, label), control, below),
    ),
    h("button", { type: "button", on: { click: again } }, "Refresh"),
  );
}

/** The address of a list with those filters that are set. */
export function withFilters(path, wanted) {
  const kept = new URLSearchParams(Object.entries(wanted).filter(([, text]) => text));
  return `${path}${kept.size ? `?${kept}` : ""}`;
}

/**
 * A list that turns pages. fetch(after) gives the API's page, row(item) an element; what is told where there is nothing.
 * isLive(item): it will change by itself, so that the list is asked again.
 */
export function pages({ fetch, row, label, nothing, signal, isLive = () => false }) {
  // Where the list was turned to is kept with the entry of the browser's history, so that going back finds it again.
  const kept = history.state?.pages;
  const before = [...(kept?.before ?? [])];
  let after = kept?.after ?? null;
  const list = h("ul", { class: "rows", "aria-label": label });
  const turn = h("nav", { class: "pager", "aria-label": `Pages of ${label}` });
  const place = h("div", { "aria-busy": "true" }, loading("Loading …"));

  let turns = 0;
  let live = false;

  /** told: what the reader of a screen hears: "page" after a turn, "again" after other filters. */
  async function show(told = "") {
    const turned = ++turns;
    place.setAttribute("aria-busy", "true");
    try {
      const page = await fetch(after);
      // An answer that was overtaken by a later question is none.
      if (signal.aborted || turned !== turns) return;
      // What was on this page was deleted since; the first one knows whether there is anything at all.
      if (!page.data.length && before.length) return restart();
      put(
        list,
        page.data.map((item) => h("li", null, row(item))),
      );
      const back = h(
        "button",
        {
          type: "button",
          "aria-disabled": !before.length && "true",
          // Until the page asked for is there, its buttons are the last one's.
          on: { click: () => before.length && turned === turns && go(before.pop()) },
        },
        "← Newer",
      );
      const on = h(
        "button",
        {
          type: "button",
          "aria-disabled": !page.has_more && "true",
          on: {
            click: () => {
              if (page.has_more && turned === turns) {
                before.push(after);
                go(page.last_id);
              }
            },
          },
        },
        "Older →",
      );
      const held = [...turn.querySelectorAll("button")].indexOf(document.activeElement);
      put(
        turn,
        before.length || page.has_more ? [back, h("span", { class: "soft" }, `Page ${before.length + 1}`), on] : [],
      );
      put(place, page.data.length ? [list, turn] : nothing);
      if (held >= 0) turn.querySelectorAll("button")[held]?.focus();
      live = page.data.some(isLive);
      if (told) say(page.data.length ? `Page ${before.length + 1}, ${page.data.length} entries.` : nothing.textContent);
      if (told === "page") place.scrollIntoView({ block: "nearest" });
    } catch (error) {
      if (!signal.aborted && turned === turns)
        put(place, errorBox(error, { title: `The list of ${label} could not be read.`, retry: () => show() }));
    } finally {
      place.removeAttribute("aria-busy");
    }
  }

  function go(to) {
    after = to;
    history.replaceState({ pages: { before, after } }, "");
    show("page");
  }

  function restart() {
    // A field that loses the focus because its page is left still tells that it changed.
    if (signal.aborted) return;
    before.length = 0;
    after = null;
    history.replaceState(null, "");
    return show("again");
  }

  show();
  every(AGAIN_SECONDS, signal, () => live && !isUsed(place) && show());
  return { element: place, reload: () => show(), restart };
}

// After so many seconds a list is asked again in which something is going on.
export const AGAIN_SECONDS = 5;

/** Does something again and again while its page is looked at. */
export function every(seconds, signal, work) {
  const timer = setInterval(() => !document.hidden && work(), seconds * 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

/** Whether somebody's keyboard or selection is in there: what is replaced then would be lost. */
export function isUsed(element) {
  const selection = getSelection();
  return element.contains(document.activeElement) || (!selection.isCollapsed && element.contains(selection.anchorNode));
}

/** The first part of a curl command against this service; the key stays a variable. */
export function curl(path, { json = null, options = "" } = {}) {
  const lines = [`curl -s${options} "${address(path).href}"`, `-H "authorization: Bearer $KEY"`];
  if (json) lines.push("-H 'content-type: application/json'", `-d '${JSON.stringify(json).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}
