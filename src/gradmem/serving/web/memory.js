// One memory: its bytes, its receipt, and the actions on it.
import * as api from "./api.js";
import * as ask from "./ask.js";
import { drawLosses } from "./chart.js";
import { ago, bytes, count, make, nats, number, the } from "./dom.js";
import { blank } from "./heat.js";
import * as vectors from "./vectors.js";

/** Largest memory file, in bytes, whose numbers are drawn. */
const LARGE = 500_000;

const sizeOf = (id) => `gradmem-size-${id}`;

/** Remember how many bytes the text of a memory had, which the memory does not hold. */
export const remember = (id, size) => sessionStorage.setItem(sizeOf(id), size);

let shown = null; // its entry
let onChanged = () => {};

/** Name of a memory, as the page shows it. */
export const label = (entry) => entry.name ?? `unnamed ${entry.id.slice(0, 8)}`;

function missing() {
  shown = null;
  the("memory").hidden = true;
  the("gone").hidden = false;
  document.title = "deleted – gradmem";
  the("gone-title").focus();
}

async function attempt(action) {
  the("memory-error").textContent = the("memory-status").textContent = "";
  try {
    await action();
  } catch (error) {
    if (error.status === 404) missing();
    else the("memory-error").textContent = error.message;
  }
}

function showEntry(entry) {
  shown = entry;
  the("memory-title").textContent = label(entry);
  the("memory-about").textContent = [`Written by ${entry.model}`, ago(entry.created), ...entry.tags].join(" · ");
  the("pin").setAttribute("aria-pressed", entry.pinned);
  the("pin").textContent = entry.pinned ? "Pinned" : "Pin";
  document.title = `${label(entry)} – gradmem`;
}

/** Number of answers that may be wrong. A memory can lose tokens that no answer needs. */
function atRisk({ answers, at_risk }) {
  if (answers === null) return "not measured";
  return answers ? `${number(at_risk)} of ${number(answers)}` : "none known";
}

const FIDELITY = ["tokens", "agreement", "agreement_unwritten", "kl", "kl_unwritten"];

/** How close the answers are to those of the model with the whole text, over all tokens of all measured parts. */
function closeness(parts) {
  // A file may hold other numbers, or none.
  const measured = parts.map((part) => part.fidelity)
    .filter((one) => one && FIDELITY.every((name) => Number.isFinite(one[name])) && one.tokens > 0);
  if (!measured.length) return {};
  const tokens = measured.reduce((sum, one) => sum + one.tokens, 0);
  const mean = (name) => measured.reduce((sum, one) => sum + one.tokens * one[name], 0) / tokens;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  return {
    "As with the whole text": `${percent(mean("agreement"))} of ${count(tokens, "answer token")}, `
      + `${percent(mean("agreement_unwritten"))} without the text`,
    "KL to the whole text": `${nats(mean("kl"))} nats, ${nats(mean("kl_unwritten"))} without the text`,
  };
}

function showReceipt({ memory, memory_bytes, versions, receipts }) {
  const parts = receipts.flatMap((receipt) => [...receipt.earlier, receipt]);
  const last = parts.at(-1);
  const { current } = memory;
  drawLosses(the("receipt-chart"), last.losses, last.losses.length - 1, last.losses.length - 1);
  // A file may hold losses that are not finite. They are null in JSON, and count as lost.
  const measured = parts.filter((part) => part.measured); // of the others it is unknown what is kept
  blank(the("cells"), measured.flatMap((part) => part.token_losses.map((loss) => loss ?? Infinity)));
  const facts = {
    ...closeness(parts),
    "Write loss": `${nats(current.loss_before)} → ${nats(current.loss_after)} nats`,
    "Write steps": number(last.steps),
    "Answers at risk": atRisk(current),
    "Tokens kept": `${number(current.kept)} of ${number(current.tokens - current.unmeasured)}`
      + (current.unmeasured ? `, ${number(current.unmeasured)} not measured` : ""),
    "Memory": bytes(memory_bytes),
    "File": `${bytes(current.size)}, ${current.precision}`,
    "Version": `${current.number} of ${versions.length}`,
    "Checkpoint": `${memory.model} ${memory.checkpoint.slice(0, 12)}`,
    "Text, SHA-256": last.context_sha256.slice(0, 12),
    "Id": memory.id,
  };
  const rows = Object.entries(facts).map(([name, fact]) => make("div", {}, make("dt", {}, name), make("dd", {}, fact)));
  the("facts").replaceChildren(...rows);
}

const times = (size, mine) => (size >= mine ? `${number(Math.round(size / mine))} × as much` : "less than the memory");

