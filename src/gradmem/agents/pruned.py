"""Messages that have left a conversation: as text, and as memories in a store that can still be asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GradmemError
from ..store import Entry, Store

if TYPE_CHECKING:
    from ..model import BoundMemory, MemoryModel

Message = dict[str, Any]
"""A message of a conversation as OpenAI's API has it, with `role` and `content`."""
TAG = "focus"
"""Tag of memories of pruned messages."""


def checked(message: Message) -> Message:
    """Return a message if it is one.

    Raises
    ------
    GradmemError
        If it has no role, its content is neither a text nor a list of parts, or a tool call is incomplete.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise GradmemError("a message must be a dictionary with a role: of OpenAI's client, add `message.model_dump()`")
    message_text(message)
    for call in calls_of(message):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not {"name", "arguments"} <= function.keys() or "id" not in call:
            raise GradmemError("a tool call must have an id and a function with name and arguments")
    return message


def message_text(message: Message) -> str:
    """Return the text of a message; of its parts, if it has several.

    Raises
    ------
    GradmemError
        If the content is neither a text nor a list of parts.
    """
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise GradmemError("the content of a message must be a text or a list of parts")
    return "".join(str(part.get("text", "")) for part in content)


def calls_of(message: Message) -> list[Message]:
    """Return the tool calls of a message."""
    return list(message.get("tool_calls") or [])


def transcript(messages: Iterable[Message]) -> str:
    """Return messages as one text: what each role says, which tools are called, and what these return."""
    called: dict[str, str] = {}
    parts = []
    for message in messages:
        text, name = message_text(message).strip(), str(message["role"])
        if name == "tool":
            name = f"result of {called.get(message.get('tool_call_id', ''), 'a tool')}"
        lines = [f"{name}: {text}"] if text else []
        for call in calls_of(message):
            function = call["function"]
            called[call["id"]] = function["name"]
            lines.append(f"call of {function['name']}: {function['arguments']}")
        parts += lines
    return "\n".join(parts)


class PrunedMessages:
    """Keeps messages that have left a conversation as memories in a store, and answers questions from them.

    Parameters
    ----------
    store : Store
    model : MemoryModel
        A language model with a method that answers questions, such as `gradmem.load("smollm2")`.
    tags : str or sequence of str
        Tags of the memories.

    Attributes
    ----------
    entries : list of Entry
        One for each time that messages were kept.

    Raises
    ------
    GradmemError
        If the method does not read several memories together.
    """

    def __init__(self, store: Store, model: MemoryModel, tags: str | Sequence[str] = TAG) -> None:
        if not model.method.reads_together:
            raise GradmemError(f"'{model.name}' cannot ask several memories at once: load it with the method compact")
        self.store, self.model, self.tags = store, model, tags
        self.entries: list[Entry] = []
        self._joined: BoundMemory | None = None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.model.task.encode(text))

    def keep(self, messages: Sequence[Message]) -> None:
        """Write messages into a memory and store it.

        Raises
        ------
        GradmemError
            If there is no text in them, or the store refuses the memory.
        """
        chunks = self.model.encoder.chunks(transcript(messages))
        self.entries.append(self.store.write(self.model, chunks, tags=self.tags))
        self._joined = None

    def ask(self, question: str) -> str:
        """Answer a question from all messages that were kept.

        Raises
        ------
        GradmemError
            If nothing was kept, or the question is too long.
        """
        if not self.entries:
            raise GradmemError("nothing was pruned yet")
        if self._joined is None:
            ids = dict.fromkeys(entry.id for entry in self.entries)
            self._joined = self.model.join([self.store.load(id) for id in ids])
        answer: str = self._joined.ask(question)
        return answer
