// An adapter on its way in: what was dropped, judged by names; its files, hashed and sent in parts that survive breaks.

import { ApiError, address, authorization, errorOf, events, get, post, remove } from "./api.js";
import { pause } from "./dom.js";
import { shown } from "./format.js";
import { Hasher } from "./hashing.js";

export const CONFIG = "adapter_config.json";
export const WEIGHTS = "adapter_model.safetensors";
// What the service keeps beside them (safegraft/adapter.py); all else need not travel.
export const COMPANIONS = [
  "tokenizer*.json",
  "tokenizer.model",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "chat_template.json",
  "chat_template*.jinja",
  "special_tokens_map.json",
  "added_tokens.json",
  "generation_config.json",
  "README.md",
];
export const PART = 8 * 2 ** 20;
const MOST_ENTRIES = 5000;
const RETRIES = 6;
const NOTE = "safegraft.upload.";

/** Files whose upload began in this tab and did not end: [{name, bytes}]. */
export function unfinished() {
  return Object.keys(sessionStorage)
    .filter((key) => key.startsWith(NOTE))
    .map((key) => key.slice(NOTE.length).split("|"))
    .map((parts) => ({ name: parts.slice(0, -3).join("|"), bytes: Number(parts.at(-3)) }));
}

/** Whether an answer is about the adapter itself, so that sending it again would change nothing. */
export function refuses(error) {
  return error instanceof ApiError && [400, 413, 422].includes(error.status);
}

/** What was dropped cannot be an adapter; seen before a byte was sent. */
export class NoAdapter extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

function patternOf(glob) {
  return new RegExp(`^${glob.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*")}$`);
}

const KEPT = COMPANIONS.map(patternOf);

/** Whether the service keeps a file of this name. */
export function travels(name) {
  return name === CONFIG || name === WEIGHTS || KEPT.some((pattern) => pattern.test(name));
}

