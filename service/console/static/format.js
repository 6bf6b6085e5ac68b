// Numbers and addresses as people read them.

const GROUPED = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

export const count = (value) => GROUPED.format(value);
export const short = (value) => (value < 10000 ? GROUPED.format(value) : SHORT.format(value));
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** An address or a number in hex. Addresses of guests stay below 2^52, so that a double holds them. */
export const hex = (value) => `0x${value.toString(16)}`;

/** A word of 64 bits as 16 digits in groups of four. */
export const word = (value) => BigInt(value).toString(16).padStart(16, "0").replace(/(.{4})(?=.)/g, "$1 ");

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
export function bytes(value) {
  let unit = 0;
  let rest = Number(value);
  while (rest >= 1024 && unit < UNITS.length - 1) { rest /= 1024; unit++; }
  return `${rest >= 100 || Number.isInteger(rest) ? Math.round(rest) : rest.toFixed(1)} ${UNITS[unit]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function ago(stamp) {
  const passed = (Date.now() - Date.parse(stamp)) / 1000;
  if (passed < 10) return "just now";
  if (passed < 90) return `${Math.round(passed)} s ago`;
  if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
  if (passed < 129600) return `${Math.round(passed / 3600)} h ago`;
  return new Date(stamp).toLocaleDateString("en-CA");
}

export const clock = (stamp) => new Date(stamp).toLocaleTimeString("en-GB", { hour12: false });

/** An address as people type it: decimal or 0x…; null for anything else. Sizes may end in K, M, G or T. */
export function parseAddress(text) {
  const match = /^\s*(0x[0-9a-f]+|[0-9]+)\s*$/i.exec(text.replaceAll("_", "").replaceAll(",", ""));
  const value = match ? Number(match[1]) : NaN;
  return Number.isSafeInteger(value) && value < 2 ** 52 ? value : null;
}
export function parseSize(text) {
  const match = /^\s*(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(?:i?b)?|b)?\s*$/i.exec(text);
  if (!match) return null;
  const value = Number(match[1]) * 1024 ** " kmgt".indexOf((match[2] ?? " ").toLowerCase());
  return Number.isSafeInteger(value) ? value : null;
}
