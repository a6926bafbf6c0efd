"""When to abstain from an answer, because nothing in the memory answers the query."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import refused
from ..files import write_bytes
from ..receipts import Receipt
from .reading import Answer

FILE = "abstain.safetensors"
FORMAT = 2
HIDDEN = 64
"""Width of the network."""
EPOCHS, FIT_BATCH = 20, 256
FEWEST_STEPS = 400
"""Fewest optimizer steps of a fit, however few the answers are."""
FOLDS = 4
"""Parts of the contexts; each is predicted by fits on the others."""
CERTAIN = 1e-6
"""Loss in nats below which a token counts as certain: float32 cannot tell such probabilities apart."""


NOTHING = Answer("", -1.0, -1.0, 0.0, 0.0)


def features(answer: Answer) -> dict[str, float]:
    """Numbers that the network reads: near certainty, log-odds differ more than log-probabilities do."""
    assert answer.near_loss is not None  # an upstream server answers without it, and nothing is judged there
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
    """A small network that estimates the probability that an answer was written.

    The network reads the `features` of an answer and the hidden states that predict its first and its last token. A
    model that was never trained to say "I do not know" answers every query, often with a likely answer; its hidden
    states still differ if nothing in the memory answers the query. A few hundred contexts say too little about so many
    numbers, so a fit reads the hidden states only if they help on contexts that are left out of it.

    Attributes
    ----------
    weights : dict of Tensor
        Mean and scale of the inputs, and the two layers of the network.
    checkpoint : str
        SHA-256 of the checkpoint that it was fitted for.
    context_tokens : tuple of int
        Lengths of the shortest and the longest context that it is valid for.
    threshold : float
        Abstain below this probability.
    fitted : dict
        What it was fitted on, as plain data.
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
        contexts: np.ndarray,
        checkpoint: str,
        context_tokens: tuple[int, int],
        fitted: dict[str, Any],
    ) -> Abstain:
        """Fit on answers that were written and answers that were not; both kinds have the same weight.

        Parameters
        ----------
        answers : sequence of Answer
        states : Tensor, shape (answers, 2 d)
            From `reading.answer`.
        written : array, bool, shape (answers,)
            Whether the answer was written.
        contexts : array, int64, shape (answers,)
            Number of the context whose memory was asked.
        """
        x, y = _inputs(answers, states), torch.tensor(written, dtype=torch.float)
        weight = torch.tensor(balanced(written), dtype=torch.float) * len(written)
        mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(CERTAIN)
        x, fold = (x - mean) / scale, torch.tensor(np.unique(contexts, return_inverse=True)[1]) % FOLDS

        def held_out_loss(width: int) -> float:
            total = 0.0
            for one in fold.unique().tolist() if len(fold.unique()) > 1 else []:
                rest, own = fold != one, fold == one
                score = _score(_layers(x[rest, :width], y[rest], weight[rest]), x[own, :width])
                total += float(F.binary_cross_entropy_with_logits(score, y[own], weight[own], reduction="sum"))
            return total

        # The features alone come first in a tie, as where all states are alike.
        width = min((len(features(NOTHING)), x.shape[1]), key=held_out_loss)
        layers = _layers(x[:, :width], y, weight)
        layers["first"] = F.pad(layers["first"], (0, x.shape[1] - width))
        about = {**fitted, "hidden_states": width == x.shape[1]}
        return cls({"mean": mean, "scale": scale, **layers}, checkpoint, context_tokens, fitted=about)

    def holds(self, receipt: Receipt) -> bool:
        """Whether it is valid for a memory: its context is as long as those of the fit, and nothing was appended."""
        shortest, longest = self.context_tokens
        return shortest <= receipt.context_tokens <= longest and not receipt.earlier

    def judge(self, answers: Sequence[Answer], states: Tensor) -> list[Answer]:
        """Add `written` and `abstained` to answers; `states` as for `fit`."""
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
            If the file cannot be written.
        """
        about = {"checkpoint": self.checkpoint, "context_tokens": self.context_tokens, "threshold": self.threshold}
        header = {"format": str(FORMAT), "about": json.dumps({**about, "fitted": self.fitted})}
        return write_bytes(directory / FILE, save(self.weights, header))

    @classmethod
    def load(cls, directory: Path) -> Abstain | None:
        """Load what `save` wrote; None if there is no file.

        Raises
        ------
        GradmemError
            If the file is damaged or has another format.
        """
        if not (directory / FILE).exists():
            return None
        with refused(f"{directory / FILE} is damaged (`gradmem calibrate` writes it anew)"):
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
        """Numbers of an answer's hidden states that it reads, 2 d."""
        return len(self.weights["mean"]) - len(features(NOTHING))


def _inputs(answers: Sequence[Answer], states: Tensor) -> Tensor:
    """Inputs of the network, shape (answers, features + 2 d)."""
    numbers = torch.tensor([list(features(answer).values()) for answer in answers])
    return torch.cat([numbers, states.cpu().float()], 1)


def _layers(x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Fit the two layers to inputs of shape (answers, width)."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"first": (HIDDEN, x.shape[1]), "first_bias": (HIDDEN,), "second": (HIDDEN,), "second_bias": ()}
    layers = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    with torch.enable_grad():
        for name in ("first", "second"):
            layers[name].data.normal_(0, layers[name].shape[-1] ** -0.5, generator=draw)
        optimizer = torch.optim.AdamW(layers.values(), lr=1e-3, weight_decay=1e-2)
        for _ in range(max(EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(len(x) / FIT_BATCH)))):
            for some in torch.randperm(len(x), generator=draw).split(FIT_BATCH):
                loss = F.binary_cross_entropy_with_logits(_score(layers, x[some]), y[some], weight[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {name: tensor.detach() for name, tensor in layers.items()}


def _score(layers: dict[str, Tensor], x: Tensor) -> Tensor:
    """Log-odds that each answer was written, shape (answers,)."""
    hidden = F.silu(F.linear(x, layers["first"], layers["first_bias"]))
    return hidden @ layers["second"] + layers["second_bias"]


def balanced(written: np.ndarray) -> np.ndarray:
    """Weights that give answers that were written, and those that were not, one half each.

    Parameters
    ----------
    written : array, bool, shape (answers,)

    Returns
    -------
    array, float64, shape (answers,), of sum 1
    """
    return np.where(written, 0.5 / max(1, written.sum()), 0.5 / max(1, (~written).sum()))
