"""How far to trust an answer: its probabilities, the write loss of what it says, and when to abstain."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..batch import Tokens
from ..errors import refused
from ..files import write_bytes
from ..memory import LENGTHS

if TYPE_CHECKING:
    from ..memory import Memory
    from ..methods.base import Method
    from ..prefix import Prefix
    from ..receipts import Receipt

FILE = "abstain.safetensors"
FORMAT = 2
HIDDEN = 64
"""Width of the network that says how likely an answer was written."""
EPOCHS, FIT_BATCH = 20, 256
CERTAIN = 1e-6
"""Nats below which a token counts as certain: float32 cannot tell such probabilities from one another."""


@dataclass(frozen=True)
class Answer:
    """An answer with what speaks for it. The tokens of an answer include the one that ends it.

    Attributes
    ----------
    text : str
    logprob, lowest : float
        Mean and lowest log-probability of the answer's tokens under the model and the memory, nats.
    margin : float
        Log-probability of the likeliest first token less that of the second, nats.
    near_loss : float
        What the write receipt would say of the query with this answer: mean token loss under the memory, nats, of the
        text by which a context says it (`Task.statement`), read as WRITE reads a context. It compares with the
        receipt's `loss_after`. The context itself is gone, so this needs nothing of it.
    written : float or None
        Probability that this answer was written for this query, where half of all answers were; None where the
        checkpoint was not calibrated (`gradmem calibrate`), for contexts of other lengths, and where text was appended.
    abstained : bool or None
        Whether that is too little to answer: the text is then better replaced by "not in this memory".
    finish_reason : {"stop", "length"}
        "stop" where the answer ended by itself, "length" where it was cut at the most tokens that it may have.
    query_tokens, answer_tokens : int
        Tokens that were read and generated.
    """

    text: str
    logprob: float
    lowest: float
    margin: float
    near_loss: float
    written: float | None = None
    abstained: bool | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    query_tokens: int = 0
    answer_tokens: int = 0


NOTHING = Answer("", -1.0, -1.0, 0.0, 0.0)


def read_answers(
    method: Method, prefix: Prefix, queries: list[list[int]], answers: list[list[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Read answers after their queries, all in one pass.

    Parameters
    ----------
    prefix : Prefix
        One row for each query.
    queries, answers : list of list of int
        Token ids, at least one each.

    Returns
    -------
    list of tuple of Tensor
        For each answer the log-probabilities of every token at the places of its tokens, shape (answer tokens,
        vocabulary), and the hidden states from which its first and its last token are predicted, shape (2 d,).
    """
    device = prefix.last.device
    tokens = Tokens.from_lists([query + answer for query, answer in zip(queries, answers, strict=True)]).to(device)
    lengths = torch.tensor([len(query) for query in queries], device=device)
    asked = tokens.mask & (torch.arange(tokens.ids.shape[1], device=device) >= lengths[:, None])
    hidden = method.read_hidden(prefix, tokens)[:, :-1][asked].split([len(answer) for answer in answers])
    return [(method.backbone.head(own).float().log_softmax(-1), own[[0, -1]].float().flatten()) for own in hidden]


def claim_losses(method: Method, memory: Memory, claims: list[list[int]]) -> list[float]:
    """Mean token loss of a text under each row of a memory, as a write receipt counts it, nats.

    Where chunks of a context have vectors of their own, the text need stand in one of them: the least loss counts.
    """
    apart = method.split_chunks(memory)
    counts = memory.tensors[LENGTHS].tolist() if len(apart) > len(memory) else [1] * len(memory)
    every = [claim for claim, count in zip(claims, counts, strict=True) for _ in range(count)]
    tokens = Tokens.from_lists(every).to(next(method.parameters()).device)
    losses = method.token_losses(apart, tokens).detach().float().sum(1) / tokens.lengths
    return [float(own.min()) for own in losses.split(counts)]


def assess(text: str, ids: list[int], logprobs: Tensor, near_loss: float) -> Answer:
    """An answer with its evidence, from `read_answers` and `claim_losses`."""
    taken = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
    first, second = logprobs[0].topk(2).values.tolist()
    return Answer(text, float(taken.mean()), float(taken.min()), first - second, near_loss)


def features(answer: Answer) -> dict[str, float]:
    """Numbers that abstaining goes by: near certainty, log-odds tell apart what log-probabilities hardly do."""
    return {
        "logprob": _log_odds(answer.logprob),
        "lowest": _log_odds(answer.lowest),
        "margin": answer.margin,
        "near_loss": answer.near_loss,
    }


def _log_odds(logprob: float) -> float:
    logprob = min(logprob, -CERTAIN)
    return logprob - math.log(-math.expm1(logprob))


