// Asking a memory, with the evidence for each answer.
import * as api from "./api.js";
import { make, nats, the } from "./dom.js";

const [query, answers] = [the("query"), the("answers")];
let id = null;
let example = null; // { checkpoint, seed, queries } if the memory is of an example
let onMissing = () => {};

const kept = (id) => `gradmem-example-${id}`;

/** Remember the example of a memory by its seed, without its text. */
export const remember = (id, example) => example && sessionStorage.setItem(kept(id), JSON.stringify(example));

function evidence(answer) {
  const parts = [`log-probability ${nats(answer.logprob)}`, `margin ${nats(answer.margin)}`];
  if (answer.near_loss !== null) parts.push(`statement loss ${nats(answer.near_loss)} nats`);
  return make("p", { className: "hint" }, parts.join(" · "));
}

/** One answer. If the checkpoint is calibrated, with the probability that the answer was in the text. */
function item(asked, answer) {
  const row = make("li", {}, make("p", { className: "asked" }, asked));
  row.dataset.query = asked;
  row.dataset.answer = answer.text;
  if (answer.abstained) {
    row.classList.add("abstained");
    row.append(
      make("p", { className: "answer" }, "not in this memory"),
      make("p", { className: "guess" }, "best guess: ", make("q", {}, answer.text)),
    );
  } else {
    row.append(make("p", { className: "answer" }, answer.text || "(nothing)"));
  }
  if (answer.written !== null) {
    const meter = make("meter", { min: 0, max: 1, value: answer.written });
    const told = `${(100 * answer.written).toFixed(1)} %`;
    meter.setAttribute("aria-label", `Probability that the answer is in the memory: ${told}`);
    row.append(make("p", { className: "written" }, "in this memory: ", make("strong", {}, told), " ", meter));
  }
  row.append(evidence(answer));
  return row;
}

async function attempt(action) {
  the("ask-error").textContent = "";
  try {
    await action();
  } catch (error) {
    if (error.status === 404) onMissing();
    else the("ask-error").textContent = error.message;
  }
}

async function ask(queries) {
  const [of, found] = [id, await api.ask(id, queries)];
  if (of === id) answers.prepend(...found.map((answer, i) => item(queries[i], answer)).reverse());
}

/** Draw the example again, and mark which answers are right. */
async function check() {
  const found = await api.checkpoint(example.checkpoint, example.seed);
  const truth = new Map(found.example.questions.map((one) => [one.query, one.answer]));
  for (const row of answers.children) {
    row.querySelector(".truth")?.remove();
    if (!truth.has(row.dataset.query)) continue;
    const answer = truth.get(row.dataset.query);
    const exact = row.dataset.answer === answer;
    // A language model answers in a sentence: it may hold the true answer, and be wrong all the same.
    const right = exact || (found.task === "document" && row.dataset.answer.includes(answer));
    const told = exact ? "✓ right" : `${right ? "✓" : "✗"} the text said ${answer}`;
    row.querySelector(".answer").append(make("span", { className: `truth ${right ? "right" : "wrong"}` }, told));
  }
}

function showQuestions() {
  the("questions").hidden = !example;
  if (!example) return the("questions").replaceChildren();
  const chip = (label, action, className = "chip") =>
    make("button", { type: "button", className, onclick: () => attempt(action) }, label);
  return the("questions").replaceChildren(
    ...example.queries.map((one) => chip(one, () => ask([one]))),
    chip("Ask all", () => ask(example.queries.slice(0, 64)), "chip all"),
    chip("Check the answers", check, "chip all"),
  );
}

/** Prepare to ask a memory. */
export function open(wanted) {
  if (wanted !== id) {
    answers.replaceChildren();
    query.value = "";
    the("ask-error").textContent = "";
  }
  id = wanted;
  example = JSON.parse(sessionStorage.getItem(kept(id)));
  showQuestions();
}

export const focus = () => query.focus();

export function start(handlers) {
  ({ onMissing } = handlers);
  the("ask-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(async () => {
      if (!query.value.trim()) throw new api.Refused("Enter a question.");
      await ask([query.value]);
      query.value = "";
    });
  };
}
