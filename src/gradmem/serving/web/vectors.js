// The vectors of a memory, read from its file and drawn as rows of cells.

/** The numbers of the first memory in a safetensors file, as `{ rows, width, values }`; null if the memory has another form. */
export function read(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const about = header.memory;
  if (about?.dtype !== "F32" || about.shape.length !== 3) return null;
  const [, rows, width] = about.shape;
  const start = 8 + length + about.data_offsets[0];
  return { rows, width, values: new Float32Array(buffer.slice(start, start + 4 * rows * width)) };
}

/** Draw the numbers: negative ones in one colour, positive ones in another. */
export function draw(canvas, { rows, width, values }) {
  canvas.width = width;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const scale = values.map(Math.abs).sort()[Math.floor(0.98 * values.length)] || 1;
  const { data } = context.createImageData(width, rows);
  values.forEach((value, i) => {
    const colour = value > 0 ? [43, 124, 190] : [222, 139, 47];
    data.set([...colour, 255 * Math.min(1, Math.abs(value) / scale)], 4 * i);
  });
  context.putImageData(new ImageData(data, width, rows), 0, 0);
  canvas.setAttribute("aria-label", `The memory: ${rows} vectors of ${width} numbers`);
}