/** The files below what was dropped: [{path, file}]. Must be called while the drop is handled. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ path: file.name, file }));
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

async function walk(entry, above, found) {
  const path = `${above}${entry.name}`;
  if (found.length > MOST_ENTRIES) {
    throw new NoAdapter(`More than ${MOST_ENTRIES} files: drop the adapter's own folder.`, "too_many_files");
  }
  if (entry.isFile) {
    found.push({ path, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // Each call gives a hundred at most.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const inner of some) await walk(inner, `${path}/`, found);
  }
}

/** The files that an input element holds. */
export function chosen(list) {
  return [...list].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/**
 * What to send of what was dropped: {label, kind: "archive" | "folder", files: [File], left: [path], weights: File?}.
 * Raises NoAdapter.
 */
export function judged(items) {
  if (!items.length) throw new NoAdapter("Nothing was dropped that can be read as a file.", "nothing");
  if (items.length === 1 && /\.(tar|zip)$/i.test(items[0].path)) {
    const { file } = items[0];
    if (!file.size) throw new NoAdapter(`${file.name} is empty.`, "empty_file");
    return { label: file.name.replace(/\.(tar|zip)$/i, ""), kind: "archive", files: [file], left: [], weights: null };
  }
  if (items.length === 1 && /\.(tgz|gz|bz2|xz|zst|7z|rar)$/i.test(items[0].path)) {
    throw new NoAdapter(
      `${items[0].file.name} is compressed as a whole. Send a plain .tar, a .zip, or the folder itself.`,
      "compressed_archive",
    );
  }
  const folderOf = (path) => path.slice(0, path.lastIndexOf("/") + 1);
  const depth = (path) => path.split("/").length;
  const configs = items.map(({ path }) => path).filter((path) => path.split("/").at(-1) === CONFIG);
  if (!configs.length) {
    throw new NoAdapter(`${CONFIG} is missing. Drop the whole folder that PEFT saved.`, "missing_config");
  }
  const highest = Math.min(...configs.map(depth));
  const best = configs.filter((path) => depth(path) === highest);
  if (best.length > 1) {
    throw new NoAdapter(
      `${best.length} folders hold an adapter: ${best.slice(0, 3).map(folderOf).join(", ")}. Drop one of them.`,
      "several_adapters",
    );
  }
  const folder = folderOf(best[0]);
  const inside = items.filter(({ path }) => folderOf(path) === folder);
  const weights = inside.find(({ path }) => path === folder + WEIGHTS)?.file;
  if (!weights) {
    const pickle = inside.find(({ path }) => /\.(bin|pt|pth|ckpt)$/i.test(path));
    const why = pickle
      ? `${pickle.file.name} is a pickle, which is never opened: save with \`safe_serialization=True\`.`
      : "Drop the whole folder that PEFT saved.";
    throw new NoAdapter(`${WEIGHTS} is missing. ${why}`, "missing_weights");
  }
  const config = inside.find(({ path }) => path === best[0]).file;
  for (const [name, file] of [
    [WEIGHTS, weights],
    [CONFIG, config],
  ]) {
    if (!file.size) throw new NoAdapter(`${name} is empty.`, "empty_file");
  }
  const files = inside.map(({ file }) => file).filter((file) => travels(file.name) && file.size > 0);
  const left = items
    .map(({ path }) => path)
    .filter((path) => folderOf(path) !== folder || !travels(path.split("/").at(-1)));
  const label = folder.split("/").at(-2) ?? "";
  return { label, kind: "folder", files, left, weights };
}

/** Where a part begins and ends: [[from, to], …]. */
export function cuts(bytes, part = PART) {
  return Array.from({ length: Math.ceil(bytes / part) }, (_, index) => [
    index * part,
    Math.min(bytes, (index + 1) * part),
  ]);
}

/**
 * Sends what `judged` chose and makes an adapter of it. onState({phase, sent, total, hash, note}) is told how it goes;
 * phase: "sending", "waiting" (for the connection), "reading". Raises ApiError, or AbortError where the signal ended it.
 */
export async function deliver({ files, weights, name }, { onState, signal }) {
  const total = files.reduce((sum, file) => sum + file.size, 0);
  const hasher = new Hasher();
  const stop = () => hasher.close();
  signal.addEventListener("abort", stop);
  const done = [];
  const hashes = [];
  let before = 0;
  let resumed = 0;
  let now = 0;
  const tell = (more) => {
    now = more.sent ?? now;
    onState({ sent: now, total, resumed, hashes, ...more });
  };
  try {
    for (const file of files) {
      const sent = await sendFile(file, hasher, {
        signal,
        onBytes: (bytes) => tell({ phase: "sending", sent: before + bytes, file: file.name }),
        onWaiting: (why) => tell({ phase: "waiting", note: why, file: file.name }),
        onKnown: (bytes) => (resumed += bytes),
      });
      before += file.size;
      done.push(sent.fileId);
      hashes.push({ name: file.name, sha256: sent.sha256, note: sent.note });
    }
    const sha256 = weights ? hashes.find(({ name: file }) => file === weights.name).sha256 : undefined;
    tell({ phase: "reading", sent: total, hashes });
    const adapter = await post("v1/adapters", { file_ids: done, name: name ?? "", sha256 }, { signal });
    await forget(done, hashes);
    return adapter;
  } catch (error) {
    // A file that was judged and refused would be refused again: it need not wait for another try.
    if (refuses(error)) await forget(done, hashes);
    throw error;
  } finally {
    signal.removeEventListener("abort", stop);
    hasher.close();
  }
}

async function forget(fileIds, hashes) {
  for (const { note } of hashes) sessionStorage.removeItem(note);
  // The adapter keeps its own bytes.
  await Promise.allSettled(fileIds.map((id) => remove(`v1/files/${id}`)));
}

async function sendFile(file, hasher, { signal, onBytes, onWaiting, onKnown }) {
  const head = await hasher.of(file.slice(0, 2 ** 20));
  const note = `${NOTE}${file.name}|${file.size}|${file.lastModified}|${head}`;
  const trying = (work) => persistent(work, { signal, onWaiting });
  const { upload, arrived } = await trying(() => begun(file, note, signal));
  await hasher.begin();
  const partIds = [];
  for (const [from, to] of cuts(file.size)) {
    const piece = file.slice(from, to);
    const sha256 = await hasher.part(piece).catch((error) => {
      if (signal.aborted) throw error;
      throw new NoAdapter(
        `${file.name} cannot be read: ${error.message}. Has it changed or gone since?`,
        "unreadable_file",
      );
    });
    const known = arrived.get(sha256)?.shift();
    if (known || upload.file) onKnown(piece.size);
    else partIds.push(await trying(() => sendPart(upload.id, piece, sha256, (bytes) => onBytes(from + bytes), signal)));
    if (known) partIds.push(known);
    onBytes(to);
  }
  const whole = await hasher.end();
  const file_ =
    upload.file ??
    (await trying(() => post(`v1/uploads/${upload.id}/complete`, { part_ids: partIds, sha256: whole }, { signal })))
      .file;
  return { fileId: file_.id, sha256: whole, note };
}

/** The upload that this file began before, with what has arrived of it by SHA-256; or a new one. */
async function begun(file, note, signal) {
  const kept = sessionStorage.getItem(note);
  if (kept) {
    try {
      const upload = await get(`v1/uploads/${kept}`, { signal });
      if (upload.status === "completed" && upload.file) {
        await get(`v1/files/${upload.file.id}`, { signal });
        return { upload, arrived: new Map() };
      }
      if (upload.status === "pending")
        return { upload: { ...upload, file: null }, arrived: await partsOf(kept, signal) };
    } catch (error) {
      if (error.status !== 404) throw error;
    }
    sessionStorage.removeItem(note);
  }
  const mime_type = /\.zip$/i.test(file.name)
    ? "application/zip"
    : /\.tar$/i.test(file.name)
      ? "application/x-tar"
      : "application/octet-stream";
  const upload = await post(
    "v1/uploads",
    { purpose: "fine-tune", filename: shown(file.name, 200), bytes: file.size, mime_type },
    { signal },
  );
  sessionStorage.setItem(note, upload.id);
  return { upload, arrived: new Map() };
}

async function partsOf(uploadId, signal) {
  const arrived = new Map();
  for (let after = null; ;) {
    const page = await get(`v1/uploads/${uploadId}/parts`, { query: { limit: 1000, after }, signal });
    for (const part of page.data) arrived.set(part.sha256, [...(arrived.get(part.sha256) ?? []), part.id]);
    if (!page.has_more) return arrived;
    after = page.last_id;
  }
}

/** Sends one part; a promise of its id. By XMLHttpRequest, because fetch does not say how much it has sent. */
function sendPart(uploadId, piece, sha256, onBytes, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const stop = () => request.abort();
    signal.addEventListener("abort", stop);
    request.open("POST", address(`v1/uploads/${uploadId}/parts`));
    request.setRequestHeader("content-type", "application/octet-stream");
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => onBytes(Math.min(event.loaded, piece.size)));
    request.addEventListener("loadend", () => {
      signal.removeEventListener("abort", stop);
      if (signal.aborted) return reject(new DOMException("Given up.", "AbortError"));
      if (request.status === 0) return reject(new ApiError("The service does not answer."));
      if (request.status >= 300) {
        return reject(errorOf(request.status, request.responseText, (name) => request.getResponseHeader(name)));
      }
      const part = JSON.parse(request.responseText);
      if (part.sha256 !== sha256) {
        return reject(
          new ApiError("A part arrived with another hash than it was sent with.", { code: "part_mismatch" }),
        );
      }
      resolve(part.id);
    });
    request.send(piece);
  });
}

/** Does something again where trying helps: after breaks of the connection, 408, 429 and 5xx. */
async function persistent(work, { signal, onWaiting }) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      const passing =
        error instanceof ApiError && (error.status === 0 || [408, 429, 500, 502, 503, 504].includes(error.status));
      if (signal.aborted || !passing || (attempt >= RETRIES && navigator.onLine)) throw error;
      if (!navigator.onLine) attempt = 0;
      onWaiting(error.message);
      await Promise.race([
        pause(1000 * (error.retryAfter ?? Math.min(20, 2 ** attempt)), signal),
        new Promise((resolve) => addEventListener("online", resolve, { once: true })),
        new Promise((resolve) => events.addEventListener("online", resolve, { once: true })),
      ]);
      if (signal.aborted) throw error;
    }
  }
}
