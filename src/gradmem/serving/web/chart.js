// A line chart of the write loss after each step.
import { nats } from "./dom.js";

const [WIDTH, HEIGHT] = [380, 190];
const [LEFT, RIGHT, TOP, BOTTOM] = [38, 14, 14, 34];

function draw(svg, tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  svg.append(element);
}

/** Draw the losses after 0, 1, ... steps, up to `current`, in a chart with room for `steps`. */
export function drawLosses(svg, losses, steps, current) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const highest = Math.ceil(2 * Math.max(...losses) + 0.01) / 2;
  const lowest = Math.max(0, Math.floor(2 * Math.min(...losses, highest - 1)) / 2);
  const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / Math.max(1, steps);
  const y = (loss) => TOP + ((HEIGHT - TOP - BOTTOM) * (highest - loss)) / (highest - lowest || 1);
  const range = highest - lowest;
  const lines = range > 4 ? Math.ceil(range / 8) : 0.5; // at most a few lines, however large the losses of a file are
  for (let i = 0; i * lines <= range; i++) {
    const loss = lowest + i * lines;
    draw(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(loss), y2: y(loss) });
    draw(svg, "text", { class: "label", x: LEFT - 8, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(1));
  }
  const every = Math.ceil((steps + 1) / 11);
  for (let step = 0; step <= steps; step += every)
    draw(svg, "text", { class: "label", x: x(step), y: HEIGHT - 16, "text-anchor": "middle" }, step);
  draw(svg, "text", { class: "label", x: WIDTH - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, "write steps");
  const points = losses.map((loss, step) => [x(step), y(loss)]);
  draw(svg, "polyline", { class: "future", points: points.slice(current).join(" ") });
  draw(svg, "polyline", { class: "line", points: points.slice(0, current + 1).join(" ") });
  points.forEach(([cx, cy], step) =>
    draw(svg, "circle", { class: step > current ? "future" : "point", cx, cy, r: step === current ? 6 : 3.5 }),
  );
  const told = `${nats(losses[0])} nats before the first step`;
  svg.setAttribute("aria-label", current ? `${told}, ${nats(losses[current])} after ${current}` : told);
}
