// Tokens, or their positions if the text is gone, coloured by how well a memory keeps them.
import { make, nats } from "./dom.js";

/** Loss, in nats, from which a token has the palest colour: the memory does not know it. */
const LOST = 5;
const [KEPT, PART] = [Math.log(2), Math.log(10)];
const MOST = 5000;

export const isKept = (loss) => loss <= KEPT;
const level = (loss) => (isKept(loss) ? "kept" : loss <= PART ? "part" : "lost");
const percent = (loss) => {
  const chance = 100 * Math.exp(-loss);
  return `${chance < 0.1 ? "under 0.1" : chance.toFixed(chance < 10 ? 1 : 0)} %`;
};

/** Colour elements by the losses of their tokens. */
export function paint(places, losses) {
  places.forEach((place, i) => {
    place.dataset.level = level(losses[i]);
    place.style.setProperty("--kept", `${(100 * Math.max(0, 1 - losses[i] / LOST)).toFixed(1)}%`);
  });
}

/** Show the positions of tokens without the tokens, at most the first `MOST`. */
export function blank(box, losses) {
  const shown = losses.slice(0, MOST);
  box.replaceChildren(...shown.map((loss) => make("span", { className: "token", title: `${nats(loss)} nats` })));
  paint([...box.children], shown);
  if (shown.length < losses.length) box.append("…");
  const kept = losses.filter(isKept).length;
  box.setAttribute("aria-label", `${kept} of ${losses.length} tokens kept`);
}

/** The tokens of a text, which can be inspected with the pointer and the keyboard. */
export class Heat {
  constructor(box, detail) {
    Object.assign(this, { box, detail, tokens: [], losses: [], first: [], current: null });
    const find = (event) => {
      const place = event.target.closest(".token");
      if (place) this.look([...box.children].indexOf(place));
    };
    box.addEventListener("pointerover", find);
    box.addEventListener("click", find);
    box.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
      if (!(event.key in moves) || !this.tokens.length) return;
      event.preventDefault();
      this.look(Math.min(Math.max((this.current ?? -1) + moves[event.key], 0), this.tokens.length - 1));
    });
  }

  /** Show tokens, in place of the present ones. */
  show(tokens) {
    Object.assign(this, { tokens, losses: [], first: [], current: null });
    this.box.replaceChildren(...tokens.map((token) => make("span", { className: "token" }, token)));
    this.detail.textContent = "";
  }

  /** Colour the tokens by losses; `first` are those of the unwritten memory. */
  paint(losses, first) {
    Object.assign(this, { losses, first });
    paint([...this.box.children], losses);
    [...this.box.children].forEach((place, i) => (place.title = `${nats(losses[i])} nats`));
    if (this.current !== null) this.look(this.current);
  }

  /** Describe how well one token is kept. */
  look(i) {
    this.box.children[this.current]?.classList.remove("current");
    this.box.children[i].classList.add("current");
    this.current = i;
    const [token, loss, first] = [this.tokens[i].trim(), this.losses[i], this.first[i]];
    const moved = loss === first ? `${nats(loss)} nats` : `from ${nats(first)} to ${nats(loss)} nats`;
    this.detail.textContent = `“${token}”, token ${i + 1}: ${moved}, the memory gives it ${percent(loss)}`;
  }
}
