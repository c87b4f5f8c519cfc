// Numbers, times and texts as people read them. Rounded like safegraft/report/words.py, so that the console and the
// report never disagree.

import { h } from "./dom.js";

const MINUS = "\u2212";
const SPACE = "\u00a0";
const NOTHING = "–";

/** 0.73; never −0.00. */
export function number(value, digits = 2) {
  if (!Number.isFinite(value)) return NOTHING;
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", MINUS);
}

/** +0.31, −0.02, or 0.00 without a sign: a difference. */
export function signed(value, digits = 2) {
  const text = number(value, digits);
  return value > 0 && Number(value.toFixed(digits)) > 0 ? `+${text}` : text;
}

/** 93 %; does not call a little nothing, nor almost all everything. */
export function percent(share, digits = 0) {
  if (!Number.isFinite(share)) return NOTHING;
  const rounded = Number((100 * share).toFixed(digits));
  const step = 10 ** -digits;
  if (rounded === 0 && share > 0) return `<${SPACE}${step.toFixed(digits)}${SPACE}%`;
  if (rounded === 100 && share < 1) return `>${SPACE}${(100 - step).toFixed(digits)}${SPACE}%`;
  return `${(rounded + 0).toFixed(digits)}${SPACE}%`.replace("-", MINUS).replace(/^−(0(\.0+)?\u00a0%)$/, "$1");
}

/** 27 %, or 1.8 times its size: what an update changed by. */
export function change(edit) {
  if (!Number.isFinite(edit) || Math.round(100 * edit) <= 100) return percent(edit);
  if (edit > 1e6) return "more than a million times its size";
  const digits = edit < 10 ? 2 : edit < 100 ? 1 : 0;
  const text = edit.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return `${digits ? text.replace(/\.?0+$/, "") : text} times its size`;
}

/** 0.3, 1, 0.05: as folders of strengths are named. */
export function plain(value) {
  return String(Number(value.toPrecision(6))).replace("-", MINUS);
}

/** 4.9 MB. */
export function size(count) {
  let value = count;
  let unit = "bytes";
  for (const bigger of ["kB", "MB", "GB", "TB"]) {
    if (value < 1000) break;
    value /= 1000;
    unit = bigger;
  }
  return unit === "bytes" ? `${value}${SPACE}${unit}` : `${value.toFixed(1)}${SPACE}${unit}`;
}

/** 1,234 */
export function count(value) {
  return value.toLocaleString("en-US");
}

/** 1 module, 2 modules. */
export function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** Text fit for a page: what is invisible or turns the direction of writing is replaced, the middle cut out. */
export function shown(text, limit = 160) {
  let letters = [...String(text)];
  if (letters.length > limit) {
    letters = [...letters.slice(0, Math.floor((limit * 2) / 3)), "…", ...letters.slice(-Math.floor(limit / 3))];
  }
  return letters.map((letter) => (/[\p{C}\p{Zl}\p{Zp}]/u.test(letter) ? "\ufffd" : letter)).join("");
}

/** A stranger's text as an element of its own direction. */
export function named(text, limit) {
  return h("bdi", null, shown(text, limit));
}

/** 3 s, 4 min 05 s, 2 h 10 min. */
export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return NOTHING;
  if (seconds < 1) return `<${SPACE}1${SPACE}s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole}${SPACE}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}${SPACE}min ${String(whole % 60).padStart(2, "0")}${SPACE}s`;
  return `${Math.floor(whole / 3600)}${SPACE}h ${Math.floor((whole % 3600) / 60)}${SPACE}min`;
}

const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const STEPS = [
  ["year", 31536000],
  ["month", 2592000],
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
];

/** "2 minutes ago"; seconds: Unix time, now: likewise. */
export function relative(seconds, now = Date.now() / 1000) {
  const away = seconds - now;
  if (Math.abs(away) < 10) return away > 1 ? "in a few seconds" : "just now";
  for (const [unit, length] of STEPS) {
    if (Math.abs(away) >= length) return RELATIVE.format(Math.trunc(away / length), unit);
  }
  return RELATIVE.format(Math.trunc(away), "second");
}

/** 2026-11-21 14:05:09, in the reader's own time zone. */
export function exact(seconds) {
  const at = new Date(seconds * 1000);
  const two = (value) => String(value).padStart(2, "0");
  return (
    `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ` +
    `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`
  );
}

/** A relative time that stays true, with the exact one on hover. */
export function time(seconds) {
  if (seconds === null || seconds === undefined) return null;
  return h(
    "time",
    { datetime: new Date(seconds * 1000).toISOString(), title: exact(seconds), data: { at: seconds } },
    relative(seconds),
  );
}

/** Brings all relative times up to date. */
export function retell(root = document) {
  for (const element of root.querySelectorAll("time[data-at]")) {
    element.textContent = relative(Number(element.dataset.at));
  }
}
