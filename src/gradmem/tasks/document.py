"""Questions about any text, answered by a language model as it is: through its chat template if it has one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from zlib import crc32

from ..batch import Batch
from ..errors import GradmemError, refused, require
from ..pretrained import plain_tokenizer
from .base import Conversation, Split, Task

INSTRUCTION = "Read the text, then answer the question with a few words from it.\n\nText: "
QUESTION = "\n\nQuestion: "
ANSWER = "\nAnswer:"
"""What a plain prompt has behind the question: models without a chat template continue it."""
SAME_DATE = "{% macro strftime_now(style) %}26 July 2024{% endmacro %}"
"""What stands before a chat template: one that tells the date would change every memory every day."""
NAMES = ("Ines Okafor", "Tomas Brandt", "Marta Lindqvist", "Yusuf Demir", "Clara Novak", "Owen Gallagher")
PLACES = ("Velmouth", "Karsund", "Port Aldry", "Oskarhavn", "Tarn Bay")
MONTHS = ("March", "April", "May", "June", "September", "October")
EXAMPLE = (
    "In {sold} {year} {buyer} bought the old lighthouse of {place} for {price:,} euros. The last keeper of the "
    "lighthouse, {keeper}, handed over the keys. The new code of the door is {code}. In {opened} the lighthouse will "
    "open as a hotel with {rooms} rooms."
)
"""A paragraph whose facts are drawn, so that no model can know them."""

ENDS = (r"\n[^\S\n]*\n\s*", r"[.!?\u2026][\"')\]\u201d\u2019\u00bb]*\s+|[\u3002\uff01\uff1f]", r"\n", r"\s+")
"""Where a chunk may end, the best first: behind a paragraph, a sentence, a line, a word."""

WORDS = 32
"""Characters before a cut that decide between several."""


class Document(Task):
    """A text stands in the first turn of a conversation, before the question; see `before_context`.

    A model without a chat template continues a plain prompt, and its answer ends at a line break. There are no samples
    to train on.

    Parameters
    ----------
    tokenizer : str
        Hub name or directory of a pretrained tokenizer.
    chunk_size : int
        Most tokens of the parts into which a long text is cut.
    answer_length : int
        Most tokens of an answer.

    Raises
    ------
    GradmemError
        If the chat template changes the turns of a conversation, so that a text cannot stand in one.
    """

    def __init__(self, tokenizer: str, chunk_size: int = 1024, answer_length: int = 64) -> None:
        require("chunk_size", chunk_size, chunk_size >= 1, "at least 1")
        require("answer_length", answer_length, answer_length >= 1, "at least 1")
        self.tokenizer = plain_tokenizer(tokenizer)
        self.chunk_size, self.answer_length = chunk_size, answer_length
        if self.tokenizer.chat_template is not None:
            with refused("the tokenizer has no chat template for conversations"):
                self.prompt_template = self.tokenizer.get_chat_template()
            self._between([("user", ""), ("assistant", ""), ("user", "")])  # refuse other templates now

    @property
    def pad_id(self) -> int:
        """Id of the padding token or, if there is none, of the tokenizer's end token."""
        return int(self.tokenizer.eos_token_id) if self.tokenizer.pad_token_id is None else super().pad_id

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends a turn of the chat template or, if there is none, of the tokenizer's end token."""
        if self.prompt_template is not None:
            *_, after = self._between([("user", ""), ("assistant", "")], answered=True)
            special = [one for one in self._template_ids(after) if one in self.tokenizer.added_tokens_decoder]
            if special:
                return special[0]
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer; of a plain prompt, all tokens with a line break."""
        ends = dict.fromkeys([self.end_id, int(self.tokenizer.eos_token_id)])
        if self.prompt_template is None:
            pieces = self.tokenizer.backend_tokenizer.decode_batch([[one] for one in range(len(self.tokenizer))])
            ends |= dict.fromkeys(one for one, piece in enumerate(pieces) if "\n" in piece)
        return list(ends)

    @cached_property
    def before_context(self) -> list[int]:
        """The beginning of the user's turn, up to the text: the template's own beginning, and what to do."""
        if self.prompt_template is not None:
            return self._template_ids(self._between([("user", "")])[0] + INSTRUCTION)
        plain = self.encode(INSTRUCTION)
        with_begin: list[int] = self.tokenizer(INSTRUCTION, add_special_tokens=True).input_ids
        begin = next((at for at in range(3) if with_begin[at : at + len(plain)] == plain), 0)
        return with_begin[:begin] + plain

    def encode_query(self, text: str) -> list[int]:
        """Token ids of the rest of the user's turn, with the question, up to where the answer begins."""
        return self.encode_conversation([{"role": "user", "content": text}])

    def encode_conversation(self, messages: Conversation) -> list[int]:
        """Token ids of all turns after the text, up to where the answer to the last question begins.

        What a client says as `system` or `developer` stands before the first question, because the system's turn came
        before the text. Messages behind the last question, and those of tools, are left out.
        """
        turns = list(_turns(messages))
        if not turns:
            return []
        instructions = [m["content"] for m in messages if m["role"] in ("system", "developer") and m["content"].strip()]
        said = "".join(f"\n\n{one.strip()}" for one in instructions)
        if self.prompt_template is None:
            parts = [QUESTION + text if role == "user" else f"{ANSWER} {text}" for role, text in turns]
            return self.encode(said + "".join(parts) + ANSWER)
        between, ids = self._between(turns), []
        for place, ((role, text), after) in enumerate(zip(turns, between[1:], strict=True)):
            start = "" if role == "assistant" else QUESTION.strip() + " " if place else said + QUESTION
            ids += self.encode(start + text) + self._template_ids(after)
        return ids

    def conversation_text(self, messages: Conversation) -> str:
        """What all messages say."""
        return "\n".join(message["content"] for message in messages)

    def chunk_end(self, text: str) -> int:
        """Behind a paragraph in the last quarter; else behind a sentence, a line or a word there.

        Of several the words before it decide which, so that after a change in a text the cuts are soon the same again.
        """
        for pattern in ENDS:
            if ends := [found.end() for found in re.finditer(pattern, text) if found.end() > len(text) * 3 // 4]:
                return min(ends, key=lambda end: crc32(text[max(0, end - WORDS) : end].encode()))
        return len(text)

    def target(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a question, and of an answer with the token that ends it."""
        start = " " if self.prompt_template is None else ""
        return self.encode_query(query), [*self.encode(start + answer.strip()), self.end_id]

    def statement(self, query: str, answer: str) -> str:
        """The answer alone: no text has the question in it."""
        return answer

    def decode(self, ids: list[int]) -> str:
        """The answer in generated tokens: the text up to the first token that ends it."""
        last = next((at for at, one in enumerate(ids) if one in self.end_ids), len(ids))
        unsaid = (self.end_id, self.tokenizer.eos_token_id, self.pad_id)
        return self.answer_text(self.tokenizer.decode([one for one in ids[: last + 1] if one not in unsaid]))

    def answer_text(self, text: str) -> str:
        """Remove white space at the ends; the answer to a plain prompt is one line."""
        return (text if self.prompt_template is not None else text.partition("\n")[0]).strip()

    def settled(self, ids: list[int]) -> str:
        """What `answer_text` returns never changes at its beginning as tokens are added."""
        return self._settled(ids)

    def example(self, seed: int = 0) -> tuple[str, list[tuple[str, str]]]:
        """Return a paragraph of made-up facts, with three questions about it and their answers."""
        draw = random.Random(seed)
        buyer, keeper, sold, opened = *draw.sample(NAMES, 2), *draw.sample(MONTHS, 2)
        year, price = draw.randint(2020, 2040), 500 * draw.randint(200, 900)
        code, rooms, place = draw.randint(1000, 9999), draw.randint(4, 19), draw.choice(PLACES)
        text = EXAMPLE.format(
            sold=sold, year=year, buyer=buyer, place=place, price=price, keeper=keeper, code=code, opened=opened,
            rooms=rooms,
        )  # fmt: skip
        asked = {
            "What is the door code?": str(code),
            "Who was the last keeper?": keeper,
            "How many rooms does the hotel have?": str(rooms),
        }
        return text, list(asked.items())

    def batch(self, split: Split, start: int, size: int, seed: int = 0) -> Batch:
        """Refuse: there are no samples."""
        raise GradmemError(
            "the task document has no samples to train or evaluate on: use another task, such as `squad`"
        )

    def _template_ids(self, text: str) -> list[int]:
        """Token ids of a part of the template, in which the names of special tokens stand for these tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
        return ids

    def _between(self, turns: list[tuple[str, str]], answered: bool = False) -> list[str]:
        """What the chat template puts before, between and after turns; the last answer may be there or is to come.

        The turns themselves are never rendered, so that nothing in them counts as part of the template.
        """
        marks = [f"GRADMEM{place}TURN" for place in range(len(turns))]
        messages = [{"role": role, "content": mark} for (role, _), mark in zip(turns, marks, strict=True)]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": not answered, "enable_thinking": False}
        options["chat_template"] = f"{SAME_DATE}{self.prompt_template}"
        with refused("the chat template of this model fails"):
            rest: str = self.tokenizer.apply_chat_template(messages, **options)
        parts = []
        for mark in marks:
            if rest.count(mark) != 1:
                raise GradmemError("the chat template of this model changes what is said: take another model")
            part, _, rest = rest.partition(mark)
            parts.append(part)
        return [*parts, rest]


def _turns(messages: Conversation) -> Iterator[tuple[str, str]]:
    """Role and text of each turn from the first question to the last; one role's messages in a row are one turn."""
    said = [(one["role"], one["content"].strip()) for one in messages if one["role"] in ("user", "assistant")]
    said = [one for one in said if one[1]]
    asked = [place for place, (role, _) in enumerate(said) if role == "user"]
    turns: list[tuple[str, str]] = []
    for role, text in said[asked[0] : asked[-1] + 1] if asked else []:
        if turns and turns[-1][0] == role:
            turns[-1] = role, f"{turns[-1][1]}\n\n{text}"
        else:
            turns.append((role, text))
    yield from turns
