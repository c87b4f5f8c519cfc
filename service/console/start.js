// The form that starts a realignment: reference, method and strength, with the recommendation chosen beforehand.

import { get, post, randomName } from "./api.js";
import { command, fresh, h, put, say } from "./dom.js";
import { named, plain, shown } from "./format.js";
import { curl, errorBox } from "./parts.js";

const MOST_STRENGTHS = 16;
const DRAFT = "safegraft.draft.";

/** Has the form of a job's adapter begin with what that job was asked. */
export function draft({ adapter_id, reference_id, method, strengths, mode, output_rank, metadata }) {
  const { type, ...values } = method;
  const kept = {
    reference: reference_id,
    method: type,
    values: Object.fromEntries(
      Object.entries(values)
        .filter(([, value]) => value !== null)
        .map(([name, value]) => [name, String(value)]),
    ),
    several: strengths.length > 0,
    lists: strengths.length ? { [type]: strengths.join(", ") } : {},
    mode,
    output_rank,
    metadata: Object.entries(metadata)
      .map(([name, value]) => `${name}=${value}`)
      .join("\n"),
  };
  sessionStorage.setItem(DRAFT + adapter_id, JSON.stringify(kept));
}

/** Fills `place` with the form. */
export async function startForm(place, { adapter, references, signal, go }) {
  let methods;
  try {
    methods = (await get("v1/methods", { signal })).data;
  } catch (error) {
    if (!signal.aborted)
      put(place, errorBox(error, { retry: () => startForm(place, { adapter, references, signal, go }) }));
    return;
  }
  if (signal.aborted) return;
  const own = references.filter((reference) => reference.labels.includes(adapter.base_model));
  const state = {
    reference: own.length === 1 ? own[0].id : references.length === 1 ? references[0].id : "",
    method: "",
    values: {},
    several: false,
    lists: {},
    mode: "patch",
    output_rank: "customer",
    name: "",
    metadata: "",
  };
  // One name for all attempts to send the same form, so that a lost answer makes no second job.
  let attempt = randomName();
  const attempted = recall(adapter.id, state, { references, methods });

  const errors = { reference: h("div"), method: h("div"), strength: h("div"), form: h("div") };
  const referenceHelp = h("p", { class: "soft small", id: fresh("help") });
  const methodPlace = h("div", { class: "choices" });
  const methodHelp = h("p", { class: "soft small" });
  const strengthPlace = h("div");
  const moreFields = h("div", { class: "parameters" });
  const shell = h("div");
  // Where numbers are typed, as the form stands: {name, schema, input, fault}.
  let strengthNumbers = [];
  let moreNumbers = [];

  function offered() {
    const chosen = references.filter(({ id }) => !state.reference || id === state.reference);
    return new Set(chosen.flatMap((reference) => reference.methods));
  }

  function recommended() {
    const there = offered();
    return methods.find((method) => method.default && there.has(method.id))?.id ?? "auto";
  }

  function current() {
    return methods.find(({ id }) => id === state.method) ?? null;
  }

  /** Another method has other parameters: what was typed for the last one is not sent to it. */
  function choose(id) {
    if (id === state.method) return;
    state.method = id;
    state.values = {};
  }

  /** The fields whose text is no number, as errors that know their field. */
  function badNumbers() {
    return [...(state.several ? [] : strengthNumbers), ...moreNumbers]
      .map((field_) => {
        const problem = numberProblem(field_);
        return problem ? Object.assign(new Error(problem), { code: "bad_number", field: field_ }) : null;
      })
      .filter(Boolean);
  }

  function request() {
    const [bad] = badNumbers();
    if (bad) throw bad;
    const method = { type: state.method };
    const schema = current()?.parameters.properties ?? {};
    for (const [name, text] of Object.entries(state.values)) {
      const value = valueOf(schema[name], text);
      if (value !== undefined && value !== schema[name].default) method[name] = value;
    }
    const body = { adapter_id: adapter.id, method };
    if (state.reference) body.reference_id = state.reference;
    if (state.mode !== "patch") body.mode = state.mode;
    const parameter = current()?.strength_parameter;
    if (parameter && state.several) {
      body.strengths = numbersOf(state.lists[state.method] ?? "");
      const wrong = body.strengths.find((value) => !isWithin(schema[parameter], value));
      if (wrong !== undefined)
        throw Object.assign(
          new Error(`${plain(wrong)} is no ${parameter}: that goes from ${rangeOf(schema[parameter])}.`),
          {
            code: "bad_strengths",
          },
        );
      delete method[parameter];
    }
    if (state.output_rank !== "customer") body.output_rank = state.output_rank;
    if (state.name.trim()) body.name = state.name.trim();
    const metadata = pairsOf(state.metadata);
    if (Object.keys(metadata).length) body.metadata = metadata;
    return body;
  }

  function changed() {
    attempt = randomName();
    try {
      put(shell, command(curl("v1/realignments", { json: request() }), "Command that starts the same realignment"));
    } catch (error) {
      put(shell, h("p", { class: "soft" }, error.message));
    }
  }

  function showReference() {
    const chosen = references.find(({ id }) => id === state.reference);
    let text;
    if (!chosen) {
      text =
        own.length > 1
          ? `${own.length} references know this base model. The service takes the operator's default, or asks you to choose.`
          : "The service takes the installed reference whose layers fit.";
    } else if (chosen.labels.includes(adapter.base_model)) {
      text = [
        own.length === 1 ? "Recommended: it" : "It",
        " was built for ",
        named(adapter.base_model ?? "", 80),
        ", the adapter's own label for its base.",
      ];
    } else {
      text = [
        "It was built for ",
        named(chosen.base_model, 80),
        ", which is not the adapter's label for its base. The service checks names and shapes of all layers before it starts.",
      ];
    }
    put(referenceHelp, text);
  }

  function showMethods() {
    const best = recommended();
    if (!state.method || (state.method !== "auto" && !offered().has(state.method))) choose(best);
    const name = fresh("method");
    const choice = (id, title, description, { off = "", tag = "" } = {}) => {
      const help = fresh("help");
      const input = h("input", {
        type: "radio",
        name,
        value: id,
        id: fresh("choice"),
        checked: state.method === id,
        disabled: Boolean(off),
        "aria-describedby": help,
      });
      input.addEventListener("change", () => {
        choose(id);
        showStrength();
        showMore();
        changed();
        put(errors.method);
        put(errors.strength);
      });
      return h(
        "label",
        { class: `choice${off ? " off" : ""}` },
        input,
        h(
          "span",
          null,
          h("span", { class: "strong" }, title),
          tag ? h("span", { class: "tag" }, tag) : null,
          h("span", { class: "soft small block", id: help }, off || description),
        ),
      );
    };
    const there = offered();
    put(
      methodHelp,
      best === "auto"
        ? "Recommended: let the service choose, because this reference does not offer the method that it would take first. It takes the first that serves the adapter."
        : [
            h("strong", null, best),
            " is recommended: it is what the service takes first wherever a reference offers it, by what was measured on repaired adapters. The report says what is recommended for this adapter, and why, once its weights were read.",
          ],
    );
    const order = [...methods].sort((a, b) => (b.id === best) - (a.id === best));
    put(
      methodPlace,
      order.map((method) =>
        choice(method.id, method.id, shown(method.description, 300), {
          off: there.has(method.id) || method.id === "none" ? "" : "This reference was not built for it.",
          tag: method.id === best ? "Recommended" : "",
        }),
      ),
      choice(
        "auto",
        "Let the service choose",
        "It takes the recommended method once it has read the weights; the report says which, and why. Strength and parameters are then that method's own.",
        { tag: best === "auto" ? "Recommended" : "" },
      ),
    );
  }

  function showStrength() {
    const method = current();
    const parameter = method?.strength_parameter;
    put(errors.strength);
    strengthNumbers = [];
    if (!parameter) {
      state.several = false;
      put(
        strengthPlace,
        h(
          "p",
          { class: "soft" },
          method
            ? "This method has no strength."
            : "The method's own. To set it, or to compare several, name a method above.",
        ),
      );
      return;
    }
    const schema = method.parameters.properties[parameter];
    const help = fresh("help");
    const one = h("input", {
      type: "number",
      id: fresh("strength"),
      class: "short",
      step: "any",
      min: schema.minimum,
      max: schema.maximum,
      value: state.values[parameter] ?? schema.default,
      "aria-describedby": help,
      inputmode: "decimal",
    });
    const number_ = { name: parameter, schema, input: one, fault: errors.strength };
    strengthNumbers.push(number_);
    one.addEventListener("input", () => {
      state.values[parameter] = one.value;
      unmark(number_);
      changed();
    });
    // What was typed for a method stays, whatever else is chosen in between.
    state.lists[method.id] ??= suggestion(schema).join(", ");
    const many = h("input", {
      type: "text",
      id: fresh("strengths"),
      value: state.lists[method.id],
      "aria-describedby": help,
      inputmode: "decimal",
      "aria-label": `Values of ${parameter}, with commas between them`,
    });
    many.addEventListener("input", () => {
      state.lists[method.id] = many.value;
      changed();
    });
    const name = fresh("several");
    const switchTo = (several) => {
      state.several = several;
      one.disabled = several;
      many.disabled = !several;
      unmark(number_);
      changed();
    };
    const radio = (several, label) => {
      const input = h("input", { type: "radio", name, checked: state.several === several });
      input.addEventListener("change", () => switchTo(several));
      return h("label", { class: "line" }, input, label);
    };
    put(
      strengthPlace,
      h(
        "div",
        { class: "pair" },
        radio(false, "One value"),
        h("label", { class: "hidden", for: one.id }, parameter),
        one,
        h(
          "span",
          { class: "soft small" },
          h("code", null, parameter),
          `, ${rangeOf(schema)}; ${plain(schema.default)} is the default`,
        ),
      ),
      h("div", { class: "pair" }, radio(true, "Several, compared on one chart"), many),
      h("p", { class: "soft small", id: help }, shown(schema.description ?? "", 600)),
    );
    switchTo(state.several);
  }

  function showMore() {
    const method = current();
    const rest = Object.entries(method?.parameters.properties ?? {}).filter(
      ([name]) => name !== "type" && name !== method.strength_parameter,
    );
    moreNumbers = [];
    put(
      moreFields,
      rest.map(([name, schema]) => parameterField(name, schema, state, { changed, numbers: moreNumbers })),
    );
  }

  const rank = h(
    "select",
    { id: fresh("rank") },
    [
      ["customer", "the adapter's own (loads wherever it did)"],
      ["exact", "exact: what the repair needs"],
    ].map(([value, text]) => h("option", { value, selected: value === state.output_rank }, text)),
  );
  rank.addEventListener("change", () => {
    state.output_rank = rank.value;
    changed();
  });
  const title = h("input", { type: "text", id: fresh("name"), maxlength: "200", value: state.name });
  title.addEventListener("input", () => {
    state.name = title.value;
    changed();
  });
  const metadata = h("textarea", {
    id: fresh("metadata"),
    rows: "2",
    placeholder: "customer=c-17",
    value: state.metadata,
  });
  metadata.addEventListener("input", () => {
    state.metadata = metadata.value;
    changed();
  });
  const more = h(
    "details",
    {
      open:
        Boolean(state.name || state.metadata || state.output_rank !== "customer") ||
        Object.keys(state.values).some((name) => name !== current()?.strength_parameter),
    },
    h("summary", null, "All parameters"),
    h(
      "div",
      null,
      moreFields,
      field("Rank of the output", rank),
      field("Name of the patched adapter", title, "Left empty: the adapter's own name and what was done to it."),
      field("Metadata", metadata, "One key=value a line, 16 at most. Lists can be filtered by it."),
    ),
  );

  const referenceSelect = h(
    "select",
    { id: fresh("reference"), "aria-describedby": referenceHelp.id },
    h("option", { value: "" }, "The one that fits (automatic)"),
    references.map((reference) =>
      h(
        "option",
        { value: reference.id, selected: reference.id === state.reference },
        `${shown(reference.name, 60)}: ${shown(reference.base_model, 60)}`,
      ),
    ),
  );
  referenceSelect.addEventListener("change", () => {
    state.reference = referenceSelect.value;
    put(errors.reference);
    showReference();
    showMethods();
    showStrength();
    showMore();
    changed();
  });

  const nameSubmit = () => put(submit, state.mode === "patch" ? "Start the realignment" : "Start the measurement");
  const modeName = fresh("mode");
  const mode = (value, label, text) => {
    const input = h("input", { type: "radio", name: modeName, checked: state.mode === value });
    input.addEventListener("change", () => {
      state.mode = value;
      nameSubmit();
      changed();
    });
    return h(
      "label",
      { class: "choice" },
      input,
      h("span", null, h("span", { class: "strong" }, label), h("span", { class: "soft small block" }, text)),
    );
  };
  const submit = h("button", { type: "submit", class: "primary" });
  nameSubmit();

  const form = h(
    "form",
    { class: "start", novalidate: true },
    h(
      "fieldset",
      null,
      h("legend", null, "Reference"),
      h("label", { class: "hidden", for: referenceSelect.id }, "Reference"),
      referenceSelect,
      referenceHelp,
      errors.reference,
    ),
    h("fieldset", null, h("legend", null, "Method"), methodHelp, methodPlace, errors.method),
    h("fieldset", null, h("legend", null, "Strength"), strengthPlace, errors.strength),
    h(
      "fieldset",
      null,
      h("legend", null, "What to do"),
      h(
        "div",
        { class: "choices two" },
        mode("patch", "Repair", "Writes a patched adapter, and a report. The uploaded one stays as it is."),
        mode(
          "analyze",
          "Measure only",
          "Writes a report and no adapter: lineage, similarity of every module, and what would be recommended.",
        ),
      ),
    ),
    more,
    h("details", null, h("summary", null, "The same by curl"), shell),
    h("div", { class: "actions" }, submit),
    errors.form,
  );

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (submit.getAttribute("aria-disabled") === "true") return;
    for (const where of Object.values(errors)) put(where);
    const bad = badNumbers();
    if (bad.length) {
      for (const error of bad) mark(error);
      if (moreNumbers.includes(bad[0].field)) more.open = true;
      bad[0].field.input.focus();
      return;
    }
    let body;
    try {
      body = request();
    } catch (error) {
      put(error.code === "bad_metadata" ? errors.form : errors.strength, errorBox(error));
      return;
    }
    submit.setAttribute("aria-disabled", "true");
    keep();
    try {
      const job = await post("v1/realignments", body, { headers: { "idempotency-key": attempt } });
      sessionStorage.removeItem(DRAFT + adapter.id);
      say("Queued.");
      go(`#/realignments/${job.id}`);
    } catch (error) {
      const where = errors[controlOf(error)];
      put(where, errorBox(error));
      where.scrollIntoView({ block: "center" });
    } finally {
      submit.removeAttribute("aria-disabled");
    }
  });

  const keep = () => sessionStorage.setItem(DRAFT + adapter.id, JSON.stringify({ ...state, attempt }));
  // What somebody chose, and not what this form chose beforehand: the next one may know better.
  for (const kind of ["input", "change"]) form.addEventListener(kind, keep);

  put(place, form);
  showReference();
  showMethods();
  showStrength();
  showMore();
  changed();
  attempt = attempted ?? attempt;
}

