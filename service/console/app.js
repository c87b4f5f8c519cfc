// The shell: who is signed in, which page is shown, and whether the service can be reached.

import { adapterView, adaptersView, homeView } from "./adapters.js";
import { ROOT, ApiError, ask, events, get, key, noteReach, remember } from "./api.js";
import { h, put, say, unasked } from "./dom.js";
import { retell } from "./format.js";
import { errorBox } from "./parts.js";
import { realignmentView, realignmentsView } from "./realignments.js";
import { referencesView } from "./references.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const strip = document.getElementById("offline");
const signOut = document.getElementById("sign-out");
const health = document.getElementById("health");
// As the page came: signing out brings it back.
const signIn = main.firstElementChild;
const form = document.getElementById("signin");
const field = document.getElementById("key");
const fault = document.getElementById("signin-error");
const HEALTH_SECONDS = 30;
// While the service does not answer: whoever waits for it waits no longer than that.
const BACK_SECONDS = 3;

const PAGES = [
  ["#/", "New"],
  ["#/adapters", "Adapters"],
  ["#/realignments", "Realignments"],
  ["#/references", "References"],
];
const ROUTES = [
  [/^#\/$/, homeView, "New", "#/"],
  [/^#\/adapters$/, adaptersView, "Adapters", "#/adapters"],
  [/^#\/adapters\/([^/]+)$/, adapterView, "Adapter", "#/adapters"],
  [/^#\/realignments$/, realignmentsView, "Realignments", "#/realignments"],
  [/^#\/realignments\/([^/]+)$/, realignmentView, "Realignment", "#/realignments"],
  [/^#\/references$/, referencesView, "References", "#/references"],
];

let here = new AbortController();
let open = false; // signed in, or in development mode, which asks for no key
let keyless = false;
let moved = false;

function go(to) {
  if (location.hash === to) show();
  else location.hash = to;
}

/** A part of the address as it was before it was escaped; null where it cannot have been. */
function decoded(text) {
  try {
    return text && decodeURIComponent(text);
  } catch {
    return null;
  }
}

/** Shows the page that the address names. */
async function show() {
  here.abort();
  unasked();
  here = new AbortController();
  if (!open) return;
  const { signal } = here;
  const [path, text] = (location.hash || "#/").split("?");
  const [route, view, title, section] = ROUTES.find(([pattern]) => pattern.test(path)) ?? [];
  put(
    nav,
    PAGES.map(([href, label]) => h("a", { href, "aria-current": href === section && "page" }, label)),
  );
  const id = route && decoded(route.exec(path)[1]);
  if (!view || id === null) {
    document.title = "No such page · safegraft";
    put(main, h("h1", null, "There is no such page"), h("p", null, h("a", { href: "#/" }, "Go to the first one")));
    return;
  }
  document.title = `${title} · safegraft`;
  const context = {
    signal,
    id,
    query: new URLSearchParams(text ?? ""),
    // A page that was left takes nobody away from the next one, and writes nothing over its address.
    go: (to) => signal.aborted || go(to),
    replace: (hash) => signal.aborted || history.replaceState(null, "", hash),
  };
  if (moved) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
  moved = true;
  try {
    await view(main, context);
  } catch (error) {
    if (signal.aborted || error.name === "AbortError" || error.status === 401) return;
    const missing = error.status === 404;
    put(
      main,
      h("h1", null, missing ? `${title} not found` : `${title} could not be shown`),
      errorBox(error, { retry: missing ? null : show }),
      h("p", null, h("a", { href: section }, section === "#/" ? "Start again" : `All ${section.slice(2)}`)),
    );
    if (!(error instanceof ApiError)) console.error(error);
  }
}

function enter() {
  open = true;
  nav.hidden = false;
  signOut.hidden = keyless;
  fault.textContent = "";
  field.value = "";
  tellHealth();
  show();
}

function leave(message) {
  here.abort();
  unasked();
  open = false;
  remember("");
  events.dispatchEvent(new Event("left"));
  nav.hidden = true;
  signOut.hidden = true;
  put(health);
  put(main, signIn);
  document.title = "safegraft console";
  fault.textContent = message;
  field.value = "";
  field.focus();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  // As it stands in commands and headers.
  const given = field.value.trim().replace(/^(authorization:\s*)?bearer\s+/i, "");
  if (!given) {
    fault.textContent = "Paste an API key first.";
    field.setAttribute("aria-invalid", "true");
    field.focus();
    return;
  }
  if (!/^[!-~]+$/.test(given)) {
    fault.textContent = "A key has only letters, digits and signs of ASCII. Check what was copied.";
    field.setAttribute("aria-invalid", "true");
    field.select();
    return;
  }
  const button = form.querySelector("button");
  button.setAttribute("aria-disabled", "true");
  fault.textContent = "";
  remember(given);
  try {
    await get("v1/realignments", { query: { limit: 1 } });
    field.removeAttribute("aria-invalid");
    moved = true;
    enter();
    say("Signed in.");
  } catch (error) {
    remember("");
    field.setAttribute("aria-invalid", "true");
    fault.textContent =
      error.status === 401
        ? "This key is not accepted: it is wrong, expired or revoked. Check that all of it was copied, or ask the operator for a new one."
        : `${error.message}${error.requestId ? ` (${error.code}, request ${error.requestId})` : ""}`;
    field.select();
  } finally {
    button.removeAttribute("aria-disabled");
  }
});

signOut.addEventListener("click", () => {
  leave("");
  // Also where uploads stood. After a key that was refused they stay, so that the next one goes on.
  sessionStorage.clear();
  // The next one begins at the beginning, and not on the last one's page.
  history.replaceState(null, "", "#/");
});
events.addEventListener("unauthorized", () => {
  if (open) leave("The key is not accepted any more: it was revoked or has expired. Sign in with another one.");
});

const offline = () => {
  strip.hidden = false;
  strip.textContent = navigator.onLine
    ? "The service does not answer. What is shown may be old; it is tried again by itself."
    : "This device is offline. What is shown may be old; it is tried again by itself.";
};
const online = () => {
  if (!strip.hidden) say("Connected again.");
  strip.hidden = true;
};
events.addEventListener("offline", offline);
events.addEventListener("online", online);
addEventListener("offline", offline);
addEventListener("online", () => ask("livez").then(online, () => {}));

const MISSING = {
  worker: "No worker is alive: realignments wait.",
  reference: "No reference is installed.",
  broker: "The broker does not answer: realignments start late.",
  database: "The database does not answer.",
  storage: "The storage does not answer.",
  space: "The service's disk is full.",
};

/** What the service says of itself, in one chip. */
async function tellHealth() {
  if (!open) return;
  let checks = {};
  try {
    const response = await fetch(new URL("readyz", ROOT), { cache: "no-store", credentials: "omit" });
    ({ checks } = await response.json());
    online();
    noteReach(true);
  } catch {
    offline();
    noteReach(false);
    put(health, h("span", { class: "chip bad" }, "Not reachable"));
    return;
  }
  const missing = Object.keys(MISSING).filter((name) => checks[name] === false);
  put(
    health,
    missing.length
      ? h(
          "span",
          { class: "chip bad", title: missing.map((name) => MISSING[name]).join(" ") },
          missing.map((name) => `no ${name}`).join(", "),
        )
      : keyless
        ? h(
            "span",
            { class: "chip", title: "Development mode asks for no keys, and answers this machine alone." },
            "Development mode",
          )
        : null,
  );
}

setInterval(() => {
  retell();
  if (!document.hidden) tellHealth();
}, HEALTH_SECONDS * 1000);

setInterval(() => {
  if (!strip.hidden && !document.hidden) tellHealth();
}, BACK_SECONDS * 1000);

const THEMES = ["system", "light", "dark"];
const theme = document.getElementById("theme");
function themed(now) {
  put(
    theme,
    h("span", { "aria-hidden": "true" }, { system: "◐", light: "○", dark: "●" }[now]),
    h("span", { class: "wide" }, `\u00a0Theme: ${now}`),
  );
  theme.setAttribute("aria-label", `Theme: ${now}. Change it.`);
}
themed(document.documentElement.dataset.theme ?? "system");
theme.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "system") localStorage.removeItem("safegraft.theme");
    else localStorage.setItem("safegraft.theme", next);
  } catch {
    // Storage is blocked: it holds until the page is left.
  }
  themed(next);
});

addEventListener("hashchange", show);
document.querySelector(".skip").addEventListener("click", (event) => {
  // The address after # is the page's, and no place on it.
  event.preventDefault();
  main.focus();
});

if (key()) {
  enter();
} else {
  field.focus();
  // In development mode nothing is asked for; then there is nothing to sign in with.
  fetch(new URL("v1/methods", ROOT), { cache: "no-store", credentials: "omit" }).then((response) => {
    if (response.ok && !open) {
      keyless = true;
      enter();
    }
  }, offline);
}
