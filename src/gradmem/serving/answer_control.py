"""Control of the answers of one batch while they are generated: each obeys the options of its own request."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import torch
from torch import Tensor

from ..generation import RowControl
from ..sampling import Token, TokenChooser
from ..tasks.base import Task
from .engine_requests import AskRequest
from .errors import Closed


class AnswerControl(RowControl):
    """Lets each answer of a batch choose its tokens, tell its listeners what can be shown, and end.

    Parameters
    ----------
    requests : list of AskRequest
    task : Task
    too_late : callable
        Whether the engine has no more time for answers.
    """

    def __init__(self, requests: list[AskRequest], task: Task, too_late: Callable[[], bool]) -> None:
        self.too_late = too_late
        self.answers = [GrowingAnswer(request, task) for request in requests]
        self.ids = [answer.ids for answer in self.answers]
        self.running: list[GrowingAnswer] = []

    def begin(self, rows: list[int]) -> None:
        """Take the answers that the next scores and tokens belong to."""
        self.running = [self.answers[row] for row in rows]

    def choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Change the scores so that the highest is that of the token which each answer chooses."""
        for answer, own in zip(self.running, scores, strict=True):
            if not answer.ended:
                answer.guarded(answer.choose, own)
        return scores

    def ended(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Give each answer its next token.

        Raises
        ------
        CancelledError
            If nobody wants any of the answers.
        Closed
            If the engine has no more time.
        """
        for answer, token in zip(self.running, ids[:, -1].tolist(), strict=True):
            if not answer.ended or not answer.ids:  # no answer is without a token, not even one that failed
                answer.guarded(answer.take, token)
        if all(answer.unwanted for answer in self.answers):
            raise CancelledError
        if self.too_late():
            raise Closed("the engine is closed")
        return torch.tensor([answer.ended for answer in self.running], device=ids.device)

    def cut(self, row: int, text: str) -> str:
        """The text before the first of the texts that end the answer."""
        return self.answers[row].request.sampling.cut(text)


class GrowingAnswer:
    """An answer while it is generated.

    Parameters
    ----------
    request : AskRequest
    task : Task
    """

    def __init__(self, request: AskRequest, task: Task) -> None:
        self.request, self.task = request, task
        self.ids: list[int] = []
        self.ended = False
        self._chooser = TokenChooser(request.sampling) if request.sampling.chooses else None
        self._shown, self._shown_tokens = "", 0
        self._logprobs: Tensor | None = None
        self._tokens: list[Token] = []

    @property
    def unwanted(self) -> bool:
        """Whether the request has failed or its client has given it up."""
        return self.request.future.done() or self.request.future.abandoned

    def guarded(self, action: Any, argument: Any) -> None:
        """Do one thing. Its error ends this answer, and no other of the batch."""
        try:
            action(argument)
        except Exception as error:
            self.ended = True
            if not self.request.future.done():
                self.request.future.set_exception(error)

    def choose(self, scores: Tensor) -> None:
        """Choose the next token by its score."""
        if self.request.sampling.top_logprobs is not None:
            self._logprobs = scores.log_softmax(-1)
        if self._chooser is not None:
            self._chooser.choose(scores)

    def take(self, token: int, measured: Token | None = None) -> None:
        """Take the next token. Find out whether the answer ends with it, and show what it settles.

        Parameters
        ----------
        token : int
        measured : Token, optional
            The token with its log-probability, if another program chose it.
        """
        self.ids.append(token)
        if self._chooser is not None:
            self._chooser.take(token)
        if self._logprobs is not None:
            measured = self._measured(token, self._logprobs)
        if measured is not None:
            self._tokens.append(measured)
        if self.unwanted:
            self.ended = True
            return
        by_itself = token in self.task.end_ids
        self.ended = by_itself or len(self.ids) >= self.request.most_tokens
        self._show(by_itself)

    def _show(self, by_itself: bool) -> None:
        """Tell the listeners what no later token can change."""
        sampling = self.request.sampling
        settled = self.task.settled(self.ids)
        text = sampling.cut(settled)
        if text != settled:
            self.ended = True
            self._show_tokens(self._tokens_of(text) if self._tokens else 0)
        elif self.ended:
            self._show_tokens(len(self.ids) - by_itself)
        elif held := sampling.held_back(text):
            text = text[:-held]
        else:
            self._show_tokens(len(self.ids))
        # What an end cuts off is not settled: the rest comes with the answer itself.
        if text != self._shown:
            self._shown = text
            if self.request.on_text is not None:
                self.request.on_text(text)

    def _show_tokens(self, until: int) -> None:
        """Tell the listener of tokens about the first so many."""
        if self.request.on_token is not None:
            for token in self._tokens[self._shown_tokens : until]:
                self.request.on_token(token)
        self._shown_tokens = max(self._shown_tokens, until)

    def _tokens_of(self, text: str) -> int:
        """How many tokens it takes to write the beginning of the answer."""
        wanted = len(text.rstrip())
        return next(count for count in range(len(self.ids) + 1) if len(self.task.decode(self.ids[:count])) >= wanted)

    def _measured(self, token: int, logprobs: Tensor) -> Token:
        """A token with its log-probability, and those of the likeliest tokens at its place."""
        likeliest = logprobs.topk(min(self.request.sampling.top_logprobs or 0, len(logprobs)))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        named = [(self.task.text([other]), logprob) for other, logprob in pairs]
        return Token(self.task.text([token]), float(logprobs[token]), named)
