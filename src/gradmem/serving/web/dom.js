// Helpers for all parts of the page.

/** The element of an id. */
export const the = (id) => document.getElementById(id);

/** Make an element with properties and children. Strings become text, never markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const number = (value) => value.toLocaleString("en");
/** A loss or a log-probability with two decimals, or with one significant digit if it is very small. */
export function nats(value) {
  if (value === null) return "not a number";
  return (value && Math.abs(value) < 0.005 ? value.toPrecision(1) : value.toFixed(2)).replace("-", "−");
}

/** Bytes, exactly below 100 kB and to three digits beyond. */
export function bytes(count) {
  if (count < 1e5) return `${number(count)} bytes`;
  const unit = count < 1e6 ? [1e3, "kB"] : count < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${number(Number((count / unit[0]).toPrecision(3)))} ${unit[1]}`;
}

/** "1 token", "2 tokens". */
export const count = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;

/** How long ago a time was, in words. */
export function ago(time) {
  const seconds = (Date.now() - new Date(time)) / 1000;
  const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"]].find(([size]) => seconds >= size) ?? [1, ""];
  return unit ? new Intl.RelativeTimeFormat("en", { numeric: "auto" }).format(-Math.floor(seconds / size), unit) : "just now";
}

export const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
