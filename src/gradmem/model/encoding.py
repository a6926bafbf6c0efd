"""Text into token ids: contexts to write, queries to ask, and long texts in chunks."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import GradmemError
from ..methods.base import Method
from ..tasks.base import OTHER_TEXTS, Conversation, Task


@dataclass(frozen=True)
class TextEncoder:
    """Turn texts into the token ids that a model reads; refuse texts that it cannot read.

    Attributes
    ----------
    task : Task
        It brings texts into the form that the model was trained on, and has the tokenizer.
    method : Method
        It knows how long contexts and queries may be.
    name : str
        What messages call the model.
    """

    task: Task
    method: Method
    name: str

    def context_ids(self, text: str) -> list[int]:
        """Tokenize a text that will be written.

        Raises
        ------
        GradmemError
            If the text is empty, too long, or has characters or words that the model does not know.
        """
        limit = self._most_tokens()
        self._check_length(text, "context", limit)
        text = self.task.context_text(text)
        return self._checked(self.task.encode(text), text, "context", limit)

    def query_ids(self, query: str | Conversation, options: dict[str, Any] | None = None, taken: int = 0) -> list[int]:
        """Tokenize a query that will be answered with these options of generation.

        Parameters
        ----------
        query : str or list of dict
            A query, or the messages of a conversation about what was written; see `Task.encode_conversation`.
        options : dict, optional
        taken : int
            Positions that the memory's prefix takes, if these may be more than usual.

        Raises
        ------
        GradmemError
            If the query is empty, too long, has unknown characters, or its kind has no answer format.
        """
        room = min(self.method.max_query, self.method.backbone.max_positions - taken)
        limit = room - int((options or {}).get("max_new_tokens", self.task.answer_length))
        text = query if isinstance(query, str) else self.task.conversation_text(query)
        self._check_length(text, "query", limit)
        ids = self.task.encode_query(query) if isinstance(query, str) else self.task.encode_conversation(query)
        return self._checked(ids, self.task.query_text(text), "query", limit)

    def chunks(self, text: str, size: int | None = None) -> list[str]:
        """Cut a long text into chunks for a memory each, where the task likes them to end.

        Parameters
        ----------
        text : str
        size : int, optional
            Most tokens of a chunk; by default what the task says, or the whole text if it says nothing. Never more
            than the model can write.

        Raises
        ------
        GradmemError
            If a single character has more than `size` tokens.
        """
        size = self.task.chunk_size if size is None else size
        if size is None or not text:
            return [text]
        if size < 1:
            raise GradmemError(f"a chunk must have at least 1 token, not {size}")
        size = min(size, self._most_tokens())
        ends = [*accumulate(map(len, self.task.pieces(text))), len(text)]
        chunks, begin = [], 0
        while begin < len(text):
            last = min(bisect_right(ends, begin) + size, len(ends)) - 1
            # A chunk may have one token more alone than within the text, and a token may end within a character.
            while (end := self._end(text, begin, ends[last])) > begin and len(self.task.encode(text[begin:end])) > size:
                last -= 1
            if end <= begin:
                raise GradmemError(f"one character has more than {size} tokens: give a longer chunk")
            chunks.append(text[begin:end])
            begin = end
        return chunks

    def _end(self, text: str, begin: int, most: int) -> int:
        """Where a chunk from `begin` ends that may reach `most`; the end of the text is always a good one."""
        return most if most in (begin, len(text)) else begin + self.task.chunk_end(text[begin:most])

    def most_characters(self, tokens: int) -> int:
        """Most characters of a text of this many tokens, marks and spaces that the task removes included."""
        return max(0, tokens) * max(16, self.task.longest_token)

    def _most_tokens(self) -> int:
        """The longest context, if any can be written."""
        if (limit := self.method.max_context) < 1:
            most = self.method.backbone.max_positions
            raise GradmemError(f"'{self.name}' takes {most} tokens, which leave no room for a text: take another model")
        return limit

    def _check_length(self, text: str, what: str, limit: int) -> None:
        """Refuse a text that is far too long before it is tokenized, which would take time."""
        if len(text) > self.most_characters(limit):
            raise GradmemError(f"the {what} has {len(text):,} characters; the limit of '{self.name}' is {limit} tokens")

    def _checked(self, ids: list[int], text: str, what: str, limit: int) -> list[int]:
        if not ids:
            raise GradmemError(f"the {what} is empty")
        if len(ids) > limit:
            advice = self.method.too_long_advice if what == "context" else ""
            raise GradmemError(f"the {what} has {len(ids)} tokens; the limit of '{self.name}' is {limit}{advice}")
        unknown_id = self.task.tokenizer.unk_token_id
        if unknown_id is not None and unknown_id in ids:
            pieces = zip(self.task.pieces(text), self.task.encode(text), strict=True)
            alien = sorted({piece.strip() or piece for piece, i in pieces if i == unknown_id})
            other = f"; {OTHER_TEXTS}" if what == "context" else ""
            kind = "characters" if max(map(len, alien)) == 1 else "words"
            raise GradmemError(f"the {what} has {kind} that '{self.name}' does not know: {alien[:20]}{other}")
        return ids
