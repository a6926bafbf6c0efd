// Writing a text into a memory, shown step by step, and forgetting the text.
import * as api from "./api.js";
import { drawLosses } from "./chart.js";
import { bytes, calm, count, nats, number, pause, the } from "./dom.js";
import { Heat, isKept } from "./heat.js";

/** Milliseconds for which each step is shown: a write is often too fast to watch. */
const PACE = 320;
const [text, name, steps] = [the("text"), the("name"), the("steps")];
const heat = new Heat(the("heat"), the("heat-detail"));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

let limit = Infinity; // bytes of a request
let about = null; // the checkpoint
let example = null; // { seed, queries } of the example in the text field
let seen = []; // losses of each token, after 0, 1, ... steps
let written = null; // { entry, steps }
let running = null; // AbortController of the current write
let onWritten = () => {};
let onForgotten = () => {};

const fail = (message) => (the("write-error").textContent = message);
const say = (message) => (the("write-status").textContent = message);

/** Show the write after so many steps. */
function showStep(step) {
  const [losses, first] = [seen[step], seen[0]];
  heat.paint(losses, first);
  drawLosses(the("watch-chart"), seen.map(mean), Math.max(seen.length - 1, Number(steps.value)), step);
  the("at-step").textContent = `${step} of ${Math.max(seen.length - 1, running ? Number(steps.value) : 0)}`;
  the("at-loss").textContent = nats(mean(losses));
  the("at-kept").textContent = `${number(losses.filter(isKept).length)} of ${number(losses.length)}`;
}

function showSteps() {
  the("steps-shown").textContent = steps.value;
  const other = written && Number(steps.value) !== written.steps;
  the("again").hidden = !other;
  the("again").textContent = `Write with ${count(Number(steps.value), "step")} instead`;
  if (written) showStep(Math.min(Number(steps.value), seen.length - 1));
}

/** Hide the steps of the last write: they no longer belong to the form. */
function reset() {
  the("watch").hidden = true;
  heat.show([]);
  seen = [];
  written = null;
  showSteps();
}

/** The beginning of a text: at most four lines and 120 characters. */
function beginning(text) {
  const found = text.split("\n").slice(0, 4).join("\n").slice(0, 120);
  return found.length < text.length ? `${found.replace(/\s+\S*$/, "")} …` : found;
}

/** Load the list of checkpoints. */
async function serve() {
  const served = await api.checkpoints();
  limit = served.max_body;
  the("checkpoint").replaceChildren(...served.checkpoints.map((one) => new Option(one)));
  await describe();
}

async function describe(seed) {
  const wanted = the("checkpoint").value;
  if (about?.name !== wanted) the("about").textContent = "Loading …";
  const found = await api.checkpoint(wanted, seed);
  if (the("checkpoint").value !== wanted) return null;
  if (about?.name !== found.name) {
    steps.max = Math.max(2 * found.write_steps, 1);
    steps.value = found.write_steps;
  }
  about = found;
  const { vectors, width, write_steps } = found;
  const size = vectors ? `${count(vectors, "vector")} of ${width} numbers, ${bytes(4 * vectors * width)}; ` : "";
  the("about").textContent =
    `Task ${found.task}: ${size}texts of up to ${number(found.max_tokens)} tokens, in ${count(write_steps, "step")}.`;
  the("example").hidden = !found.example;
  if (seed === undefined) {
    // Not the example that is being written, since its text must be forgotten.
    const like = found.example ? `. It looks like this:\n\n${beginning(found.example.text)}` : "";
    text.placeholder = `Paste a text, or drop a file here${like}`;
  }
  showSteps();
  return found;
}

async function attempt(action) {
  fail("");
  try {
    if (!about && action !== serve) await serve(); // it could not be loaded before, perhaps since the key was missing
    await action();
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled. Nothing was stored.");
    else {
      say("");
      fail(error.message);
    }
  }
}

async function fillExample() {
  const seed = Math.floor(Math.random() * 2 ** 31);
  const found = await describe(seed);
  if (!found?.example) return;
  reset();
  text.value = found.example.text;
  example = { seed, queries: found.example.questions.map((one) => one.query) };
  say("This example is new to the checkpoint. Press Write.");
}