/** Compare the memory with the KV-cache of its text, and with the text if this tab knows its size. */
async function showBytes({ memory, memory_bytes }) {
  the("remains").textContent = `${bytes(memory_bytes)} remain of ${count(memory.current.tokens, "token")}`;
  the("instead").textContent = the("text-size").textContent = "";
  the("bars").hidden = true;
  const about = await api.checkpoint(memory.model).catch(() => null); // the checkpoint may not be served here
  if (shown?.id !== memory.id) return;
  const sizes = { mine: memory_bytes };
  const text = Number(sessionStorage.getItem(sizeOf(memory.id)));
  if (text && memory.current.number === 1) {
    sizes.text = text;
    the("text-size").textContent = `The text had ${bytes(text)}, ${times(text, memory_bytes)}.`;
  }
  if (about?.token_cache_bytes) {
    sizes.theirs = about.token_cache_bytes * memory.current.tokens;
    const compared = times(sizes.theirs, memory_bytes);
    the("instead").textContent = `The KV-cache of the text would be ${bytes(sizes.theirs)}, ${compared}.`;
  }
  const largest = Math.max(...Object.values(sizes));
  for (const row of the("bars").children) row.hidden = !(row.dataset.of in sizes);
  for (const [of, size] of Object.entries(sizes)) the("bars").style.setProperty(`--${of}`, `${(100 * size) / largest}%`);
  the("bars").hidden = Object.keys(sizes).length < 2;
}

async function showVectors(entry) {
  the("vectors").hidden = true;
  if (entry.current.size > LARGE) return;
  const found = vectors.read(await api.download(entry.id));
  if (!found || shown?.id !== entry.id) return;
  vectors.draw(the("vectors"), found);
  the("vectors").hidden = false;
}

/** Show a memory, or a message that it does not exist. */
export async function open(id) {
  if (shown?.id !== id) close();
  let found;
  try {
    found = await api.inspect(id);
  } catch (error) {
    if (error.status === 404) missing();
    else the("open-error").textContent = error.message;
    return;
  }
  the("memory").hidden = false;
  showEntry(found.memory);
  showReceipt(found);
  ask.open(id);
  // Not awaited: the page must not take the focus from the user when the pictures arrive.
  attempt(() => Promise.all([showBytes(found), showVectors(found.memory)]));
}

/** Check whether the memory still exists, and update its name. */
export async function refresh() {
  if (!shown || !the("rename-form").hidden) return;
  await attempt(async () => {
    const { memory } = await api.inspect(shown.id);
    if (memory.id === shown?.id) showEntry(memory);
  });
}

async function change(changes) {
  showEntry(await api.change(shown.id, changes));
  onChanged();
}

async function save() {
  const data = await api.download(shown.id);
  const url = URL.createObjectURL(new Blob([data], { type: "application/octet-stream" }));
  make("a", { href: url, download: `${label(shown)}.safetensors` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function askToDelete() {
  the("delete-note").textContent = `“${label(shown)}” and all its versions will be deleted. This cannot be undone.`;
  the("delete-dialog").showModal();
}

async function remove() {
  the("delete-dialog").close();
  await api.remove(shown.id);
  shown = null;
  onChanged();
  location.hash = "#/";
}

/** Hide the memory. */
export function close() {
  shown = null;
  the("memory").hidden = the("gone").hidden = true;
  the("rename-form").hidden = true;
  the("rename").hidden = false;
  the("memory-error").textContent = the("memory-status").textContent = the("open-error").textContent = "";
}

export function start(handlers) {
  ({ onChanged } = handlers);
  ask.start({ onMissing: missing });
  const editing = (on) => {
    the("rename-form").hidden = !on;
    the("rename").hidden = on;
    if (on) the("new-name").value = shown.name ?? "";
    (on ? the("new-name") : the("rename")).focus();
  };
  the("rename").onclick = () => editing(true);
  the("rename-cancel").onclick = () => editing(false);
  the("rename-form").onkeydown = (event) => event.key === "Escape" && editing(false);
  the("rename-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(async () => {
      await change({ name: the("new-name").value.trim() || null });
      editing(false);
      the("memory-status").textContent = `Renamed to “${label(shown)}”.`;
    });
  };
  the("pin").onclick = () => attempt(() => change({ pinned: !shown.pinned }));
  the("download").onclick = () => attempt(save);
  the("delete").onclick = askToDelete;
  the("delete-yes").onclick = () => attempt(remove);
  the("delete-no").onclick = () => the("delete-dialog").close();
}
