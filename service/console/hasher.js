// The worker that hashes, so that the page stays responsive. One request at a time; see hashing.js.

import { Sha256 } from "./sha256.js";
import { members } from "./tar.js";

const PIECE = 2 ** 22;
let whole = new Sha256();

async function read(blob, ...hashes) {
  for (let at = 0; at < blob.size; at += PIECE) {
    const piece = new Uint8Array(await blob.slice(at, at + PIECE).arrayBuffer());
    for (const hash of hashes) hash.update(piece);
  }
}

const TASKS = {
  /** The digest of a blob alone. */
  async of({ blob }) {
    const hash = new Sha256();
    await read(blob, hash);
    return hash.hex();
  },
  /** Begins a file that comes in parts. */
  async begin() {
    whole = new Sha256();
  },
  /** The digest of the next part, which also counts for the whole. */
  async part({ blob }) {
    const hash = new Sha256();
    await read(blob, hash, whole);
    return hash.hex();
  },
  async end() {
    return whole.hex();
  },
  /** Digests of the files in a tar, by name. */
  async tar({ blob }) {
    const found = {};
    for await (const member of members(blob)) found[member.name] = await TASKS.of({ blob: member.blob });
    return found;
  },
};

addEventListener("message", async (event) => {
  const { id, task, ...given } = event.data;
  try {
    postMessage({ id, value: await TASKS[task](given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
});
