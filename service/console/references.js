// References: what this installation can repair against, and with which methods.

import { get } from "./api.js";
import { code, empty, facts, h, loading, put } from "./dom.js";
import { count, named, size, time } from "./format.js";
import { errorBox } from "./parts.js";

/** #/references */
export async function referencesView(main, { signal }) {
  const place = h("div", null, loading("Loading references …"));
  put(
    main,
    h("h1", null, "References"),
    h(
      "p",
      { class: "lead" },
      "The operator builds one for every base model. An adapter is repaired against the reference of its own.",
    ),
    place,
  );
  try {
    const page = await get("v1/references", { signal });
    put(
      place,
      page.data.length
        ? page.data.map(card)
        : empty(
            "No reference is installed.",
            "The operator builds one with safegraft reference build and adds it with safegraft reference add.",
          ),
    );
  } catch (error) {
    if (!signal.aborted) put(place, errorBox(error, { retry: () => referencesView(main, { signal }) }));
  }
}

function card(reference) {
  const chips = (texts) =>
    h(
      "ul",
      { class: "chips" },
      texts.map((text) => h("li", null, named(text, 80))),
    );
  return h(
    "section",
    { class: "card" },
    h("h2", null, named(reference.name)),
    facts([
      ["Base model", [named(reference.base_model), ", ", named(reference.architecture, 80)]],
      ["Known labels", chips(reference.labels)],
      ["Methods", chips(reference.methods)],
      ["Lineages", chips(reference.lineages)],
      ["Size", `${count(reference.modules)} modules, ${size(reference.bytes)}`],
      ["Built", time(reference.created_at)],
      ["Id", code(reference.id, "the reference's id")],
      ["SHA-256", code(reference.sha256, "the reference's SHA-256")],
    ]),
    h(
      "p",
      null,
      h("a", { href: `#/realignments?reference_id=${encodeURIComponent(reference.id)}` }, "Realignments against it"),
    ),
  );
}
