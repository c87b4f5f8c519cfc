// Reading the tars that the API writes: plain files with short names, no compression.

const BLOCK = 512;

/** The files in a tar, one after the other: {name, blob}, without a copy in memory. Raises Error where it is no tar. */
export async function* members(blob) {
  let at = 0;
  while (at + BLOCK <= blob.size) {
    const head = new Uint8Array(await blob.slice(at, at + BLOCK).arrayBuffer());
    if (head.every((byte) => byte === 0)) return;
    const name = text(head, 0, 100);
    const bytes = parseInt(text(head, 124, 12).trim(), 8);
    const kind = String.fromCharCode(head[156]);
    if (!Number.isFinite(bytes) || at + BLOCK + bytes > blob.size) throw new Error("The tar is cut off.");
    if (kind === "0" || kind === "\0") yield { name, blob: blob.slice(at + BLOCK, at + BLOCK + bytes) };
    at += BLOCK + Math.ceil(bytes / BLOCK) * BLOCK;
  }
  throw new Error("The tar has no end.");
}

function text(head, from, length) {
  const field = head.subarray(from, from + length);
  const end = field.indexOf(0);
  return new TextDecoder().decode(end < 0 ? field : field.subarray(0, end));
}