/**
 * Into `state` what was chosen and typed for this adapter before its page was left, in this tab. Returns the name of the
 * last attempt to send exactly that, or null: it may have arrived although its answer did not.
 */
function recall(id, state, { references, methods }) {
  let draft;
  try {
    draft = JSON.parse(sessionStorage.getItem(DRAFT + id));
  } catch {
    // Not written by this form.
  }
  if (!draft) return null;
  const preferred = state.reference;
  for (const key of Object.keys(state)) if (typeof draft[key] === typeof state[key]) state[key] = draft[key];
  // References, methods and their parameters come and go.
  if (state.reference && !references.some((reference) => reference.id === state.reference)) state.reference = preferred;
  const schema = methods.find((method) => method.id === state.method)?.parameters.properties ?? {};
  state.values = Object.fromEntries(
    Object.entries(state.values).filter(
      ([name, text]) => schema[name] && (schema[name].enum?.map(String).includes(text) ?? true),
    ),
  );
  const asked = (all) => JSON.stringify([all.reference, all.method, all.values]);
  return asked(draft) === asked(state) ? (draft.attempt ?? null) : null;
}

/** Which control an error of the API belongs to. */
function controlOf(error) {
  const param = error.param ?? "";
  if (param === "strengths" || error.code === "bad_strengths") return "strength";
  if (
    param === "reference_id" ||
    [
      "base_mismatch",
      "module_not_in_base",
      "no_matching_reference",
      "reference_ambiguous",
      "reference_not_found",
      "rank_above_layer",
    ].includes(error.code)
  )
    return "reference";
  if (
    param.startsWith("method") ||
    [
      "method_not_offered",
      "rank_mismatch",
      "module_not_in_reference",
      "module_not_in_adapter",
      "no_recommended_method",
    ].includes(error.code)
  )
    return "method";
  return "form";
}

