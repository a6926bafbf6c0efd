"""How the tokens of an answer are chosen: the options that a request of its own has, within a batch of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .errors import GradmemError, require

MIN_TEMPERATURE = 1e-5
"""Below this temperature an answer is greedy: scores divided by less are no numbers any more."""


@dataclass(frozen=True)
class Sampling:
    """Options of one answer, by default a greedy one. They have the meaning that they have in OpenAI's API.

    Attributes
    ----------
    max_tokens : int, optional
        Most tokens of the answer, the end token included; by default as many as the task's answers have.
    temperature : float
        0 takes the likeliest token each time.
    top_p : float
        Tokens are drawn from the likeliest ones whose probabilities add up to this.
    seed : int, optional
        The same seed draws the same tokens.
    presence_penalty, frequency_penalty : float
        Subtracted from the score of each token that the answer has already: once, and for each time.
    logit_bias : mapping of int to float
        Added to the scores of tokens, by their ids.
    stop : tuple of str
        Texts that end the answer, which then has what comes before the first of them.
    top_logprobs : int, optional
        Whether log-probabilities are wanted, and of how many of the likeliest tokens at each place.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        require("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        require("temperature", self.temperature, self.temperature >= 0, "at least 0")
        require("top_p", self.top_p, 0 <= self.top_p <= 1, "from 0 to 1")
        require("stop", self.stop, all(self.stop), "texts that are not empty")

    @property
    def chooses(self) -> bool:
        """Whether any other token than the likeliest may be taken."""
        penalties = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(penalties) or self.temperature >= MIN_TEMPERATURE

    def cut(self, text: str) -> str:
        """The text up to the first of the texts that end it."""
        return text[: min((at for one in self.stop if (at := text.find(one)) >= 0), default=len(text))]

    def held_back(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of one that ends it."""
        longest = max(map(len, self.stop), default=1) - 1
        tails = range(min(longest, len(text)), 0, -1)
        return next((size for size in tails if any(one.startswith(text[-size:]) for one in self.stop)), 0)


class TokenChooser:
    """Chooses the tokens of one answer by changing their scores, so that a greedy search takes the chosen one.

    So answers with different options share a batch, and what is drawn for one does not depend on the others.

    Parameters
    ----------
    sampling : Sampling
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._warpers, self._generator = LogitsProcessorList(), None
        if sampling.temperature >= MIN_TEMPERATURE:
            self._generator = torch.Generator()  # on the CPU, so that a seed draws the same everywhere
            self._generator.seed() if sampling.seed is None else self._generator.manual_seed(sampling.seed)
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def choose(self, scores: Tensor) -> None:
        """Change the scores of the next token, shape (vocabulary,), in place."""
        bias = self.sampling.logit_bias
        if bias:
            if (last := max(bias)) >= len(scores):
                raise GradmemError(f"logit_bias names the token {last}, and the model has {len(scores)} tokens")
            scores[list(bias)] += torch.tensor(list(bias.values()), dtype=scores.dtype, device=scores.device)
        frequency, presence = self.sampling.frequency_penalty, self.sampling.presence_penalty
        if self._counts and (frequency or presence):
            less = [presence + frequency * count for count in self._counts.values()]
            scores[list(self._counts)] -= torch.tensor(less, dtype=scores.dtype, device=scores.device)
        if self._generator is not None:
            warped = self._warpers(torch.empty(1, 0, dtype=torch.long), scores[None])
            probabilities = warped[0].softmax(-1).cpu()
            if not bool(probabilities.isfinite().all()):
                raise GradmemError("no token can be drawn: the memory holds numbers that are not finite")
            chosen = torch.multinomial(probabilities, 1, generator=self._generator)
            scores.fill_(-torch.inf)[chosen.to(scores.device)] = 0.0

    def take(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[token] += 1


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes
    ----------
    text : str
    logprob : float
        Its log-probability under the model and the memory, nats, whatever the options of the answer are.
    likeliest : list of tuple
        Texts and log-probabilities of the likeliest tokens at its place.
    """

    text: str
    logprob: float
    likeliest: list[tuple[str, float]] = field(default_factory=list)
