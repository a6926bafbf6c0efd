"""Commands that write, ask, restore and inspect memories.

The signatures of the functions are the options of the command line. Modules that load PyTorch are imported inside the
functions, so that `--help` and `list` are fast.
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
from ..model.packaged import DOWNLOADABLE, checkpoint_names
from ..plugins import names as plugin_names
from ..receipts import Receipt, written_texts
from ..training.recipe import recipe_groups
from ..visible import shown_on
from .console import console, dumps, notes, progress_bar, read_stdin, read_text
from .long_texts import LongText, write_loss
from .memory_tables import (
    differences_table,
    provenance_table,
    receipt_table,
    receipts_table,
    restored_table,
    tokens_of,
)

ABSTAINED = "not in this memory"


def write(
    checkpoint: str,
    file: Path,
    output: Path | None = None,
    store: bool = False,
    name: str | None = None,
    tags: str = "",
    method: str | None = None,
    chunk_size: int | None = None,
    steps: int | None = None,
    until: float | None = None,
    max_steps: int | None = None,
    questions: Path | None = None,
    resume: bool = False,
    precision: Precision = "float32",
    device: str = "auto",
    options: dict[str, Any] | None = None,
) -> None:
    """Write a text file into a memory file and print the receipt.

    A plain language model (smollm2, a directory, a hub name or a GGUF file) writes any text with the method compact,
    and answers questions about it. The packaged checkpoints write key:value pairs (kv-32 and the like) and stories in
    the words of bAbI (babi). Ctrl-C stops after the current step and saves the memory as it is then, or the finished
    chunks of a long text; a second Ctrl-C saves nothing.

    Parameters
    ----------
    checkpoint
        Name of a checkpoint, directory or hub name of a checkpoint, or of a plain language model.
    file
        Text to write; - for standard input.
    output
        Memory file (short: -o). Default: memory.safetensors, or no file with --store.
    store
        Store the memory. A text that is stored already is not written again.
    name
        Name of the memory in the store.
    tags
        Tags of the memory in the store, separated by commas.
    method
        Method for a plain language model, one that needs no training. compact keeps a part of the model's key-value
        cache (--budget 0.1: a tenth; --budget 2MB) and answers questions. full_context keeps all of it. vectors fits a
        few vectors (--n_mem 32) that answer, less faithfully than compact and after minutes. cram fits vectors that
        recite the text word by word (gradmem restore) and do not answer questions. Default: compact.
    chunk_size
        Most tokens of a chunk of the text. GradMem and RMT write all chunks into one memory (see --chunk_mode), other
        methods write each into its own. Default: as in training, or the longest context of the model.
    steps
        Number of write steps. Default: as many as the checkpoint was trained for.
    until
        Stop at this write loss instead, in mean nats per token.
    max_steps
        Most steps that --until may take. Default: 30, or the number of steps of the method if that is more.
    questions
        File of questions that the memory should answer well, one a line. compact and vectors fit the memory to them,
        besides questions that fit any text; every fourth only measures.
    resume
        Take over from the memory file what the same model wrote with the same options and questions: write the chunks
        that are missing, or that have changed. Without the file everything is written.
    precision
        Precision of the memory file.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    options
        Options of the method, such as --budget 0.1 for compact or --n_mem 32 for vectors. A checkpoint takes only
        --chunk_mode sequential, independent or joint and, with GradMem, --gauss_newton_after 1: Gauss-Newton steps
        after the first.
    """
    if not store and (name is not None or tags):
        raise GradmemError("--name and --tags need --store")
    given = ({"name": method} if method else {}) | (options or {})
    text = read_text(file)
    asked = [] if questions is None else _questions(questions, text)
    model = gradmem.load(checkpoint, given or None).to(device_named(device))
    _freeze_objects()
    if chunk_size is not None and model.method.joins:
        model.configure({"chunk_size": chunk_size})
    texts = [text] if model.method.chunk_size is not None else model.encoder.chunks(text, chunk_size)
    settings: dict[str, Any] = {"steps": steps, "until": until, "max_steps": max_steps}
    if asked:
        settings["questions"] = asked
    path, entry = output or Path("memory.safetensors"), None
    with Interruptible() as stopped:
        job = LongText(model, texts, path, precision, stopped, settings)
        if resume and (told := job.resume()):
            _print_line(told)
        if store:
            entry, data = _write_to_store(job, name, tags)
        else:
            data = _written(job, save=True).to_bytes(precision)
    memory = model.bind(gradmem.Memory.from_bytes(data))
    receipts = memory.receipts
    console.print(receipt_table(receipts[0], tokens_of(memory, text)) if len(memory) == 1 else receipts_table(receipts))
    size = f"{len(data)} bytes for {len(text.encode())} bytes of text"
    if entry:
        _print_line(f"stored {entry.label} ({entry.id}): {size}")
    if output or not entry:
        _print_line(f"saved {write_bytes(output or Path('memory.safetensors'), data)}: {size}")
    _print_missed(receipts, until)
    for note in model.method.notes(memory):
        _print_line(f"note: {note}")
    if stopped:
        taken = max(receipt.steps for receipt in receipts)
        raise KeyboardInterrupt(f"saved the memory after {taken} write steps")


def _written(job: LongText, save: bool) -> gradmem.Memory:
    """Write one text step by step, or several chunk by chunk."""
    if len(job.texts) > 1 or not job.missing:
        return job.write(save)
    progress = partial(progress_bar, stop=job.stopped, detail=write_loss)
    return job.model.write(job.texts, **job.settings, progress=progress)


def _questions(file: Path, text: str) -> list[str]:
    """Read the user's own questions about a text, one a line."""
    from ..compaction.questions import check_language

    found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise GradmemError(f"{file} holds no question: give one a line")
    check_language(found, text)
    return found