function field(label, control, help = "") {
  const id = help ? fresh("help") : null;
  if (id) control.setAttribute("aria-describedby", id);
  return h(
    "div",
    { class: "field" },
    h("label", { for: control.id }, label),
    control,
    help ? h("p", { class: "soft small", id }, help) : null,
  );
}

/** A parameter's field, holding what `state` holds. numbers: where fields of numbers are noted. */
function parameterField(name, schema, state, { changed, numbers }) {
  const kind = kindOf(schema);
  const fault = h("div");
  const set = () => {
    state.values[name] = control.type === "checkbox" ? String(control.checked) : control.value;
    unmark({ input: control, fault });
    changed();
  };
  const now = String(state.values[name] ?? schema.default ?? "");
  const id = fresh("parameter");
  let control;
  if (schema.enum) {
    control = h(
      "select",
      { id, on: { change: set } },
      schema.enum.map((value) => h("option", { value, selected: String(value) === now }, String(value))),
    );
  } else if (kind === "boolean") {
    control = h("input", { id, type: "checkbox", checked: now === "true", on: { change: set } });
  } else if (kind === "integer" || kind === "number") {
    control = h("input", {
      id,
      type: "number",
      class: "short",
      step: kind === "integer" ? "1" : "any",
      value: now,
      on: { input: set },
    });
    numbers.push({ name, schema, input: control, fault });
  } else {
    control = h("input", { id, type: "text", value: now, on: { input: set } });
  }
  const range = rangeOf(schema);
  const help = `${shown(schema.description ?? "", 600)}${range ? ` (${range})` : ""}`;
  return h("div", null, field(h("code", null, name), control, help), fault);
}

