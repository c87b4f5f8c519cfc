// Downloads: the key goes into a header and never into an address, so files come by fetch. What arrived is hashed and
// compared with the API's record before it is handed to the browser.

import { ApiError, ask } from "./api.js";
import { Hasher } from "./hashing.js";

// Beyond this, and where the browser can, bytes go straight to the file that the user names.
const LARGE = 512 * 2 ** 20;

/** The whole adapter as a tar, every file of it checked. onState(text) says how it goes. */
export async function downloadAdapter(adapter, onState) {
  const name = `${adapter.id}.tar`;
  if (adapter.bytes > LARGE && window.showSaveFilePicker) return streamed(adapter, name, onState);
  const blob = await fetched(`v1/adapters/${adapter.id}/download`, adapter.bytes, onState);
  onState("Checking SHA-256 …");
  const hasher = new Hasher();
  try {
    const found = await hasher.tar(blob);
    for (const file of adapter.files) {
      if (found[`${adapter.id}/${file.name}`] !== file.sha256)
        throw mismatch(file.name, "Nothing was saved; try again.");
    }
  } finally {
    hasher.close();
  }
  save(blob, name);
  onState(
    `Saved. SHA-256 of ${adapter.files.length === 1 ? "its file agrees" : `all ${adapter.files.length} files agrees`} with the API's.`,
  );
}

async function streamed(adapter, name, onState) {
  const handle = await window.showSaveFilePicker({ suggestedName: name });
  const response = await ask(`v1/adapters/${adapter.id}/download`);
  let read = 0;
  const counting = new TransformStream({
    transform(piece, controller) {
      read += piece.length;
      onState(`${Math.floor((100 * read) / adapter.bytes)} %`);
      controller.enqueue(piece);
    },
  });
  await response.body.pipeThrough(counting).pipeTo(await handle.createWritable());
  onState("Checking SHA-256 …");
  const hasher = new Hasher();
  try {
    const found = await hasher.tar(await handle.getFile());
    for (const file of adapter.files) {
      if (found[`${adapter.id}/${file.name}`] !== file.sha256)
        throw mismatch(file.name, "Delete what was saved, and try again.");
    }
  } finally {
    hasher.close();
  }
  onState(`Saved. SHA-256 of all ${adapter.files.length} files agrees with the API's.`);
}

/**
 * One file of the API under a name. sha256: what it must hash to, or null where the API keeps no hash of it; elsewhere:
 * what to do where it lies in an object store.
 */
export async function downloadFile(
  path,
  name,
  { bytes = 0, sha256 = null, onState = () => {}, elsewhere = "Use curl -L." } = {},
) {
  const blob = await fetched(path, bytes, onState, elsewhere);
  if (sha256) {
    onState("Checking SHA-256 …");
    const hasher = new Hasher();
    try {
      if ((await hasher.of(blob)) !== sha256) throw mismatch(name, "Nothing was saved; try again.");
    } finally {
      hasher.close();
    }
  }
  save(blob, name);
  onState(sha256 ? "Saved. Its SHA-256 agrees with the API's." : "Saved.");
}

function mismatch(name, then) {
  return new ApiError(`${name} arrived with another SHA-256 than the API keeps of it. ${then}`, {
    code: "checksum_mismatch",
  });
}

async function fetched(path, expected, onState, elsewhere = "Use curl -L.") {
  const response = await ask(path, { redirect: "manual" });
  if (response.type === "opaqueredirect") {
    throw new ApiError(`This file lies in an object store, which this page may not reach. ${elsewhere}`, {
      code: "elsewhere",
    });
  }
  const total = Number(response.headers.get("content-length")) || expected;
  const pieces = [];
  let read = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    pieces.push(value);
    read += value.length;
    if (total) onState(`${Math.min(100, Math.floor((100 * read) / total))} %`);
  }
  return new Blob(pieces, { type: "application/octet-stream" });
}

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  // The browser reads the address after the click.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
