"""What the board has measured so far, in a file: a stopped run goes on from there, or ends with fewer texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import GradmemError
from ..files import save_json
from .board_rows import Key, Outcome


@dataclass
class Done:
    """A text that was measured.

    Attributes
    ----------
    text : str
        Hash of the text and its questions.
    ids : list of list of int
        The first tokens of each answer with the whole text.
    answers : list of str
        The answers with the whole text.
    outcomes : dict of Outcome
        By writer and budget.
    """

    text: str
    ids: list[list[int]]
    answers: list[str]
    outcomes: dict[Key, Outcome]


class Kept:
    """A file of texts that were measured.

    Parameters
    ----------
    path : Path, optional
        The file; None keeps nothing.
    board : dict
        Plain data that is the same for the same board: only the texts of this board are taken over.
    wanted : sequence of str
        Hashes of the board's texts, see `Done`. The file may hold the first of them, or more than them.

    Attributes
    ----------
    texts : list of Done
        What the file holds of these texts.

    Raises
    ------
    GradmemError
        If the file is damaged, or of another board.
    """

    def __init__(self, path: Path | None, board: Mapping[str, Any], wanted: Sequence[str]) -> None:
        self.path, self.board = path, dict(board)
        found = [] if path is None or not path.exists() else self._read(path)
        self._more = len(found) > len(wanted)
        self.texts = found[: len(wanted)]
        if [one.text for one in self.texts] != list(wanted[: len(found)]):
            raise self._foreign(path)

    def _read(self, path: Path) -> list[Done]:
        try:
            found = json.loads(path.read_bytes())
            same = found["board"] == self.board
            texts = [
                Done(
                    one["text"],
                    one["ids"],
                    one["answers"],
                    {(name, budget): Outcome(**own) for name, budget, own in one["own"]},
                )
                for one in found["texts"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GradmemError(f"{path} is damaged: delete it to measure everything anew") from error
        if not same:
            raise self._foreign(path)
        return texts

    @staticmethod
    def _foreign(path: Path | None) -> GradmemError:
        return GradmemError(
            f"{path} is of another board (model, texts, writers or budgets): delete it, or give another --json"
        )

    def save(self, texts: list[Done]) -> None:
        """Write the file anew; a process that is killed while it does leaves the file from before."""
        if self.path is not None:
            save_json({"board": self.board, "texts": [_plain(one) for one in texts]}, self.path)
            self.texts = list(texts)

    def remove(self) -> None:
        """Delete the file, unless it holds texts that this board did not want."""
        if self.path is not None and not self._more:
            self.path.unlink(missing_ok=True)


def _plain(done: Done) -> dict[str, Any]:
    own = [[*key, asdict(outcome)] for key, outcome in done.outcomes.items()]
    return {"text": done.text, "ids": done.ids, "answers": done.answers, "own": own}