/** Why a field of a number cannot be sent; "" where it can. Empty is an answer only where nothing is the default. */
export function numberProblem({ name, schema, input }) {
  const fallback = schema.default ?? null;
  const range = rangeOf(schema);
  const what = `Write a ${kindOf(schema) === "integer" ? "whole number" : "number"}${range ? ` from ${range}` : ""}`;
  const write = fallback === null ? `${what}, or leave it empty.` : `${what}; ${plain(fallback)} is the default.`;
  if (input.validity.badInput) return `What is written for ${name} is no number. ${write}`;
  if (input.value === "") return fallback === null ? "" : `${name} is empty. ${write}`;
  return isWithin(schema, Number(input.value)) ? "" : `${name} cannot be ${shown(input.value, 40)}. ${write}`;
}

function mark(error) {
  const { input, fault } = error.field;
  input.setAttribute("aria-invalid", "true");
  put(fault, errorBox(error));
}

function unmark({ input, fault }) {
  input.removeAttribute("aria-invalid");
  put(fault);
}

function variant(schema) {
  return schema.anyOf?.find(({ type }) => type !== "null") ?? schema;
}

function kindOf(schema) {
  return variant(schema).type ?? "string";
}

/** Least and greatest that a field takes; only whole numbers have a bound that is none of their own values. */
function boundsOf(schema) {
  const { minimum = -Infinity, maximum, exclusiveMaximum = Infinity } = variant(schema);
  return [minimum, maximum ?? exclusiveMaximum - 1];
}

