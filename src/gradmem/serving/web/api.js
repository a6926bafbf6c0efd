// Requests to the server that this page came from.
import { the } from "./dom.js";

const KEY = "gradmem-key";
const OFFLINE = "The server does not answer. Is `gradmem serve` still running?";

/** An error with the message of the server. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let asking = null;

/** Ask the user for a key, once for all waiting requests. */
function askKey(again) {
  const dialog = the("key-dialog");
  asking ??= new Promise((given, refused) => {
    if (again) the("key-note").textContent = "The server does not know this key. Try another one.";
    const end = () => {
      asking = null;
      the("key").value = "";
      dialog.close();
    };
    the("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, the("key").value.trim());
      end();
      given();
    };
    the("key-cancel").onclick = dialog.oncancel = () => {
      end();
      refused(new Refused("This server needs a key.", 401));
    };
    dialog.showModal();
  });
  return asking;
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(OFFLINE);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    // Another request may have asked for a key meanwhile.
    if (sessionStorage.getItem(KEY) === key) await askKey(key !== null);
    return send(path, options);
  }
  const told = await answer.json().catch(() => null);
  throw new Refused(told?.error?.message ?? `The server answered ${answer.status}.`, answer.status);
}

const json = (method, value, more) => ({
  method,
  body: JSON.stringify(value),
  headers: { "Content-Type": "application/json" },
  ...more,
});
const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value));
const memory = (id) => `v1/memories/${encodeURIComponent(id)}`;
const data = async (...request) => (await send(...request)).json();

export const checkpoints = () => data("v1/checkpoints");
export const checkpoint = (name, seed = 0) => data(`v1/checkpoints/${encodeURIComponent(name)}?seed=${seed}`);
export const list = (wanted) => data(`v1/memories?${query(wanted)}`);
export const inspect = (id) => data(memory(id));
export const change = (id, changes) => data(memory(id), json("PATCH", changes));
export const remove = (id) => send(memory(id), { method: "DELETE" });
export const upload = (file) => data("v1/memories/files", { method: "POST", body: file });
export const download = async (id) => (await send(`${memory(id)}/file`)).arrayBuffer();
export const ask = async (id, queries) => (await data(`${memory(id)}/ask`, json("POST", { queries }))).answers;

/** Write a text. Yields `[event, data]` for each event of the server; the last event is the memory. */
export async function* write(wanted, signal) {
  const answer = await send("v1/memories", json("POST", { ...wanted, stream: true, tokens: true }, { signal }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refused(OFFLINE);
    });
    if (done) throw new Refused("The server stopped before the memory was written.");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [event, told] = block.split("\n").map((line) => line.replace(/^\w+: /, ""));
      const found = JSON.parse(told);
      if (event === "error") throw new Refused(found.error.message);
      yield [event, found];
      if (event === "memory") return;
    }
  }
}
