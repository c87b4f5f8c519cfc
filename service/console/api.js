// The public API, and nothing else: the key, one way to ask, one shape of errors.

/** Where the API lies: beside the page, also behind a proxy that gives it a path of its own. */
export const ROOT = new URL("../", import.meta.url);
const KEY = "safegraft.key";

/** "unauthorized": a key was refused; "offline" and "online": the service stopped or began to answer. */
export const events = new EventTarget();

let reachable = true;

/** An answer that is no success, or none at all (status 0). Message and code are the API's. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "unreachable", param = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, requestId, retryAfter });
  }
}

// What to do next, where the API's own sentence does not say it.
const ADVICE = {
  unreachable: "Check the connection. The console tries again by itself where it can.",
  unauthorized: "Sign in with a valid key; the operator makes one with `safegraft keys create`.",
  rate_limit_exceeded: "Wait a second, then try again.",
  too_many_uploads: "Others are uploading. Wait a few seconds, then try again.",
  too_many_jobs: "Wait until one of the open jobs has ended, or cancel one.",
  storage_quota_exceeded: "Delete adapters that are no longer needed, or ask the operator for more room.",
  database_unavailable: "Try again in a few seconds.",
  disk_full: "Tell the operator, who must make room; then try again.",
  internal_error: "Give the request id to the operator: it names the cause in their log.",
  adapter_not_found: "It may have been deleted, or belong to another tenant.",
  realignment_not_found: "It may have been deleted, or belong to another tenant.",
};

export function advice(error) {
  return ADVICE[error.code] ?? (error.status >= 500 ? ADVICE.internal_error : "");
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function remember(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** The address of a path of the API, with a query of those values that are not empty. */
export function address(path, query = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) {
    // Metadata may be empty, and be looked for.
    const given = value !== "" || name.startsWith("metadata[");
    if (given && value !== null && value !== undefined) url.searchParams.set(name, value);
  }
  return url;
}

export function authorization() {
  return key() ? { authorization: `Bearer ${key()}` } : {};
}

/** Notes whether the service answered. */
export function noteReach(now) {
  if (now === reachable) return;
  reachable = now;
  events.dispatchEvent(new Event(now ? "online" : "offline"));
}

/** Sends a request and returns the response. Raises ApiError, or AbortError where the signal ended it. */
export async function ask(
  path,
  { method = "GET", query, json, body, headers = {}, signal, cache = "no-store", redirect = "follow" } = {},
) {
  const sent = { ...authorization(), ...headers };
  if (json !== undefined) sent["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path, query), {
      method,
      headers: sent,
      body: json === undefined ? body : JSON.stringify(json),
      signal,
      cache,
      redirect,
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    noteReach(false);
    throw new ApiError("The service does not answer.");
  }
  noteReach(true);
  if (response.ok || response.type === "opaqueredirect") return response;
  throw await refused(response);
}

async function refused(response) {
  const text = await response.text().catch(() => "");
  return errorOf(response.status, text, (name) => response.headers.get(name));
}

/** The error that an answer tells; header: a function from name to value. A 401 ends the session. */
export function errorOf(status, text, header) {
  let told = {};
  try {
    told = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, say.
  }
  const error = new ApiError(told.message ?? `The service answered with status ${status}.`, {
    status,
    code: told.code ?? `http_${status}`,
    param: told.param ?? null,
    requestId: header("x-request-id"),
    retryAfter: Number(header("retry-after")) || null,
  });
  if (status === 401) events.dispatchEvent(Object.assign(new Event("unauthorized"), { error }));
  return error;
}

/** The JSON of an answer. A GET that met the limit of requests is sent again, twice at most. */
export async function get(path, { query, signal } = {}) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await (await ask(path, { query, signal })).json();
    } catch (error) {
      if (error.status !== 429 || attempt === 2) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter ?? 1)));
    }
  }
}

export async function post(path, json, { headers, signal } = {}) {
  return (await ask(path, { method: "POST", json, headers, signal })).json();
}

export async function remove(path, query) {
  return (await ask(path, { method: "DELETE", query })).json();
}

/** A random name in hex; crypto.randomUUID is missing where there is no TLS. */
export function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