function isWithin(schema, value) {
  const [low, high] = boundsOf(schema);
  return low <= value && value <= high && (kindOf(schema) !== "integer" || Number.isInteger(value));
}

function rangeOf(schema) {
  const bounds = boundsOf(schema);
  return bounds.every(Number.isFinite) ? bounds.map((bound) => String(bound).replace("-", "\u2212")).join(" to ") : "";
}

/** What a field's text means; undefined where it is empty. */
function valueOf(schema, text) {
  if (!schema || text === "") return undefined;
  const kind = kindOf(schema);
  if (kind === "boolean") return text === "true";
  return kind === "integer" || kind === "number" ? Number(text) : text;
}

/** The default and a value on either side of it, within the parameter's range. The first one's maps are shown. */
function suggestion(schema) {
  const { default: middle, minimum = -Infinity, maximum = Infinity } = schema;
  const many = maximum <= 1 ? [middle, middle / 2, (middle + maximum) / 2] : [middle, middle / 3, middle * 3];
  return [
    ...new Set(
      many.map((value) => Number(Math.min(maximum, Math.max(minimum, value)).toPrecision(1 + (maximum <= 1)))),
    ),
  ];
}

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;

/** Numbers with commas or spaces between them. Raises Error that says which one is none. */
export function numbersOf(text) {
  const words = text.split(/[\s,;]+/).filter(Boolean);
  const values = words.map(Number);
  // Not all that JavaScript takes for a number: 0x10 is a slip.
  const wrong = words.find((word, index) => !NUMBER.test(word) || !Number.isFinite(values[index]));
  const problem =
    wrong !== undefined
      ? `“${shown(wrong, 40)}” is no number. Write values like 0.1, 0.3, 1.`
      : text.includes(";") && /\d,\d/.test(text)
        ? "A comma stands between two values here. Write decimals with a point: 0.1, 0.3, 1."
        : !values.length
          ? "Write the strengths to compare, for example 0.1, 0.3, 1."
          : values.length > MOST_STRENGTHS
            ? `At most ${MOST_STRENGTHS} strengths at once; these are ${values.length}.`
            : new Set(values).size !== values.length
              ? "Each strength once."
              : "";
  if (problem) throw Object.assign(new Error(problem), { code: "bad_strengths" });
  return values;
}

function pairsOf(text) {
  const found = {};
  for (const line of text
    .split("\n")
    .map((each) => each.trim())
    .filter(Boolean)) {
    const at = line.indexOf("=");
    if (at < 1)
      throw Object.assign(new Error(`Metadata: “${shown(line, 60)}” is no key=value.`), { code: "bad_metadata" });
    const name = line.slice(0, at).trim();
    if (Object.hasOwn(found, name))
      throw Object.assign(new Error(`Metadata: “${shown(name, 60)}” is there twice.`), { code: "bad_metadata" });
    found[name] = line.slice(at + 1).trim();
  }
  return found;
}
