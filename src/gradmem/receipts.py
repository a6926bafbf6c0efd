"""Receipts: who wrote a memory, from what, and how well; and the texts that were written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import GradmemError

LARGEST = 2**63 - 1
"""Largest integer in a receipt: databases and other programs cannot store larger ones."""
MOST_OPTIONS, DEEPEST = 1000, 8
"""Most values in the options of a receipt, and their deepest nesting."""


def _anything(value: object) -> bool:
    return True


def _integer(value: object) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def _floats(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is float or _integer(one) for one in value)


def _simple(options: dict[str, Any]) -> bool:
    """Whether options are few enough, not nested too deeply, and without integers that are too large."""
    level: list[Any] = [options]
    for _ in range(DEEPEST):
        if any(type(one) is int and not _integer(one) for one in level):
            return False
        nested = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list | tuple)
        ]
        level = [value for values in nested for value in values]
        if not level:
            return True
        if len(level) > MOST_OPTIONS:
            return False
    return False


LONGEST = 4096
"""Most characters of a string in a receipt; the longest may be the path of a model."""
Digest = str
"""A SHA-256 in hexadecimal digits."""
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str) and value.isprintable() and len(value) <= LONGEST,
    "Digest": lambda value: isinstance(value, str) and value.isprintable() and len(value) <= 64,
    "int": _integer,
    "bool": lambda value: isinstance(value, bool),
    "list[int]": lambda value: isinstance(value, list) and all(map(_integer, value)),
    "list[float]": _floats,
    "list[float] | None": lambda value: value is None or _floats(value),
    "dict[str, float] | None": lambda value: value is None or (isinstance(value, dict) and _floats([*value.values()])),
    "dict[str, Any]": lambda value: isinstance(value, dict) and _simple(value),
    "list[Receipt]": lambda value: not any(receipt.earlier for receipt in value),
}
"""Check of each field by its type, as anybody may have written the file that a receipt is read from."""


@dataclass(frozen=True)
class Author:
    """Who writes memories: the part of a receipt that all memories of a model share.

    Attributes
    ----------
    method, model, backbone, checkpoint, tokenizer, options
        As in `Receipt`.
    """

    method: str
    model: str
    backbone: Digest
    checkpoint: Digest
    tokenizer: Digest
    options: dict[str, Any]


@dataclass(frozen=True)
class Receipt:
    """Provenance and write receipt of one memory: who wrote it, from what, and how well.

    If a memory was written several times, this describes the last time, and `earlier` the times before.

    Attributes
    ----------
    method, model : str
        Name of the method, and name or path of the checkpoint or the plain language model.
    backbone, checkpoint, tokenizer : str
        SHA-256 of the backbone (its weights and config), of all weights and settings, and of the tokenizer.
    context_sha256 : str
        SHA-256 of the context text, UTF-8.
    context_tokens : int
    steps : int
        Write steps taken; for a text in chunks, those of the chunk that took most.
    inner_lr : list of float
        Inner learning rate of each memory vector, step after step if each step has its own; one number if all share
        it; empty if the method has none.
    losses : list of float
        Mean token loss before each step, over the tokens of all chunks that took it, and after the last step, nats.
    token_losses : list of float
        Loss of each context token under the final memory, nats. The tokens themselves are not stored.
    options : dict
        Options of the method that the checkpoint does not fix: all that were given to a plain language model's
        method, and those that were set for writing otherwise than in training.
    questions_sha256 : str
        SHA-256 of the user's own questions that the memory was fitted to; empty if there were none.
    chunks : list of int
        Tokens of each chunk that the text was cut into; empty if it was written whole.
    earlier : list of Receipt
        What was written into this memory before, in the order of writing.
    answers : list of float or None
        For each answer that the task finds in the text (`Task.examples`), the highest loss of one of its tokens when
        READ is asked for it, nats. None if this was not measured.
    fidelity : dict of float or None
        How well the memory answers, measured when it was written on `questions` that no writer had seen, with answers
        of `tokens` tokens in all. KL divergence, in nats per token, from the model with the whole text along its own
        greedy answers: `kl_unwritten` without the text, `kl_start` after the first writer, `kl` of this memory. How
        often the likeliest token is the same: `agreement_unwritten` without the text, `agreement` with this memory.
        None if this was not measured.
    measured : bool
        Whether the losses are those under this memory. False for earlier text that was not measured again after more
        was written into the same vectors: its losses are then those from before.
    """

    method: str
    model: str
    backbone: Digest
    checkpoint: Digest
    tokenizer: Digest
    context_sha256: Digest
    context_tokens: int
    steps: int
    inner_lr: list[float]
    losses: list[float]
    token_losses: list[float]
    options: dict[str, Any] = field(default_factory=dict)
    questions_sha256: Digest = ""
    chunks: list[int] = field(default_factory=list)
    earlier: list[Receipt] = field(default_factory=list)
    answers: list[float] | None = None
    fidelity: dict[str, float] | None = None
    measured: bool = True

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            if not _KINDS.get(str(field_.type), _anything)(getattr(self, field_.name)):
                raise ValueError(f"a receipt's {field_.name} must be {field_.type}")
        if not self.losses:
            raise ValueError("a receipt must have losses")
        if "name" in self.options:
            raise ValueError("a receipt's options must not contain the name of the method")
        if self.chunks and sum(self.chunks) != self.context_tokens:
            raise ValueError("a receipt's chunks must have as many tokens as its context")

    @classmethod
    def read(cls, data: dict[str, Any]) -> Receipt:
        """Build a receipt from plain data, as `dataclasses.asdict` gives it."""
        return cls(**{**data, "earlier": [cls.read(one) for one in data.get("earlier", [])]})

    @property
    def history(self) -> list[Receipt]:
        """Receipts of everything that was written into the memory, in the order of writing."""
        return [*self.earlier, self]

    LOST: ClassVar[float] = 0.6931471805599453
    """Loss in nats (ln 2) above which a token counts as lost: its probability is then below one half."""

    def complete(self, steps: int, until: float | None = None) -> bool:
        """Whether the text was written to its end: with so many steps, or down to the write loss `until`."""
        return self.steps >= steps or (until is not None and self.loss_after <= until)

    @property
    def loss_before(self) -> float:
        """Write loss before the first step."""
        return self.losses[0]

    @property
    def loss_after(self) -> float:
        """Write loss after the last step."""
        return self.losses[-1]

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain data, derived values included; `lost` is None if the losses are not of this memory."""
        earlier = [receipt.to_dict() for receipt in self.earlier]
        losses = {"loss_before": self.loss_before, "loss_after": self.loss_after}
        lost = {"lost": self.lost if self.measured else None, "at_risk": self.at_risk}
        return {**vars(self), "earlier": earlier, **losses, **lost}

    @property
    def lost(self) -> list[int]:
        """Positions of the tokens that the memory lost; if not `measured`, of those that it had lost before."""
        return self._beyond(self.token_losses)

    @property
    def at_risk(self) -> list[int] | None:
        """Numbers of the answers that may be wrong, because one of their tokens has a probability below one half.

        If none is at risk, every answer is right: each of its tokens is likelier than all others together. A memory
        may still lose tokens that no answer needs. None if this was not measured.
        """
        return None if self.answers is None else self._beyond(self.answers)

    def _beyond(self, losses: Sequence[float]) -> list[int]:
        return [i for i, loss in enumerate(losses) if loss > self.LOST]