def _write_to_store(job: LongText, name: str | None, tags: str) -> tuple[Any, bytes]:
    """Write texts and store the memory. Return its entry, which is None after an interruption, and its bytes."""
    from ..store import Store, content_hash

    limits = job.settings["steps"], job.settings["until"], job.settings["max_steps"]
    content = content_hash(job.model, job.texts, *limits, job.precision, job.settings.get("questions", ()))
    with Store() as kept:
        entry = kept.reuse(content, name=name, tags=tags)
        if entry is None:
            memory = _written(job, save=False)
            if job.stopped:
                return None, memory.to_bytes(job.precision)  # not stored: a complete write would give another memory
            entry = kept.put(memory, name=name, tags=tags, precision=job.precision, content=content)
        return entry, kept.read(entry.id)


def _print_missed(receipts: list[Receipt], until: float | None) -> None:
    """Print where the write loss of `until` was not reached."""
    missed = [receipt for receipt in receipts if until is not None and receipt.loss_after > until]
    if missed:
        worst = max(missed, key=lambda receipt: receipt.loss_after)
        where = f" in {len(missed)} of {len(receipts)} chunks" if len(receipts) > 1 else ""
        _print_line(
            f"missed --until {until:g}{where}: write loss {worst.loss_after:.4f} after {worst.steps} steps; raise "
            "--max_steps, or use shorter chunks or a larger memory"
        )


def _print_line(line: str) -> None:
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
        Memory file, or id or name of a stored memory.
    queries
        Queries. Default: the lines of standard input, answered as JSON lines.
    checkpoint
        Checkpoint that wrote the memory. Not needed for those that `gradmem list` shows.
    jsonl
        Print JSON lines for queries given as arguments too.
    abstain
        Print "not in this memory" instead of doubtful answers; in JSON lines also how certain each answer is.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    opened = _open(memory, checkpoint)
    if len(opened) != 1 and not opened.model.method.reads_together:
        raise GradmemError(f"{memory} holds {len(opened)} memories: ask them from Python")
    model = opened.model.to(device_named(device))
    opened = model.bind(opened)
    _freeze_objects()
    if abstain and model.abstain is None:
        raise GradmemError(f"'{model.name}' was not calibrated: gradmem calibrate CHECKPOINT")
    if abstain and model.abstain and not model.abstain.holds(opened.receipts[0]):
        lengths = "{} to {}".format(*model.abstain.context_tokens)
        raise GradmemError(
            f"'{model.name}' was calibrated for contexts of {lengths} tokens, and {memory} has "
            f"{opened.receipts[0].context_tokens}: calibrate it for such contexts, or omit --abstain"
        )
    if not queries:
        queries, jsonl = [line for line in read_stdin().splitlines() if line.strip()], True
    if not queries:
        raise GradmemError("no query: give queries as arguments, or as lines of standard input")
    rows = (
        [_with_evidence(one) for one in opened.answer(queries)]
        if abstain
        else [{"answer": a} for a in opened.ask(queries)]
    )
    for query, row in zip(queries, rows, strict=True):
        shown = ABSTAINED if row["answer"] is None else row["answer"]
        line = json.dumps({"query": query, **row}, ensure_ascii=False) if jsonl else shown
        print(shown_on(sys.stdout, line))


