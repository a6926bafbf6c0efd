"""The answers that a request of OpenAI's API asks for, followed as they are generated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..model import Answer, BoundMemory
from ..sampling import Sampling, Token
from ..tasks.base import Conversation
from .engine import Engine
from .streaming import ProgressStream

LEAST_LOGPROB = -9999.0
"""What OpenAI's API says of a token that cannot come."""


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer, with its tokens if their log-probabilities are wanted."""

    choice: int
    text: str
    tokens: list[Token]


class Answers:
    """Several answers to one conversation.

    They are asked at once, so that they share a batch.

    Parameters
    ----------
    engine : Engine
    key : hashable
        Of the memory; see `Engine.ask`.
    memory : BoundMemory
    messages : list of dict
        The conversation.
    samplings : list of Sampling
        The options of each answer.

    Attributes
    ----------
    answers : list of Answer
        All answers, when `pieces` has ended.
    tokens : list of list of Token
        The tokens of each answer, if their log-probabilities are wanted.

    Raises
    ------
    Busy
        If too many requests are waiting.
    """

    def __init__(
        self, engine: Engine, key: Hashable, memory: BoundMemory, messages: Conversation, samplings: list[Sampling]
    ) -> None:
        self.answers: list[Answer] = []
        self.tokens: list[list[Token]] = [[] for _ in samplings]
        self.fingerprint = memory.model.fingerprints["checkpoint"][:16]
        self._progress = ProgressStream[tuple[int, str | Token]]()
        self._futures: list[Future[Answer]] = []
        try:
            for choice, sampling in enumerate(samplings):
                publish = partial(self._publish, choice)
                future = engine.ask(key, memory, messages, sampling=sampling, on_text=publish, on_token=publish)
                self._futures.append(future)
        except Exception:
            for future in self._futures:
                future.cancel()
            raise

    def _publish(self, choice: int, item: str | Token) -> None:
        self._progress.publish((choice, item))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answers piece by piece, at least one of each. Raises what is wrong with the conversation."""
        sent, told = [""] * len(self.tokens), [0] * len(self.tokens)

        def piece(choice: int, text: str) -> Piece:
            new = Piece(choice, text[len(sent[choice]) :], self.tokens[choice][told[choice] :])
            sent[choice], told[choice] = text, len(self.tokens[choice])
            return new

        begun = set()
        async for choice, item in self._progress.events(*self._futures):
            if isinstance(item, Token):
                self.tokens[choice].append(item)
            else:
                begun.add(choice)
                yield piece(choice, item)
        self.answers = [future.result() for future in self._futures]
        for choice, answer in enumerate(self.answers):
            if not answer.text.startswith(sent[choice]):
                raise RuntimeError("`Task.settled` returned a text that the answer does not begin with")
            rest = piece(choice, answer.text)
            if choice not in begun or rest.text or rest.tokens:
                yield rest

    async def finished(self) -> list[Answer]:
        """Wait for all answers. They are given up if this is cancelled."""
        async for _ in self.pieces():
            pass
        return self.answers


def logprobs_of(tokens: list[Token]) -> list[dict[str, Any]]:
    """Log-probabilities of tokens in the form of OpenAI's API."""
    return [
        {**_logprob(token.text, token.logprob), "top_logprobs": [_logprob(*other) for other in token.likeliest]}
        for token in tokens
    ]


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # A token may be a part of a character, whose bytes its text does not tell.
    whole = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "bytes": whole, "logprob": logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB}
