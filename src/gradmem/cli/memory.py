"""Commands that write and ask memories, as plain functions whose signatures are the options of the command line.

What computes is imported where it is used, so that `--help` and `list` need not wait for it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gradmem

from ..choices import Precision
from ..device import device_named
from ..errors import GradmemError, Missing
from ..files import write_bytes
from ..interruption import Interruptible
from ..model.packaged import checkpoint_names
from ..receipts import Receipt, written_texts
from ..training.recipe import recipe_names
from ..visible import shown_on
from .console import console, dumps, notes, progress_bar, read_stdin, read_text
from .memory_tables import differences, provenance, receipt_table, receipts_table, restored, tokens_of

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
    device: str = "auto",
    options: dict[str, Any] | None = None,
) -> None:
    """Write a text file into a memory file and print the receipt.

    The packaged checkpoints take key:value pairs (kv-32 and the like) and stories in the words of bAbI (babi). A plain
    language model takes any text: cram makes it recite that text, and does not teach it to answer questions about it.
    Ctrl-C stops after the step at hand and saves the memory as it is then; a second one saves nothing.

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
        For a plain language model: a method that needs no training; default: cram, which recites the text, and does not
        answer questions about it.
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
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    options
        Options of the method, each by its own name: --n_mem 32 --inner_lr 0.03; of a checkpoint's method only
        --chunks sequential, independent or joint.
    """
    if not store and (name is not None or tags):
        raise GradmemError("names and tags are for memories in the store: add --store")
    given = ({"name": method} if method else {}) | (options or {})
    text = read_text(file)
    model = gradmem.load(checkpoint, given or None).to(device_named(device))
    _settle()
    if chunk is not None and model.method.joins:
        model.configure({"chunk": chunk})
    texts = [text] if model.method.chunk is not None else model.chunks(text, chunk)
    settings: dict[str, Any] = {"steps": steps, "until": until, "max_steps": max_steps}
    kept = None
    with Interruptible() as stopped:
        settings["progress"] = partial(progress_bar, stop=stopped, detail=_loss)
        if store:
            kept, data = _keep(model, texts, precision, name, tags, stopped, settings)
        else:
            data = model.write(texts, **settings).to_bytes(precision)
    memory = model.bind(gradmem.Memory.from_bytes(data))
    receipts = memory.receipts
    console.print(receipt_table(receipts[0], tokens_of(memory, text)) if len(memory) == 1 else receipts_table(receipts))
    size = f"{len(data)} bytes for {len(text.encode())} bytes of text"
    if kept:
        _say(f"kept {kept.label} ({kept.id}): {size}")
    if output or not kept:
        _say(f"saved {write_bytes(output or Path('memory.safetensors'), data)}: {size}")
    _tell_missed(receipts, until)
    if model.method.caution:
        _say(f"note: {model.method.caution}")
    if stopped:
        taken = max(receipt.steps for receipt in receipts)
        raise KeyboardInterrupt(f"what was saved is the memory after {taken} write steps")


def _keep(
    model: gradmem.MemoryModel,
    texts: list[str],
    precision: Precision,
    name: str | None,
    tags: str,
    stopped: Interruptible,
    settings: dict[str, Any],
) -> tuple[Any, bytes]:
    """Entry in the store and bytes of the memory of texts; no entry where writing was interrupted."""
    from ..store import Store, content_hash

    content = content_hash(model, texts, settings["steps"], settings["until"], settings["max_steps"], precision)
    with Store() as keeper:
        entry = keeper.reuse(content, name=name, tags=tags)
        if entry is None:
            memory = model.write(texts, **settings)
            if stopped:
                return None, memory.to_bytes(precision)  # not what the next write of this text would give
            entry = keeper.put(memory, name=name, tags=tags, precision=precision, content=content)
        return entry, keeper.read(entry.id)


def _loss(written: gradmem.Written) -> str:
    return f"write loss {float(written.losses[-1].mean()):.4f}" if len(written.losses) else ""


def _tell_missed(receipts: list[Receipt], until: float | None) -> None:
    """Say where the write loss that was asked for was not reached."""
    missed = [receipt for receipt in receipts if until is not None and receipt.loss_after > until]
    if missed:
        worst = max(missed, key=lambda receipt: receipt.loss_after)
        where = f" in {len(missed)} of {len(receipts)} chunks" if len(receipts) > 1 else ""
        _say(
            f"missed --until {until:g}{where}: write loss {worst.loss_after:.4f} after {worst.steps} steps; raise "
            "--max_steps, or give shorter chunks or more memory"
        )


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def ask(
    memory: Path,
    queries: list[str],
    checkpoint: str | None = None,
    jsonl: bool = False,
    abstain: bool = False,
    device: str = "auto",
) -> None:
    """Answer queries from a memory file alone.

    A memory that cram wrote recites its text and does not answer questions: gradmem restore reads the text back.

    Parameters
    ----------
    memory
        Memory file, or id or name in the store.
    queries
        Queries; without any, one a line from standard input, answered as JSON lines.
    checkpoint
        The model that wrote the memory; not needed where that is a checkpoint of the package.
    jsonl
        Print JSON lines also for queries given as arguments.
    abstain
        Say where the answer is not in the memory, and how sure each answer is.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    """
    opened = _open(memory, checkpoint)
    if opened.model is None or len(opened) != 1:
        raise GradmemError(f"{memory} holds {len(opened)} memories; ask them from Python")
    model = opened.model.to(device_named(device))
    opened = model.bind(opened)
    _settle()
    if abstain and model.abstain is None:
        raise GradmemError(f"'{model.name}' was not calibrated: gradmem calibrate CHECKPOINT")
    if abstain and model.abstain and not model.abstain.holds(opened.receipts[0]):
        lengths = "{} to {}".format(*model.abstain.context_tokens)
        raise GradmemError(
            f"'{model.name}' was calibrated for contexts of {lengths} tokens, and {memory} is of "
            f"{opened.receipts[0].context_tokens}: calibrate it for such contexts, or leave out --abstain"
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
        line = json.dumps({"query": query, **row}, ensure_ascii=False) if jsonl else shown
        print(shown_on(sys.stdout, line))


def _assessed(answer: gradmem.Answer) -> dict[str, Any]:
    """An answer, or none where it is abstained from, with what speaks for it."""
    evidence = {name: round(getattr(answer, name), 4) for name in ("written", "logprob", "near_loss")}
    return {"answer": None if answer.abstained else answer.text, **evidence}


def restore(
    memory: Path,
    checkpoint: str | None = None,
    output: Path | None = None,
    context: Path | None = None,
    device: str = "auto",
) -> None:
    """Read the text back from a memory file alone, and say how sure that is.

    Parameters
    ----------
    memory
        Memory file, or id or name in the store.
    checkpoint
        The model that wrote the memory; not needed where that is a checkpoint of the package.
    output
        File for the text (short: -o); default: standard output.
    context
        The text that was written: shows where the restored one differs.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    """
    opened = _open(memory, checkpoint)
    if opened.model is None:
        raise GradmemError(f"{memory} is bound to no model")
    model = opened.model.to(device_named(device))
    original = None if context is None else written_texts(read_text(context), opened.history, str(context))
    ids = model.reconstruct(model.bind(opened), progress_bar)
    texts = [model.task.text(row) for row in ids]
    text = "".join(texts)
    if output:
        write_bytes(output, text.encode())
    else:
        sys.stdout.write(shown_on(sys.stdout, text))
        sys.stdout.flush()
    # Beside the text, not in it.
    notes.print(restored(opened.history, texts))
    if original is not None:
        wanted = [original.get(receipt.context_sha256) for receipt in opened.history]
        notes.print(differences(model.task, ids, wanted))


def inspect(memory: Path, checkpoint: str | None = None, context: Path | None = None, json: bool = False) -> None:
    """Show where a memory comes from and what it kept.

    Parameters
    ----------
    memory
        Memory file.
    checkpoint
        With a text: the model that wrote the memory; not needed where that is a checkpoint of the package.
    context
        The text that was written: shows which of its tokens were lost. The memory itself holds no text.
    json
        Print the receipts as JSON.
    """
    loaded = gradmem.Memory.load(memory)
    if json:
        print(dumps([receipt.to_dict() for receipt in loaded.receipts]))
        return
    text = read_text(context) if context else None
    texts = {} if text is None else written_texts(text, loaded.history, str(context))
    bound = gradmem.open(memory, checkpoint) if texts else loaded
    for receipt in loaded.history:
        console.print(provenance(receipt, loaded, memory))
        written = texts.get(receipt.context_sha256)
        console.print(receipt_table(receipt, None if written is None else tokens_of(bound, written)))


def _settle() -> None:
    """Tell the garbage collector that what was imported and loaded stays: also at exit it need not search that."""
    gc.freeze()


def _open(memory: Path, checkpoint: str | None) -> gradmem.Memory:
    """Open a memory file or, where there is none, what the store keeps under this id or name."""
    if os.path.exists(memory):  # Path.exists raises for names that are too long
        return gradmem.open(memory, checkpoint)
    from ..store import Store

    try:
        with Store(create=False) as store:
            return store.open(str(memory), checkpoint=checkpoint)
    except Missing as error:
        raise GradmemError(f"no memory file at {memory}, and {error}") from error


def show_list() -> None:
    """List the checkpoints and recipes in the package."""
    _say("checkpoints: " + (", ".join(checkpoint_names()) or "none"))
    _say("recipes: " + (", ".join(recipe_names()) or "none"))
