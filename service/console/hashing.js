// Hashing without holding up the page: a worker, asked by messages.

let policy = null;

function workerAddress() {
  const url = new URL("hasher.js", import.meta.url).href;
  if (!globalThis.trustedTypes) return url;
  // The page allows no script address that did not go through this policy, and this one knows a single address.
  policy ??= trustedTypes.createPolicy("safegraft", { createScriptURL: () => url });
  return policy.createScriptURL(url);
}

export class Hasher {
  #worker = new Worker(workerAddress(), { type: "module" });
  #waiting = new Map();
  #count = 0;

  constructor() {
    this.#worker.addEventListener("message", ({ data }) => {
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error === undefined) resolve(data.value);
      else reject(new Error(data.error));
    });
    this.#worker.addEventListener("error", (event) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(event.message || "The worker did not start."));
      this.#waiting.clear();
    });
  }

  #ask(task, given = {}) {
    return new Promise((resolve, reject) => {
      const id = ++this.#count;
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, task, ...given });
    });
  }

  of(blob) {
    return this.#ask("of", { blob });
  }

  begin() {
    return this.#ask("begin");
  }

  part(blob) {
    return this.#ask("part", { blob });
  }

  end() {
    return this.#ask("end");
  }

  tar(blob) {
    return this.#ask("tar", { blob });
  }

  close() {
    this.#worker.terminate();
    for (const { reject } of this.#waiting.values()) reject(new DOMException("Given up.", "AbortError"));
    this.#waiting.clear();
  }
}
