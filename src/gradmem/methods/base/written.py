"""The result of WRITE: memories with their write losses and numbers of steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ...errors import GradmemError
from ...memory import Memory


@dataclass
class Written:
    """The result of writing contexts.

    Attributes
    ----------
    memory : Memory
        One row for each context.
    losses : Tensor, shape (steps, batch)
        Write loss of each sample before each step, differentiable in training. Without rows if the method has no
        write loss.
    taken : Tensor, int64, shape (batch,)
        Number of steps that each sample took.
    fidelity : list of dict or None, optional
        How well each memory answers, if the method measures it; see `Receipt.fidelity`.
    """

    memory: Memory
    losses: Tensor
    taken: Tensor
    fidelity: list[dict[str, float] | None] | None = None

    def rows(self) -> list[Written]:
        """Split the result into one for each context."""
        columns = zip(self.losses.split(1, 1), self.taken.split(1), strict=True)
        measured = [None] * len(self.taken) if self.fidelity is None else [[one] for one in self.fidelity]
        return [Written(self.memory[row], *own, measured[row]) for row, own in enumerate(columns)]


def last_state(trajectory: Iterable[Written]) -> Written:
    """Return the last state of a trajectory and discard the earlier ones, which may be hundreds of memories."""
    return deque(trajectory, maxlen=1).pop()


def compare_forms(memory: Memory, own: Memory, what: str) -> None:
    """Raise `GradmemError` unless a memory has the names and shapes of one that a method wrote itself."""
    found, wanted = ({name: tuple(t.shape[1:]) for name, t in m.tensors.items()} for m in (memory, own))
    if found != wanted:
        raise GradmemError(f"{what} holds {found}, but this method writes {wanted}")
