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
from torch import Tensor

from .batch import Tokens
from .data.checked import read_json
from .errors import GradmemError
from .files import write_bytes
from .memory import LENGTHS

if TYPE_CHECKING:
    from .memory import Memory
    from .methods.base import Method
    from .prefix import Prefix
    from .records import Record

FILE = "abstain.json"
FORMAT = 1
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
        text by which a context says it (`Task.claim`), read as WRITE reads a context. It compares with the receipt's
        `loss_after`. The context itself is gone, so this needs nothing of it.
    written : float or None
        Probability that the answer was written, where queries of both kinds are equally frequent; None where the
        checkpoint was not calibrated (`gradmem calibrate`), or for contexts of other lengths.
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


def token_logprobs(method: Method, prefix: Prefix, queries: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
    """Log-probabilities of every token at the places of the answers' tokens, read in one pass.

    Parameters
    ----------
    prefix : Prefix
        One row for each query.
    queries, answers : list of list of int
        Token ids, at least one each.

    Returns
    -------
    list of Tensor, shapes (answer tokens, vocabulary)
    """
    device = prefix.last.device
    tokens = Tokens.from_lists([query + answer for query, answer in zip(queries, answers, strict=True)]).to(device)
    lengths = torch.tensor([len(query) for query in queries], device=device)
    asked = tokens.mask & (torch.arange(tokens.ids.shape[1], device=device) >= lengths[:, None])
    hidden = method.read_hidden(prefix, tokens)[:, :-1][asked]
    return list(method.backbone.head(hidden).float().log_softmax(-1).split([len(answer) for answer in answers]))


def claim_losses(method: Method, memory: Memory, claims: list[list[int]]) -> list[float]:
    """Mean token loss of a text under each row of a memory, as a write receipt counts it, nats.

    Where chunks of a context have vectors of their own, the text need stand in one of them: the least loss counts.
    """
    apart = method.apart(memory)
    counts = memory.tensors[LENGTHS].tolist() if len(apart) > len(memory) else [1] * len(memory)
    every = [claim for claim, count in zip(claims, counts, strict=True) for _ in range(count)]
    tokens = Tokens.from_lists(every).to(next(method.parameters()).device)
    losses = method.token_losses(apart, tokens).detach().float().sum(1) / tokens.lengths
    return [float(own.min()) for own in losses.split(counts)]


def assess(text: str, ids: list[int], logprobs: Tensor, near_loss: float) -> Answer:
    """An answer with its evidence, from `token_logprobs` and `claim_losses`."""
    taken = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
    first, second = logprobs[0].topk(2).values.tolist()
    return Answer(text, float(taken.mean()), float(taken.min()), first - second, near_loss)


def features(answer: Answer) -> dict[str, float]:
    """What abstaining goes by: near certainty, log-odds tell apart what log-probabilities hardly do."""
    return {
        "logprob": _log_odds(answer.logprob),
        "lowest": _log_odds(answer.lowest),
        "margin": answer.margin,
        "near_loss": answer.near_loss,
    }


def _log_odds(logprob: float) -> float:
    logprob = min(logprob, -CERTAIN)
    return logprob - math.log(-math.expm1(logprob))


@dataclass(frozen=True)
class Abstain:
    """When to abstain: the probability that an answer was written, by logistic regression on its `features`.

    Attributes
    ----------
    weights : dict of float
        By feature.
    bias, threshold : float
        Below the threshold of probability an answer is abstained from.
    checkpoint : str
        SHA-256 of the weights and settings that it was fitted for.
    context_tokens : tuple of int
        Lengths of the contexts that it holds for, the shortest and the longest. A memory of far fewer tokens is surer
        of all it says, also of what was never written: there it would be wrong, and says nothing.
    fitted : dict
        On what: plain data.
    """

    weights: dict[str, float]
    bias: float
    checkpoint: str
    context_tokens: tuple[int, int]
    threshold: float = 0.5
    fitted: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        answers: Sequence[Answer],
        written: np.ndarray,
        checkpoint: str,
        context_tokens: tuple[int, int],
        fitted: dict[str, Any],
    ) -> Abstain:
        """Fit on answers to queries that the memory does and does not hold; either kind weighs one half.

        Parameters
        ----------
        answers : sequence of Answer
        written : array, bool, shape (answers,)
            Whether the answer to the query was written.
        """
        names = list(features(answers[0]))
        x = torch.tensor([list(features(answer).values()) for answer in answers], dtype=torch.double)
        mean, scale = x.mean(0), x.std(0).clamp_min(CERTAIN)
        x, y = (x - mean) / scale, torch.tensor(written, dtype=torch.double)
        weight = torch.tensor(balanced(written))
        theta = torch.zeros(len(names) + 1, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            # Where the kinds can be told apart entirely, only the second term keeps the weights finite.
            fit = F.binary_cross_entropy_with_logits(x @ theta[1:] + theta[0], y, weight, reduction="sum")
            (total := fit + 1e-3 * theta[1:].square().sum()).backward()
            return total

        optimizer.step(loss)
        w = theta.detach()[1:] / scale
        bias = float(theta.detach()[0] - w @ mean)
        return cls(dict(zip(names, w.tolist(), strict=True)), bias, checkpoint, context_tokens, fitted=fitted)

    def holds(self, record: Record) -> bool:
        """Whether it was fitted for contexts as long as the one of this memory."""
        shortest, longest = self.context_tokens
        return shortest <= record.context_tokens <= longest

    def judge(self, answer: Answer) -> Answer:
        """The answer with `written` and `abstained`."""
        score = self.bias + sum(self.weights[name] * value for name, value in features(answer).items())
        written = float(torch.tensor(score).sigmoid())
        return dataclasses.replace(answer, written=written, abstained=written < self.threshold)

    def save(self, directory: Path) -> Path:
        """Save as `abstain.json` in a checkpoint's directory.

        Raises
        ------
        GradmemError
            When it cannot be written.
        """
        return write_bytes(directory / FILE, json.dumps({"format": FORMAT, **vars(self)}, indent=1).encode())

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
        try:
            found = read_json(directory / FILE)
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            shortest, longest = found.pop("context_tokens")
            loaded = cls(**found, context_tokens=(int(shortest), int(longest)))
            if loaded.weights.keys() != features(Answer("", -1, -1, 0, 0)).keys():
                raise ValueError("other features")
            loaded.judge(Answer("", -1, -1, 0, 0))
        except (GradmemError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise GradmemError(f"{directory / FILE} is damaged: {error}; run `gradmem calibrate` again") from error
        return loaded


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
