// The list of memories.
import * as api from "./api.js";
import { ago, make, number, the } from "./dom.js";
import { label } from "./memory.js";

const PAGE = 20;
let next = null;
let onUploaded = () => {};

async function attempt(action) {
  try {
    await action();
    the("list-error").textContent = "";
  } catch (error) {
    the("list-error").textContent = error.message;
  }
}

function row(entry) {
  const { current } = entry;
  const about = [entry.model, `${number(current.tokens)} tokens`, ago(entry.created)].join(" · ");
  const name = make("span", { className: entry.name ? "name" : "name unnamed" }, label(entry));
  if (entry.pinned) name.append(make("span", { className: "badge" }, "pinned"));
  const link = make("a", { href: `#/m/${entry.id}` }, name, make("span", { className: "hint" }, about));
  return make("li", {}, link);
}

/** Mark the memory that is shown. */
export function mark() {
  for (const link of the("list").querySelectorAll("a")) {
    if (link.hash === location.hash) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function load(limit, after) {
  const begin = the("filter").value.trim().replaceAll("*", "");
  const page = await api.list({ limit, after, name: begin && `${begin}*` });
  if (begin !== the("filter").value.trim().replaceAll("*", "")) return; // the filter has changed meanwhile
  const rows = page.memories.map(row);
  if (after) the("list").append(...rows);
  else the("list").replaceChildren(...rows);
  next = page.next;
  the("more").hidden = next === null;
  the("list-empty").hidden = the("list").children.length > 0;
  the("list-empty").textContent = begin ? "No name begins with this." : "No memories yet. What you write appears here.";
  mark();
}

/** Reload the list, with as many entries as it showed. */
export const refresh = () => attempt(() => load(Math.min(1000, Math.max(PAGE, the("list").children.length))));

/** Store a memory file. */
export const upload = (file) =>
  attempt(async () => onUploaded(await api.upload(file)));

export function start(handlers) {
  ({ onUploaded } = handlers);
  the("more").onclick = () => attempt(() => load(PAGE, next));
  the("filter").oninput = () => {
    the("more").hidden = true; // it would go on with the list of the filter from before
    return attempt(() => load(PAGE));
  };
  the("memory-file").onchange = async ({ target }) => {
    if (target.files.length) await upload(target.files[0]);
    target.value = "";
  };
  return refresh();
}
