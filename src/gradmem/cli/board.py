"""The command `board`. Modules that import PyTorch are imported inside the function."""

from __future__ import annotations

from pathlib import Path

import gradmem

from ..device import device_named
from ..errors import GradmemError
from ..files import save_json
from .console import console, progress_bar

MADE_UP = "made-up"
"""The name of the data that is no file."""


def board(
    model: str,
    data: str = MADE_UP,
    max_words: int = 200,
    contexts: int = 100,
    questions: int = 4,
    writers: str = "select,match,compact",
    budgets: str = "0.2,0.1,0.05",
    seed: int = 1,
    device: str = "auto",
    json: Path | None = None,
    answers: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Compare ways of compressing a text: how well a language model answers from what each leaves, by bytes and time.

    The whole cache (full), no text (none) and the memory of another text (swapped) are always measured. With --json a
    stopped run goes on where it was when the same command is given again, also with more or fewer contexts.

    Parameters
    ----------
    model
        Language model as for `gradmem write`, or checkpoint of the method full_context.
    data
        File of texts with questions: JSON lines of one question each (context, question, answers) or of one context
        each (context, qas), or SQuAD's JSON. Or made-up: reports about things that do not exist.
    max_words
        Most words of a text; longer ones are left out.
    contexts
        Texts, drawn at random.
    questions
        Most questions of a text.
    writers
        What to measure: any of select, match, study, compact, which is what gradmem write does by default, and vectors.
    budgets
        Fractions of the whole cache to keep. Vectors have one size.
    seed
        Seed of the texts.
    device
        Device to run on: auto for the accelerator if there is one; or cpu, cuda, cuda:1.
    json
        Also save the rows to this file, with intervals of all scores. Until then a file beside it, whose name ends with
        .partial, keeps what is measured.
    answers
        Also save every text, question and answer to this file.
    figure
        Also draw the gap closed and exact match by bytes to this file.
    """
    from ..data.made_up import made_up_texts
    from ..data.question_files import choose_texts, read_texts
    from ..evaluation.board import measure
    from ..evaluation.board_figure import board_figure
    from .board_tables import board_table

    fractions = [_fraction(text) for text in budgets.split(",")]
    if data == MADE_UP:
        # As they come: with fewer contexts a stopped run ends with its first texts.
        texts = choose_texts(made_up_texts(contexts, max_words, seed), contexts, questions, seed=None)
    else:
        texts = choose_texts(read_texts(Path(data)), contexts, questions, max_words, seed)
    loaded = gradmem.load(model, {"name": "full_context"}).to(device_named(device))
    about = {"model": Path(model).name, "data": Path(data).name, "max_words": max_words, "seed": seed}
    names = [name.strip() for name in writers.split(",")]
    kept = json.with_name(f"{json.name}.partial") if json else None
    measured = measure(loaded, texts, names, fractions, about, progress_bar, kept)
    title = (
        f"{about['model']}: {measured.rows[0]['questions']} questions on {len(texts)} texts of up to {max_words} "
        f"words, {about['data']}, seed {seed}"
    )
    console.print(board_table(measured.rows, title))
    if json:
        console.print(f"saved {save_json(measured.rows, json)}")
    if answers:
        console.print(f"saved {save_json(measured.answers, answers)}")
    if figure:
        console.print(f"saved {board_figure(measured.rows, figure, title)}")


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise GradmemError(f"budgets are fractions such as 0.2,0.1, and '{text}' is none") from error
