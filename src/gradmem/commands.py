"""The commands, as plain functions: the command line derives its options and help from these signatures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError

from .checkpoints import checkpoint_names, load, open_memory
from .errors import GradmemError, Missing
from .evaluation import calibrate as calibration
from .evaluation import compare as comparison
from .evaluation.evaluate import Result
from .evaluation.evaluate import evaluate as measure
from .evaluation.report import save_csv, save_json, steps_figure, table
from .evaluation.sweep import Point, bits_figure, pairs_figure
from .evaluation.sweep import steps_figure as heatmap_figure
from .evaluation.sweep import sweep as run_sweep
from .evaluation.sweep import table as sweep_table
from .memory import Memory, Precision, write_bytes, written_texts
from .model import MemoryModel
from .specs import build_task
from .store import Store
from .tables import differences, plan_table, provenance, receipt, receipts, restored, tokens_of
from .tasks.base import Split
from .training.recipe import Recipe, load_recipe, recipe_names
from .trust import Answer

console = Console()
NOT_HERE = "not in this memory"


class Ints(list[int]):
    """Whole numbers, written as `0,1,5` or `0..5`."""

    @classmethod
    def parse(cls, text: str | int | Sequence[int]) -> Ints:
        """Parse `0,1,5`, `0..5` or a mixture.

        Raises
        ------
        ValueError
            When it is neither.
        """
        if isinstance(text, int):
            return cls([text])
        if not isinstance(text, str):
            return cls(text)
        numbers: list[int] = []
        for part in text.split(","):
            first, dots, last = part.partition("..")
            numbers.extend(range(int(first), int(last) + 1) if dots else [int(first)])
        return cls(numbers)


def train(recipe: Recipe, output: Path, resume: Literal["auto", "never"] = "auto") -> None:
    """Train a recipe; the checkpoint is saved in OUTPUT/checkpoint after every stage.

    Parameters
    ----------
    recipe
        What to train.
    output
        Directory of the run: recipe, log (CSV and TensorBoard), resumable states, checkpoint.
    resume
        auto: continue from the newest state where there is one; never: refuse to.
    """
    with _training_packages():
        from .training.loop import Trainer
    try:
        trainer = Trainer(recipe, output, resume)
        trainer.run()
    except (OSError, SafetensorError) as error:
        raise GradmemError(f"cannot write to {output}: {error}; the last state is kept") from error
    except KeyboardInterrupt:
        raise GradmemError(f"interrupted; the same command continues from the last state in {output}") from None
    if trainer.main:
        console.print(f"checkpoint: {output / 'checkpoint'}")


def plan(recipe: Recipe, json: Path | None = None) -> list[dict[str, Any]]:
    """Measure how a recipe would train here: what is chosen for each stage, its seconds and its memory.

    Parameters
    ----------
    recipe
        What would be trained; nothing is.
    json
        Also save all trials to this file, as a list of rows.
    """
    with _training_packages():
        from .training.plan import plan_recipe
    rows: list[dict[str, Any]] = []
    plans = plan_recipe(recipe)
    for number, (stage, made) in enumerate(progress_bar(plans, "measuring", len(recipe.stages)), 1):
        about = {"stage": number, "tasks": stage.tasks, "write_steps": max(stage.write_steps), "steps": stage.max_steps}
        rows += [about | asdict(t) | {"chosen": t is made.chosen, "budget": made.budget} for t in made.trials]
    console.print(plan_table(rows))
    if json:
        console.print(f"saved {save_json(rows, json)}")
    return rows


def evaluate(
    checkpoint: str,
    pairs: Ints | None = None,
    steps: Ints | None = None,
    samples: int | None = None,
    seed: int = 1,
    split: Split = "test",
    precision: Precision = "float32",
    device: str = "cpu",
    json: Path | None = None,
    figure: Path | None = None,
    task: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
) -> list[Result]:
    """Measure exact match on fresh contexts, with control rows.

    Parameters
    ----------
    checkpoint
        Name of a packaged checkpoint, directory, or hub name.
    pairs
        Numbers of pairs, as 32,64; default: the checkpoint's own.
    steps
        Numbers of write steps, as 0,1,5 or 0..5, all read off one trajectory where chunks are not sequential;
        default: the checkpoint's own.
    samples
        Contexts; all of their queries are asked. Default: all of a test file, 1000 where contexts are generated.
    seed
        Seed of the contexts.
    split
        Split that the contexts are of.
    precision
        Precision that memories are stored in before they are read.
    device
        Device to run on.
    json
        Also save the results to this file, as a list of rows.
    figure
        Also draw exact match and write loss by step to this file (one number of pairs, or one task, only).
    task
        Options of the task that differ from the checkpoint's, each by its own name: --data DIR --tasks qa1,qa4.
    method
        How contexts are cut, where not as in training: --method.chunk 113 --method.chunks independent.
    """
    model = load(checkpoint, method).to(_device(device))
    given = [{**(task or {}), "pairs": n} for n in pairs] if pairs else [task or {}]
    built = [build_task({**model.spec["task"], **options}) for options in given]
    tasks = [{**options, **variant} for options, one in zip(given, built, strict=True) for variant in one.variants()]
    if figure and len(tasks) > 1:
        raise GradmemError("a figure by step shows one number of pairs, or one task: give one")
    results: list[Result] = []
    for options in tasks:
        results += measure(
            model,
            steps,
            samples,
            seed,
            split,
            options,
            convert=lambda memory: memory.rounded(precision),
            progress=progress_bar,
        )
    console.print(table(results))
    if json:
        console.print(f"saved {save_json([result.row() for result in results], json)}")
    if figure:
        title = f"{checkpoint}: {results[0].samples} fresh contexts, seed {seed}"
        console.print(f"saved {steps_figure(results, figure, title)}")
    for note in dict.fromkeys(note for one in built for note in one.notes(split)):
        console.print(note, markup=False, highlight=False)
    return results


def sweep(
    checkpoints: list[str],
    pairs: Ints | None = None,
    steps: Ints | None = None,
    samples: int = 500,
    valid_samples: int = 200,
    seed: int = 1,
    device: str = "cpu",
    json: Path | None = None,
    csv: Path | None = None,
    figure: Path | None = None,
    heatmap: Path | None = None,
    bits: Path | None = None,
) -> list[Point]:
    """Measure checkpoints at several numbers of pairs, after every number of steps up to many more than trained.

    Parameters
    ----------
    checkpoints
        Names of packaged checkpoints, directories, or hub names.
    pairs
        Numbers of pairs, as 4,8,16; default: each checkpoint's own.
    steps
        Numbers of write steps, as 0..30, all read off one trajectory; default: 0..30.
    samples
        Test contexts; all of their queries are asked.
    valid_samples
        Validation contexts, which choose the best number of steps.
    seed
        Seed of the contexts.
    device
        Device to run on.
    json
        Also save all results to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figure
        Also draw exact match by pairs to this file, beside the paper's.
    heatmap
        Also draw trained by evaluated steps to this file, beside the paper's.
    bits
        Also draw the bits that are recalled to this file, against those of the memory.
    """
    points: list[Point] = []
    for name in checkpoints:
        model = load(name).to(_device(device))
        own = getattr(model.task, "pairs", None)
        if own is None:
            raise GradmemError(f"'{name}' was trained on no number of pairs: a sweep is for key-value tasks")
        points += run_sweep(model, pairs or [own], steps or range(31), samples, valid_samples, seed, progress_bar)
    console.print(sweep_table(points))
    rows = [row for point in points for row in point.rows()]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        figure and pairs_figure(points, figure),
        heatmap and heatmap_figure(points, heatmap),
        bits and bits_figure(points, bits),
    ]
    for path in filter(None, saved):
        console.print(f"saved {path}")
    return points


def compare(
    systems: list[str],
    pairs: Ints | None = None,
    samples: int = 500,
    seed: int = 1,
    output: Path = Path("runs"),
    json: Path | None = None,
    csv: Path | None = None,
    figures: Path | None = None,
) -> list[comparison.Entry]:
    """Compare systems on the same contexts: what each stores, in how many bytes, at what cost.

    Parameters
    ----------
    systems
        Recipes, each trained in OUTPUT/NAME where that is not done yet, directories of earlier runs, and checkpoints.
    pairs
        Numbers of pairs; default: 4,8,16,32,64,96.
    samples
        Fresh contexts; all of their queries are asked.
    seed
        Seed of the contexts.
    output
        Directory of the runs.
    json
        Also save all numbers to this file, as a list of rows.
    csv
        Also save them to this file, as a table.
    figures
        Also draw exact match by pairs, by bytes and by the cost of a write, and the time of many queries, in this
        directory.
    """
    entries = comparison.compare(
        [_system(name, output) for name in systems],
        pairs or [4, 8, 16, 32, 64, 96],
        samples,
        seed,
        progress=progress_bar,
    )
    console.print(comparison.match_table(entries), comparison.cost_table(entries))
    rows = [entry.row() for entry in entries]
    saved = [
        json and save_json(rows, json),
        csv and save_csv(rows, csv),
        *(comparison.figures(entries, figures) if figures else []),
    ]
    for path in filter(None, saved):
        console.print(f"saved {path}")
    return entries


def _system(name: str, output: Path) -> tuple[MemoryModel, comparison.Training]:
    """Load a checkpoint, that of a run, or what a recipe trains."""
    run, packaged = Path(name), name in checkpoint_names()
    if not packaged and (name in recipe_names() or name.endswith((".yaml", ".yml"))):
        run = output / run.stem
        train(load_recipe(name), run)
    elif packaged or not (run / "checkpoint").is_dir():
        return load(name), comparison.Training()
    model = load(run / "checkpoint")
    model.name = run.name
    return model, comparison.Training.of(run)


def calibrate(
    checkpoint: str,
    samples: int = 100,
    seed: int = 1,
    device: str = "cpu",
    output: Path | None = None,
    json: Path | None = None,
    figure: Path | None = None,
    task: dict[str, Any] | None = None,
) -> calibration.Calibration:
    """Fit when a checkpoint abstains, on queries whose answer was and was not written, and measure it on fresh ones.

    Parameters
    ----------
    checkpoint
        Name of a packaged checkpoint, directory, or hub name; abstain.json is saved in a directory.
    samples
        Validation contexts to fit on, and as many test contexts to measure on.
    seed
        Seed of the contexts.
    device
        Device to run on.
    output
        Directory to save abstain.json in (short: -o); default: the checkpoint's.
    json
        Also save what was measured to this file.
    figure
        Also draw the reliability diagram to this file.
    task
        Options of the task that differ from the checkpoint's, each by its own name: --pairs 8.
    """
    directory = output or Path(checkpoint)
    if not directory.is_dir():
        raise GradmemError(f"'{directory}' is no directory to save abstain.json in: name one with -o")
    model = load(checkpoint).to(_device(device))
    found = calibration.calibrate(model, samples, seed, task, progress_bar)
    console.print(found.table())
    saved = [found.abstain.save(directory), json and save_json([found.row()], json), figure and found.figure(figure)]
    for path in filter(None, saved):
        console.print(f"saved {path}")
    return found


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
        --chunks sequential or independent.
    """
    if not store and (name is not None or tags):
        raise GradmemError("names and tags are for memories in the store: add --store")
    given = ({"name": method} if method else {}) | (options or {})
    model = load(checkpoint, given or None).to(_device(device))
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
    model = opened.model.to(_device(device))
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
        queries, jsonl = [line for line in _stdin().splitlines() if line.strip()], True
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
    model = opened.model.to(_device(device))
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


def read_text(path: Path) -> str:
    """Read a text file, or standard input for `-`.

    Raises
    ------
    GradmemError
        When it cannot be read or is not UTF-8.
    """
    if str(path) == "-":
        return _stdin()
    try:
        return path.read_bytes().decode()  # line ends as they are: a memory is of the text to the letter
    except UnicodeDecodeError as error:
        raise GradmemError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise GradmemError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _training_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise GradmemError(f"training needs more packages ({error.name}): pip install 'gradmem[train]'") from error


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise GradmemError(f"standard input is not UTF-8 text: {error.reason}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GradmemError(f"no device '{name}' here: {str(error).splitlines()[0]}") from error
    return device


def progress_bar(batches: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    quiet = Console(stderr=True)
    return track(batches, title, total, console=quiet, transient=True, disable=not quiet.is_terminal)


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1)