def _with_evidence(answer: gradmem.Answer) -> dict[str, Any]:
    """Return an answer (None if the model abstains) with its evidence, for JSON."""
    evidence = {name: round(getattr(answer, name), 4) for name in ("written", "logprob", "near_loss")}
    return {"answer": None if answer.abstained else answer.text, **evidence}


def restore(
    memory: Path,
    checkpoint: str | None = None,
    output: Path | None = None,
    context: Path | None = None,
    device: str = "auto",
) -> None:
    """Read the text back from a memory file alone, and print how certain it is.

    Parameters
    ----------
    memory
        Memory file, or id or name of a stored memory.
    checkpoint
        Checkpoint that wrote the memory. Not needed for those that `gradmem list` shows.
    output
        File for the text (short: -o). Default: standard output.
    context
        File of the original text, to show where the restored text differs.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    opened = _open(memory, checkpoint)
    model = opened.model.to(device_named(device))
    original = None if context is None else written_texts(read_text(context), opened.history, str(context))
    ids = model.bind(opened).reconstruct(progress_bar)
    texts = [model.task.text(row) for row in ids]
    text = "".join(texts)
    if output:
        write_bytes(output, text.encode())
    else:
        sys.stdout.write(shown_on(sys.stdout, text))
        sys.stdout.flush()
    # On standard error, so that standard output holds only the text.
    notes.print(restored_table(opened.history, texts))
    if original is not None:
        wanted = [original.get(receipt.context_sha256) for receipt in opened.history]
        notes.print(differences_table(model.task, ids, wanted))


def inspect(memory: Path, checkpoint: str | None = None, context: Path | None = None, json: bool = False) -> None:
    """Show who wrote a memory and what it keeps.

    Parameters
    ----------
    memory
        Memory file.
    checkpoint
        Checkpoint that wrote the memory, for --context. Not needed for those that `gradmem list` shows.
    context
        File of the original text, to show which of its tokens were lost. The memory file holds no text.
    json
        Print the receipts as JSON.
    """
    loaded = gradmem.Memory.load(memory)
    if json:
        print(dumps([receipt.to_dict() for receipt in loaded.receipts]))
        return
    text = read_text(context) if context else None
    texts = {} if text is None else written_texts(text, loaded.history, str(context))
    bound = gradmem.open(memory, checkpoint) if texts else None
    for receipt in loaded.history:
        console.print(provenance_table(receipt, loaded, memory))
        written = texts.get(receipt.context_sha256)
        console.print(receipt_table(receipt, tokens_of(bound, written) if bound and written is not None else None))


def _freeze_objects() -> None:
    """Exclude all present objects from garbage collection, which also makes the exit faster."""
    gc.freeze()


def _open(memory: Path, checkpoint: str | None) -> gradmem.BoundMemory:
    """Open a memory file or, if there is none, the stored memory of this id or name."""
    if os.path.exists(memory):  # Path.exists raises if a name is too long
        return gradmem.open(memory, checkpoint)
    from ..store import Store

    try:
        with Store(create=False) as store:
            return store.open(str(memory), checkpoint=checkpoint)
    except Missing as error:
        raise GradmemError(f"no memory file at {memory}, and {error}") from error


def show_list() -> None:
    """List checkpoints, recipes, methods and tasks: those of gradmem, and those of installed plug-ins."""
    here = checkpoint_names()
    _print_line("checkpoints: " + (", ".join(here) or "none"))
    if absent := sorted(DOWNLOADABLE.keys() - here):
        _print_line(f"checkpoints to download: {', '.join(absent)}")
    for group, recipes in recipe_groups().items():
        _print_line(f"recipes ({group}): {', '.join(recipes)}")
    for group in ("methods", "tasks"):
        _print_line(f"{group}: {', '.join(plugin_names(f'gradmem.{group}'))}")