def text_digest(text: str) -> str:
    """SHA-256 of a text, UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def questions_digest(questions: Sequence[str]) -> Digest:
    """SHA-256 of the user's own questions, UTF-8, one a line; empty if there are none."""
    return text_digest("\n".join(questions)) if questions else ""


def written_texts(text: str, receipts: Sequence[Receipt], what: str) -> dict[str, str]:
    """Find the texts of receipts in a text: the text of one receipt, or all their texts one after the other.

    Parameters
    ----------
    text : str
    receipts : sequence of Receipt
    what : str
        What messages call the text.

    Returns
    -------
    dict of str
        The texts by their SHA-256.

    Raises
    ------
    GradmemError
        If `text` is not what was written.
    """
    whole, hasher, begin = text_digest(text), hashlib.sha256(), 0
    if any(receipt.context_sha256 == whole for receipt in receipts):
        return {whole: text}
    found: dict[str, str] = {}
    characters = iter(enumerate(text, 1))
    for receipt in receipts:
        for end, character in characters:
            hasher.update(character.encode())
            if hasher.hexdigest() == receipt.context_sha256:
                found[receipt.context_sha256] = text[begin:end]
                hasher, begin = hashlib.sha256(), end
                break
    if begin < len(text) or any(receipt.context_sha256 not in found for receipt in receipts):
        raise GradmemError(f"{what} is not the text that was written")
    return found