@dataclass(frozen=True, eq=False)
class Abstain:
    """When to abstain: the probability that an answer was written, by a small network.

    The network reads the `features` of an answer and the hidden states from which READ predicts its first and its last
    token. A model that was never taught to say "I do not know" gives every query some answer, often a likely one; its
    hidden states still differ where nothing in the memory answers.

    Attributes
    ----------
    weights : dict of Tensor
        Mean and scale of the inputs, and the two layers of the network.
    checkpoint : str
        SHA-256 of the weights and settings that it was fitted for.
    context_tokens : tuple of int
        Lengths of the contexts that it holds for, the shortest and the longest.
    threshold : float
        Below this probability an answer is abstained from.
    fitted : dict
        On what: plain data.
    """

    weights: dict[str, Tensor]
    checkpoint: str
    context_tokens: tuple[int, int]
    threshold: float = 0.5
    fitted: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        answers: Sequence[Answer],
        states: Tensor,
        written: np.ndarray,
        checkpoint: str,
        context_tokens: tuple[int, int],
        fitted: dict[str, Any],
    ) -> Abstain:
        """Fit on answers that were and were not written; either kind weighs one half.

        Parameters
        ----------
        answers : sequence of Answer
        states : Tensor, shape (answers, 2 d)
            As `read_answers` gives them.
        written : array, bool, shape (answers,)
            Whether the answer was written.
        """
        x, y = _inputs(answers, states), torch.tensor(written, dtype=torch.float)
        weight = torch.tensor(balanced(written), dtype=torch.float) * len(written)
        mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(CERTAIN)
        draw = torch.Generator().manual_seed(0)
        shapes = {"first": (HIDDEN, x.shape[1]), "first_bias": (HIDDEN,), "second": (HIDDEN,), "second_bias": ()}
        layers = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
        with torch.enable_grad():
            for name in ("first", "second"):
                layers[name].data.normal_(0, layers[name].shape[-1] ** -0.5, generator=draw)
            optimizer = torch.optim.AdamW(layers.values(), lr=1e-3, weight_decay=1e-2)
            for _ in range(EPOCHS):
                for some in torch.randperm(len(x), generator=draw).split(FIT_BATCH):
                    score = _score(layers, (x[some] - mean) / scale)
                    loss = F.binary_cross_entropy_with_logits(score, y[some], weight[some])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        weights = {"mean": mean, "scale": scale, **{name: tensor.detach() for name, tensor in layers.items()}}
        return cls(weights, checkpoint, context_tokens, fitted=fitted)

    def holds(self, receipt: Receipt) -> bool:
        """Whether it was fitted for contexts as long as the one of this memory, which were written at once."""
        shortest, longest = self.context_tokens
        return shortest <= receipt.context_tokens <= longest and not receipt.earlier

    def judge(self, answers: Sequence[Answer], states: Tensor) -> list[Answer]:
        """The answers with `written` and `abstained`; `states` as for `fit`."""
        x = (_inputs(answers, states) - self.weights["mean"]) / self.weights["scale"]
        written = _score(self.weights, x).sigmoid().tolist()
        return [
            dataclasses.replace(answer, written=own, abstained=own < self.threshold)
            for answer, own in zip(answers, written, strict=True)
        ]

    def save(self, directory: Path) -> Path:
        """Save as `abstain.safetensors` in a checkpoint's directory.

        Raises
        ------
        GradmemError
            When it cannot be written.
        """
        about = {"checkpoint": self.checkpoint, "context_tokens": self.context_tokens, "threshold": self.threshold}
        header = {"format": str(FORMAT), "about": json.dumps({**about, "fitted": self.fitted})}
        return write_bytes(directory / FILE, save(self.weights, header))

    @classmethod
    def load(cls, directory: Path) -> Abstain | None:
        """Load what `save` wrote; None where there is nothing.

        Raises
        ------
        GradmemError
            When the file is damaged or of another format.
        """
        if not (directory / FILE).exists():
            return None
        with refused(f"{directory / FILE} is damaged (`gradmem calibrate` makes another)"):
            with safe_open(directory / FILE, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != str(FORMAT):
                    raise ValueError("another format")
                about = json.loads(header["about"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            shortest, longest = about.pop("context_tokens")
            loaded = cls(weights, context_tokens=(int(shortest), int(longest)), **about)
            loaded.judge([NOTHING], torch.zeros(1, loaded.width))
        return loaded

    @property
    def width(self) -> int:
        """Numbers that it reads of an answer's hidden states, 2 d."""
        return len(self.weights["mean"]) - len(features(NOTHING))


def _inputs(answers: Sequence[Answer], states: Tensor) -> Tensor:
    """What the network reads, shape (answers, features + 2 d)."""
    numbers = torch.tensor([list(features(answer).values()) for answer in answers])
    return torch.cat([numbers, states.cpu().float()], 1)


def _score(layers: dict[str, Tensor], x: Tensor) -> Tensor:
    """Log-odds that answers were written, shape (answers,)."""
    hidden = F.silu(F.linear(x, layers["first"], layers["first_bias"]))
    return hidden @ layers["second"] + layers["second_bias"]


def balanced(written: np.ndarray) -> np.ndarray:
    """Weights under which queries whose answer was written and the others count one half each.

    Parameters
    ----------
    written : array, bool, shape (answers,)

    Returns
    -------
    array, float64, shape (answers,), of sum 1
    """
    return np.where(written, 0.5 / max(1, written.sum()), 0.5 / max(1, (~written).sum()))
