"""Commands that write and ask memories, as plain functions whose signatures are the options of the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoints import checkpoint_names, load, open_memory
from .console import console, device_named, dumps, progress_bar, read_stdin, read_text
from .errors import GradmemError, Missing
from .files import write_bytes
from .memory import Memory, Precision
from .records import written_texts
from .store import Store
from .tables import differences, provenance, receipt, receipts, restored, tokens_of
from .training.recipe import recipe_names
from .trust import Answer

NOT_HERE = "not in this memory"


def write(
    checkpoint: str,
    file: Path,
    output: Path | None = None,
    store: bool = False,
    name: str | None = None,
    tags: str = "",
    method: str | None = None,
    chunk: int | None = None,
    steps: int | None = None,
    until: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "float32",
    device: str = "cpu",
    options: dict[str, Any] | None = None,
) -> Memory:
    """Write a text file into a memory file and print the receipt.

    Parameters
    ----------
    checkpoint
        Name of a packaged checkpoint, directory, or hub name; or a plain language model, which needs no training.
    file
        Text to write; - for standard input.
    output
        Memory file (short: -o); default: memory.safetensors, or none where the store keeps the memory.
    store
        Keep the memory in the store; a text that it keeps already is not written again.
    name
        Name in the store.
    tags
        Tags in the store, as a,b.
    method
        For a plain language model: a method that needs no training; default: cram.
    chunk
        Cut the text after so many tokens. GradMem and RMT write the parts into one memory (see --chunks), other
        methods into a memory each; default: as in training, or what the model is for.
    steps
        Write steps; default: as many as the checkpoint was trained for.
    until
        Instead of steps: stop at this write loss, in mean nats per token.
    max_steps
        Most steps that `until` may take; default: 30, or as many as the method takes where that is more.
    precision
        Precision of the memory file.
    device
        Device to run on.
    options
        Options of the method, each by its own name: --n_mem 32 --inner_lr 0.03; of a checkpoint's method only
        --chunks sequential, independent or joint.
    """
    if not store and (name is not None or tags):
        raise GradmemError("names and tags are for memories in the store: add --store")
    given = ({"name": method} if method else {}) | (options or {})
    model = load(checkpoint, given or None).to(device_named(device))
    text = read_text(file)
    if chunk is not None and model.method.joins:
        model.choose({"chunk": chunk})
    texts = [text] if model.method.chunk is not None else model.chunks(text, chunk)
    settings: dict[str, Any] = {"steps": steps, "until": until, "max_steps": max_steps, "progress": progress_bar}
    if store:
        with Store() as keeper:
            entry = keeper.write(model, texts, precision=precision, name=name, tags=tags, **settings)
            data = keeper.read(entry.id)
    else:
        data = model.write(texts, **settings).to_bytes(precision)
    memory = model.bind(Memory.from_bytes(data))
    records = memory.records
    console.print(receipt(records[0], tokens_of(memory, text)) if len(memory) == 1 else receipts(records))
    size = f"{len(data)} bytes for {len(text.encode())} bytes of text"
    if store:
        console.print(f"kept {entry.label} ({entry.id}): {size}", markup=False, highlight=False, soft_wrap=True)
    if output or not store:
        console.print(f"saved {write_bytes(output or Path('memory.safetensors'), data)}: {size}")
    return memory


def ask(
    memory: Path, queries: list[str], jsonl: bool = False, abstain: bool = False, device: str = "cpu"
) -> list[str | None]:
    """Answer queries from a memory file alone.

    Parameters
    ----------
    memory
        Memory file, or id or name in the store.
    queries
        Queries; without any, one a line from standard input, answered as JSON lines.
    jsonl
        Print JSON lines also for queries given as arguments.
    abstain
        Say where the answer is not in the memory, and how sure each answer is.
    device
        Device to run on.
    """
    opened = _open(memory)
    if opened.model is None or len(opened) != 1:
        raise GradmemError(f"{memory} holds {len(opened)} memories; ask them from Python")
    model = opened.model.to(device_named(device))
    opened = model.bind(opened)
    if abstain and model.abstain is None:
        raise GradmemError(f"'{model.name}' was not calibrated: gradmem calibrate CHECKPOINT")
    if abstain and model.abstain and not model.abstain.holds(opened.records[0]):
        lengths = "{} to {}".format(*model.abstain.context_tokens)
        raise GradmemError(
            f"'{model.name}' was calibrated for contexts of {lengths} tokens, and {memory} is of "
            f"{opened.records[0].context_tokens}: calibrate it for such contexts, or leave out --abstain"
        )
    if not queries:
        queries, jsonl = [line for line in read_stdin().splitlines() if line.strip()], True
    if not queries:
        raise GradmemError("no query: give one as an argument or one a line on standard input")
    rows = (
        [_assessed(one) for one in opened.answer(queries)] if abstain else [{"answer": a} for a in opened.ask(queries)]
    )
    for query, row in zip(queries, rows, strict=True):
        shown = NOT_HERE if row["answer"] is None else row["answer"]
        print(json.dumps({"query": query, **row}, ensure_ascii=False) if jsonl else shown)
    return [row["answer"] for row in rows]


def _assessed(answer: Answer) -> dict[str, Any]:
    """An answer, or none where it is abstained from, with what speaks for it."""
    evidence = {name: round(getattr(answer, name), 4) for name in ("written", "logprob", "near_loss")}
    return {"answer": None if answer.abstained else answer.text, **evidence}


def restore(memory: Path, output: Path | None = None, context: Path | None = None, device: str = "cpu") -> str:
    """Read the text back from a memory file alone, and say how sure that is.

    Parameters
    ----------
    memory
        Memory file, or id or name in the store.
    output
        File for the text (short: -o); default: standard output.
    context
        The text that was written: shows where the restored one differs.
    device
        Device to run on.
    """
    opened = _open(memory)
    if opened.model is None:
        raise GradmemError(f"{memory} is bound to no model")
    model = opened.model.to(device_named(device))
    original = None if context is None else written_texts(read_text(context), opened.parts, str(context))
    ids = model.reconstruct(model.bind(opened), progress_bar)
    texts = [model.task.text(row) for row in ids]
    text = "".join(texts)
    if output:
        write_bytes(output, text.encode())
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    # Beside the text, not in it.
    notes = Console(stderr=True)
    notes.print(restored(opened.parts, texts))
    if original is not None:
        wanted = [original.get(record.context_sha256) for record in opened.parts]
        notes.print(differences(model.task, ids, wanted))
    return text


def inspect(memory: Path, context: Path | None = None, json: bool = False) -> Memory:
    """Show where a memory comes from and what it kept.

    Parameters
    ----------
    memory
        Memory file.
    context
        The text that was written: shows which of its tokens were lost. The memory itself holds no text.
    json
        Print the records as JSON.
    """
    loaded = Memory.load(memory)
    if json:
        print(dumps([record.row() for record in loaded.records]))
        return loaded
    text = read_text(context) if context else None
    texts = {} if text is None else written_texts(text, loaded.parts, str(context))
    bound = open_memory(memory) if texts else loaded
    for record in loaded.parts:
        console.print(provenance(record, loaded, memory))
        written = texts.get(record.context_sha256)
        console.print(receipt(record, None if written is None else tokens_of(bound, written)))
    return loaded


def _open(memory: Path) -> Memory:
    """Open a memory file or, where there is none, what the store keeps under this id or name."""
    if os.path.exists(memory):  # Path.exists raises for names that are too long
        return open_memory(memory)
    try:
        with Store(create=False) as store:
            return store.open(str(memory))
    except Missing as error:
        raise GradmemError(f"no memory file at {memory}, and {error}") from error


def show_list() -> None:
    """List the checkpoints and recipes in the package."""
    console.print("checkpoints: " + (", ".join(checkpoint_names()) or "none"), highlight=False)
    console.print("recipes: " + (", ".join(recipe_names()) or "none"), highlight=False)
