// Elements out of data. Everything that is shown goes through text nodes and attributes: names, warnings and messages
// come out of strangers' files.

const SVG = "http://www.w3.org/2000/svg";

/** An element: h("p", {class: "soft", on: {click}}, "text", child, null). Children that are null or false are left out. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function s(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [kind, listener] of Object.entries(value)) element.addEventListener(kind, listener);
    } else if (name === "style") {
      for (const [property, text] of Object.entries(value)) element.style.setProperty(property, text);
    } else if (name === "data") {
      Object.assign(element.dataset, value);
    } else if (name.startsWith("on")) {
      throw new TypeError(`${name}: listeners go into "on".`);
    } else if (name === "value") {
      element.value = value;
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Puts children in place of what an element holds. */
export function put(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

let numbers = 0;
/** An id that no other element has. */
export function fresh(prefix) {
  return `${prefix}-${++numbers}`;
}

/** Tells screen readers what just happened. */
export function say(text) {
  const where = document.getElementById("said");
  where.textContent = "";
  // Two equal messages one after the other are only read where the first was taken away.
  requestAnimationFrame(() => (where.textContent = text));
}

/** A button that copies a text; what: "the id". */
export function copyButton(text, what) {
  const label = h("span", null, "Copy");
  return h(
    "button",
    {
      type: "button",
      class: "copy",
      "aria-label": `Copy ${what}`,
      on: {
        click: async () => {
          const done = await copy(text);
          label.textContent = done ? "Copied" : "Select it by hand";
          say(done ? `Copied ${what}.` : "The browser does not allow copying here.");
          setTimeout(() => (label.textContent = "Copy"), 2000);
        },
      },
    },
    label,
  );
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS there is no clipboard, only the older way.
    const field = h("textarea", { class: "hidden", "aria-hidden": "true", value: text });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** A code that can be copied: an id, a digest. */
export function code(text, what) {
  return h("span", { class: "copied" }, h("code", null, text), copyButton(text, what));
}

/** A command for a shell, with its own copy button. */
export function command(text, what) {
  return h("div", { class: "command" }, h("pre", { tabindex: "0", "aria-label": what }, text), copyButton(text, what));
}

/** A definition list out of [term, value] pairs; pairs without a value are left out. */
export function facts(pairs, properties) {
  return h(
    "dl",
    { class: "facts", ...properties },
    pairs
      .filter((pair) => pair && pair[1] !== null && pair[1] !== undefined && pair[1] !== false)
      .map(([term, value]) => [h("dt", null, term), h("dd", null, value)]),
  );
}

/** Asks before what cannot be undone. Resolves to null, or to the form's values by name. */
export function confirmed({ title, text, action, extra = null, danger = true }) {
  const id = fresh("dialog");
  return new Promise((resolve) => {
    const form = h(
      "form",
      { method: "dialog" },
      h("h2", { id }, title),
      text.map((line) => h("p", null, line)),
      extra,
      h(
        "div",
        { class: "actions" },
        h("button", { value: "no", type: "submit", autofocus: true }, "Keep it"),
        h("button", { value: "yes", type: "submit", class: danger ? "danger" : "primary" }, action),
      ),
    );
    const dialog = h("dialog", { "aria-labelledby": id }, form);
    // form-action is 'none' on this page; the form is never sent, also not to the dialog.
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close(event.submitter?.value ?? "no");
    });
    dialog.addEventListener("close", () => {
      const values = Object.fromEntries(
        [...form.querySelectorAll("input[type=checkbox]")].map((box) => [box.name, box.checked]),
      );
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? values : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** What was asked on a page that is left is answered with no. */
export function unasked() {
  document.querySelector("dialog[open]")?.close("no");
}

/** A line that says that something is on its way. */
export function loading(what) {
  return h("p", { class: "loading", role: "status" }, h("span", { class: "spinner", "aria-hidden": "true" }), what);
}

/** What is shown where there is nothing. */
export function empty(title, ...rest) {
  return h(
    "div",
    { class: "empty" },
    h("p", { class: "strong" }, title),
    rest.length ? h("p", { class: "soft" }, rest) : null,
  );
}

/** Waits; ends early where the signal does. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        resolve();
      },
      { once: true },
    );
  });
}
