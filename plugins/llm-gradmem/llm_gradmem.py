"""Plug-in of llm that answers from the memories of gradmem's store: `llm -m gradmem/NAME "question"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from queue import SimpleQueue
from typing import TYPE_CHECKING

import click
import llm
from llm.parts import Message, TextPart
from pydantic import Field

from gradmem.errors import GradmemError, Missing
from gradmem.store import Entry, Store

if TYPE_CHECKING:  # these load PyTorch, which no other use of llm should wait for
    from gradmem import BoundMemory
    from gradmem.serving import Engine

LISTED = 1000
"""Most memories that become models, the newest first."""


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Register a model for each memory of the store: under its name, and under its id."""
    try:
        with Store(create=False) as store:
            entries = store.list(limit=LISTED)
    except Missing:  # there is no store yet
        return
    except GradmemError as error:  # llm has other models, which must still work
        click.echo(f"gradmem: {error}", err=True)
        return
    for entry in entries:
        register(StoredMemory(entry), aliases=(f"gradmem/{entry.id}",) if entry.name else None)


class StoredMemory(llm.Model):
    """A memory of the store, which answers questions about its text.

    Parameters
    ----------
    entry : Entry
        Of the memory.
    """

    can_stream = True

    class Options(llm.Options):
        """Options of one answer."""

        max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of the answer.")
        checkpoint: str | None = Field(
            default=None, description="The model that wrote the memory, if gradmem does not know it by its short name."
        )

    def __init__(self, entry: Entry) -> None:
        self.model_id = f"gradmem/{entry.label}"
        self.entry = entry
        self._opened: dict[str | None, tuple[Engine, BoundMemory]] = {}

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Answer the last question of a conversation, piece by piece.

        Raises
        ------
        llm.ModelError
            If the memory cannot be opened or asked.
        """
        asked = [{"role": message.role, "content": _text(message)} for message in prompt.messages]
        if not any(message["role"] == "user" for message in asked):
            raise llm.ModelError("there is no question: give one as the prompt")
        from gradmem.sampling import Sampling  # here, as it loads PyTorch

        texts: SimpleQueue[str | None] = SimpleQueue()
        try:
            engine, memory = self._open(prompt.options.checkpoint)
            sampling = Sampling(max_tokens=prompt.options.max_tokens)
            future = engine.ask(self.entry.id, memory, asked, sampling=sampling, on_text=texts.put)
            future.add_done_callback(lambda _: texts.put(None))
            sent = ""
            while stream and (text := texts.get()) is not None:
                yield text[len(sent) :]
                sent = text
            answer = future.result()
        except GradmemError as error:
            raise llm.ModelError(str(error).replace("--checkpoint", "-o checkpoint")) from error
        if answer.text != sent:
            yield answer.text[len(sent) :]
        response.set_usage(input=answer.query_tokens, output=answer.answer_tokens)
        response.response_json = asdict(answer)

    def _open(self, checkpoint: str | None) -> tuple[Engine, BoundMemory]:
        """Open the memory once, with an engine for its model."""
        if checkpoint not in self._opened:
            from gradmem.serving import Engine

            with Store(create=False) as store:
                memory = store.open(self.entry.id, checkpoint=checkpoint)
            self._opened[checkpoint] = Engine(memory.model), memory
        return self._opened[checkpoint]


def _text(message: Message) -> str:
    """Return the text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))
