// Server-sent events by fetch: EventSource can send no Authorization header.

import { ApiError, ask } from "./api.js";
import { pause } from "./dom.js";

/** Takes a stream's text in pieces and hands out its events, by the WHATWG's rules. */
export class EventParser {
  #rest = "";
  #first = true;
  #data = [];
  #type = "";
  lastId = "";

  constructor(onEvent) {
    this.onEvent = onEvent;
  }

  push(text) {
    if (this.#first && text) {
      if (text.startsWith("\ufeff")) text = text.slice(1);
      this.#first = false;
    }
    this.#rest += text;
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      if (end < 0) return;
      // A CR at the end may be half of a CRLF: the other half decides.
      if (this.#rest[end] === "\r" && end === this.#rest.length - 1) return;
      const width = this.#rest[end] === "\r" && this.#rest[end + 1] === "\n" ? 2 : 1;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + width);
      this.#line(line);
    }
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const name = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.lastId = value;
  }

  #dispatch() {
    const data = this.#data.join("\n");
    const type = this.#type || "message";
    const any = this.#data.length > 0;
    this.#data = [];
    this.#type = "";
    if (any) this.onEvent({ type, data, id: this.lastId });
  }
}

// The service sends a comment every 15 s; a stream that is silent for three of them is dead.
const SILENCE = 45_000;
const POLL = 2_000;
const SLOWEST = 10_000;

/**
 * Follows a stream until `ended()` is true: again after breaks, from the last event on, and by `poll` where the service
 * has no place for another stream. onState is told "live", "waiting" (no connection) or "polling".
 */
export async function follow(path, { onEvent, poll, ended, onState, signal }) {
  let lastId = "";
  let wait = 500;
  while (!signal.aborted && !ended()) {
    try {
      lastId = await once(
        path,
        lastId,
        onEvent,
        () => {
          wait = 500;
          onState("live");
        },
        signal,
      );
      if (!ended()) await poll();
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401 || error.status === 404) throw error;
      if (error instanceof ApiError && error.status > 0) {
        onState("polling");
        await polled(poll, ended, signal);
      } else {
        onState("waiting");
      }
    }
    if (signal.aborted || ended()) return;
    await Promise.race([pause(wait, signal), connected(signal)]);
    wait = Math.min(SLOWEST, wait * 2);
  }
}

/** Resolves when the device is online again. */
function connected(signal) {
  return new Promise((resolve) => addEventListener("online", resolve, { once: true, signal }));
}

async function polled(poll, ended, signal) {
  // For a while; then the stream may have a place.
  for (let turn = 0; turn < 10 && !ended() && !signal.aborted; turn++) {
    try {
      await poll();
    } catch (error) {
      if (signal.aborted || error.status === 401 || error.status === 404) throw error;
      return;
    }
    if (!ended()) await pause(POLL, signal);
  }
}

async function once(path, lastId, onEvent, onOpen, signal) {
  const here = new AbortController();
  const stop = () => here.abort();
  signal.addEventListener("abort", stop);
  // A connection that is gone says nothing; the device knows at once.
  addEventListener("offline", stop);
  let timer = setTimeout(stop, SILENCE);
  const parser = new EventParser(onEvent);
  parser.lastId = lastId;
  try {
    const headers = { accept: "text/event-stream", ...(lastId ? { "last-event-id": lastId } : {}) };
    const response = await ask(path, { headers, signal: here.signal });
    onOpen();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return parser.lastId;
      clearTimeout(timer);
      timer = setTimeout(stop, SILENCE);
      parser.push(value);
    }
  } catch (error) {
    // What came before the break counts.
    if (error instanceof ApiError || signal.aborted) throw error;
    return parser.lastId;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
    removeEventListener("offline", stop);
  }
}