/** Put a text file into the form. */
export function open(file) {
  return attempt(async () => {
    if (file.size > limit) throw new api.Refused(`The file has ${bytes(file.size)}; the server takes at most ${bytes(limit)}.`);
    let found;
    try {
      found = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      throw new api.Refused(`“${file.name}” is not UTF-8 text.`);
    }
    reset();
    example = null;
    text.value = found;
    say(`“${file.name}” is loaded. Press Write.`);
  });
}

function busy(on) {
  the("write-form").setAttribute("aria-busy", on);
  the("write-button").hidden = on;
  the("cancel").hidden = !on;
  for (const id of ["checkpoint", "name", "steps", "example", "text-file"]) the(id).disabled = on;
  text.readOnly = on;
}

/** Write the text. If it was written before with other steps, the new memory takes over the name. */
async function write(before = null) {
  const wanted = { text: text.value, checkpoint: the("checkpoint").value, steps: Number(steps.value) };
  if (!wanted.text.trim()) throw new api.Refused("There is no text yet: paste one, open a file or try an example.");
  const size = new Blob([wanted.text]).size;
  if (size > limit) throw new api.Refused(`The text has ${bytes(size)}; the server takes at most ${bytes(limit)}.`);
  const called = name.value.trim();
  if (called && !before) wanted.name = called;
  reset();
  running = new AbortController();
  busy(true);
  the("cancel").focus();
  say("Writing …");
  let shown = Promise.resolve();
  let entry = null;
  try {
    for await (const [event, told] of api.write(wanted, running.signal)) {
      if (event === "tokens") {
        heat.show(told.tokens);
      } else if (event === "step") {
        shown = shown.then(async () => {
          seen.push(told.token_losses);
          the("watch").hidden = false;
          showStep(seen.length - 1);
          if (seen.length === 1) the("watch").scrollIntoView({ block: "nearest" });
          await pause(calm() ? 0 : PACE);
        });
      } else {
        entry = told;
      }
    }
    the("cancel").hidden = true; // the memory is stored: the remaining steps are only shown
    await shown;
    if (before && called) {
      if (before.name === called) await api.change(before.id, { name: null });
      entry = await api.change(entry.id, { name: called });
    }
    written = { entry, steps: seen.length - 1, size };
    const next = before ? "The earlier memory stays in the list." : "Drag the slider back to see each step.";
    say(`Written in ${count(written.steps, "step")}. ${next}`);
    onWritten(entry);
  } finally {
    await shown;
    running = null;
    busy(false);
    if (!written) reset();
    else showSteps();
  }
  the("forget").focus({ preventScroll: true });
}

/** Remove the text from the page, and show the memory. */
async function forget() {
  const [id, size, asked] = [written.entry.id, written.size, example && { ...example, checkpoint: about.name }];
  the("watch").classList.add("forgetting");
  text.value = "";
  await pause(calm() ? 0 : 700);
  clear();
  the("watch").classList.remove("forgetting");
  onForgotten(id, asked, size);
}

function clear() {
  text.value = name.value = the("text-file").value = "";
  example = null;
  reset();
  say("");
}

/** Set up the form. The handlers run when a memory is written, and when its text is forgotten. */
export async function start(handlers) {
  ({ onWritten, onForgotten } = handlers);
  the("write-form").onsubmit = (event) => {
    event.preventDefault();
    if (!running) attempt(() => write());
  };
  the("cancel").onclick = () => running?.abort();
  the("again").onclick = () => attempt(() => write(written.entry));
  the("forget").onclick = forget;
  the("example").onclick = () => attempt(fillExample);
  the("text-file").onchange = (event) => event.target.files.length && open(event.target.files[0]);
  the("checkpoint").onchange = () => attempt(async () => {
    reset();
    await describe();
  });
  steps.oninput = showSteps;
  text.oninput = () => {
    example = null;
    say("");
    if (written) reset();
  };
  await attempt(serve);
}
