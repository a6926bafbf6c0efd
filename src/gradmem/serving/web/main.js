// Shows the part of the page that the address names: `#/` to write, `#/m/ID` for a memory.
import * as ask from "./ask.js";
import { the } from "./dom.js";
import * as list from "./list.js";
import * as memory from "./memory.js";
import * as write from "./write.js";

/** Tells the other tabs that the list has changed. */
const tabs = new BroadcastChannel("gradmem");

function changed() {
  list.refresh();
  tabs.postMessage("changed");
}

function refreshAll() {
  list.refresh();
  memory.refresh();
}

const wanted = () => location.hash.match(/^#\/m\/([^/]+)$/)?.[1];

async function route() {
  const id = wanted();
  the("write").hidden = Boolean(id);
  list.mark();
  if (id) {
    await memory.open(id);
    if (wanted() === id) scrollTo(0, 0);
  } else {
    memory.close();
    document.title = "gradmem";
  }
}

function go(id) {
  location.hash = `#/m/${id}`;
}

addEventListener("hashchange", async () => {
  const written = forgotten;
  forgotten = false;
  await route();
  if (written) ask.focus();
  else the(wanted() ? (the("gone").hidden ? "memory-title" : "gone-title") : "write-title").focus();
});

let forgotten = false;

list.start({
  onUploaded: (entry) => {
    changed();
    go(entry.id);
  },
});
memory.start({ onChanged: changed });
write.start({
  onWritten: changed,
  onForgotten: (id, example, size) => {
    ask.remember(id, example);
    memory.remember(id, size);
    forgotten = true;
    go(id);
  },
});
route();

tabs.onmessage = refreshAll;
addEventListener("focus", refreshAll);
document.addEventListener("visibilitychange", () => document.hidden || refreshAll());
the("to-memories").onclick = () => {
  the("memories").scrollIntoView();
  the("memories-title").focus({ preventScroll: true });
};

// A dropped file is uploaded or put into the form. The browser must not open it instead of the page.
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  document.body.classList.remove("dropping");
  if (!file) return;
  event.preventDefault();
  if (file.name.endsWith(".safetensors")) {
    list.upload(file);
  } else {
    location.hash = "#/";
    write.open(file);
  }
});
