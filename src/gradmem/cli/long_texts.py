"""Write the chunks of a long text one after the other: stopped by Ctrl-C, saved now and then, and resumed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradmem

from ..choices import Precision
from ..errors import GradmemError
from ..files import write_bytes
from ..interruption import Interruptible
from ..receipts import Receipt
from .console import progress_bar

SAVE_SECONDS, SAVE_TIMES = 60.0, 20
"""Least seconds between two saves of what is finished, and how many times as long as a save this must be."""


class LongText:
    """The chunks of a text, and the rows of those that are written.

    Parameters
    ----------
    model : MemoryModel
    texts : list of str
        The chunks.
    path : Path
        Memory file, for what is finished.
    precision : {"float32", "float16", "int8"}
        Precision of the file.
    stopped : Interruptible
        Ends the writing after the current step.
    settings : dict
        `steps`, `until`, `max_steps` and other arguments of `MemoryModel.write`.
    """

    def __init__(
        self,
        model: gradmem.MemoryModel,
        texts: list[str],
        path: Path,
        precision: Precision,
        stopped: Interruptible,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.texts, self.path, self.precision = model, texts, path, precision
        self.stopped, self.settings = stopped, settings
        self.limits = {name: settings[name] for name in ("steps", "until", "max_steps")}
        self.shown = ""
        self.rows: list[gradmem.Memory | None] = [None] * len(texts)
        self.longest = max(len(model.encoder.context_ids(text)) for text in texts)  # refuses a bad text before the work

    @property
    def missing(self) -> list[int]:
        """Numbers of the chunks that are not written."""
        return [number for number, row in enumerate(self.rows) if row is None]

    @property
    def memory(self) -> gradmem.BoundMemory:
        """What is finished, in the order of the text."""
        return self.model.bind(gradmem.Memory.join([row for row in self.rows if row is not None]))

    def resume(self) -> str | None:
        """Take over what the file holds already, and return a line that says how much; None if there is no file.

        Raises
        ------
        GradmemError
            If the file has another precision, to which its chunks were rounded.
        """
        from ..memory import read_bytes, stored_precision

        if not self.path.exists():
            return None
        data = read_bytes(self.path)
        memory = gradmem.Memory.from_bytes(data, str(self.path))
        if (found := stored_precision(data)) != self.precision:
            raise GradmemError(f"{self.path} holds {found}: resume with --precision {found}, or write another file")
        given = {**self.limits, "questions": self.settings.get("questions", ())}
        self.rows = self.model.finished(memory, self.texts, **given)
        taken, all_of = len(self.texts) - len(self.missing), len(self.texts)
        why = ": it has no others of this text with these options and questions" if self.missing else ""
        return f"took over {taken} of {all_of} chunks from {self.path}{why}"

    def write(self, save: bool) -> gradmem.BoundMemory:
        """Write the missing chunks and return the whole memory.

        Parameters
        ----------
        save : bool
            Whether to save now and then.

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C; it says what was saved.
        """
        if missing := self.missing:
            receipts = self._write(missing, save)
            if self.model.method.texts_at_once(self.longest) == 1:
                receipts = progress_bar(receipts, "writing chunks", len(missing), detail=fidelity)
            for _ in receipts:
                pass
        if not self.missing:
            return self.memory
        done = len(self.texts) - len(self.missing)
        if not done:
            raise KeyboardInterrupt("no chunk was finished, so nothing is saved")
        self._save()
        raise KeyboardInterrupt(
            f"saved {done} of {len(self.texts)} chunks in {self.path}: the same command with --resume goes on"
        )

    def _write(self, missing: list[int], save: bool) -> Iterator[Receipt]:
        """Write chunks, as many at once as fit, up to an interruption; yield the receipts of finished ones."""
        size, saved, took = self.model.method.texts_at_once(self.longest), time.monotonic(), 0.0
        most = self.model.most_steps(**self.limits)
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            self.shown = f"writing {some[-1] + 1} of {len(self.texts)}"
            memory = self.model.write([self.texts[i] for i in some], **self.settings, progress=self._steps)
            for place, number in enumerate(some):
                if memory.receipts[place].complete(most, self.settings["until"]):
                    self.rows[number] = gradmem.Memory.join([memory[place]])
                    yield memory.receipts[place]
            if self.stopped:
                return
            if save and time.monotonic() - saved > max(SAVE_SECONDS, SAVE_TIMES * took) and some[-1] != missing[-1]:
                began = time.monotonic()
                self._save()
                saved, took = time.monotonic(), time.monotonic() - began

    def _steps(self, steps: Iterable[Any], title: str, total: int) -> Iterator[Any]:
        """Show the steps of a batch; chunks that are written one by one have a bar of chunks instead."""
        if self.model.method.texts_at_once(self.longest) > 1:
            yield from progress_bar(steps, self.shown, total, stop=self.stopped, detail=write_loss)
            return
        for step in steps:
            yield step
            if self.stopped:
                return

    def _save(self) -> None:
        write_bytes(self.path, self.memory.to_bytes(self.precision))


def write_loss(written: gradmem.Written) -> str:
    """What a progress bar says of a write step."""
    return f"write loss {float(written.losses[-1].mean()):.4f}" if len(written.losses) else ""


def fidelity(receipt: Receipt) -> str:
    """What a progress bar says of the last chunk."""
    if (found := receipt.fidelity) is None:
        return f"write loss {receipt.loss_after:.4f}"
    return f"last one: KL {found['kl']:.3f} (without the text {found['kl_unwritten']:.3f})"
