"""Focus: an agent compresses its own context (Verma, arXiv 2601.07190).

The agent declares with `start_focus` what it is going to find out, and says with `complete_focus` what it has learned.
Then the messages in between leave the conversation, and what it has learned joins a *Knowledge* block at the top.
Unlike the agent of the paper, this one can still ask what left: `ask_pruned` answers from a memory of these messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import GradmemError, require
from .pruned import Message, PrunedMessages, calls_of, checked, message_text, transcript

KNOWLEDGE = (
    "# Knowledge\nWhat you have learned so far. The messages that led to it have left this conversation; "
    "`ask_pruned` answers questions about their details."
)
"""Beginning of the Knowledge block."""
NUDGE = "Reminder: {count} tool calls since you last compressed the conversation. "
OPEN_NUDGE = "If you have learned what you were looking for, call `complete_focus` now."
CLOSED_NUDGE = "Call `start_focus` before you go on, and `complete_focus` when you know more."


SYSTEM = ("system", "developer")
"""Roles of the first message that the Knowledge block joins."""


def _tool(name: str, description: str, parameter: str, meaning: str) -> Message:
    properties = {parameter: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [parameter], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool(
        "start_focus",
        "Begin an investigation. Call it before you search or read much.",
        "objective",
        "What you want to find out.",
    ),
    _tool(
        "complete_focus",
        "End the investigation: all messages since `start_focus` leave the conversation, and only your learnings stay.",
        "learnings",
        "What you have learned, with all names, numbers and places that you still need, and what did not work.",
    ),
    _tool(
        "ask_pruned",
        "Ask for a detail in messages that have left the conversation.",
        "question",
        "One question, in plain words.",
    ),
]
"""The tools in the form of OpenAI's API."""


@dataclass(frozen=True)
class Reading:
    """Tokens at one call of the agent's model.

    Attributes
    ----------
    kept : int
        Tokens of the messages that it read, Knowledge included.
    knowledge : int
        Tokens of the Knowledge block.
    pruned : int
        Tokens of the messages that had left the conversation before.
    """

    kept: int
    knowledge: int
    pruned: int


@dataclass(frozen=True)
class Learned:
    """What one completed focus was about, and what was learned."""

    objective: str
    learnings: str

    def __str__(self) -> str:
        return f"## {self.objective}\n{self.learnings}"


def knowledge_block(learned: Iterable[Learned]) -> str:
    """Return the Knowledge block; empty if nothing was learned."""
    entries = [str(one) for one in learned]
    return "\n\n".join([KNOWLEDGE, *entries]) if entries else ""


class Focus:
    """A conversation, as messages of OpenAI's API, that its agent can compress.

    Every new message goes through `add`, which runs the agent's calls of the tools here and returns its other calls.
    Once the results of these are added, `messages` is a conversation that the API accepts: each tool call has its
    result, and each result its call.

    Parameters
    ----------
    messages : iterable of dict
        Beginning of the conversation: usually a system message, and the user's with the task.
    pruned : PrunedMessages
        Keeps the messages that leave.
    nudge_after : int
        Number of tool calls without compression after which a reminder is added.

    Attributes
    ----------
    messages : list of dict
        What the agent's model reads next.
    tools : list of dict
        Definitions of the tools, for the request to the agent's model.
    learned : list of Learned
        Content of the Knowledge block.
    readings : list of Reading
        Tokens at each call of the agent's model.

    Raises
    ------
    GradmemError
        If a message has no role, or `nudge_after` is below 1.

    Notes
    -----
    - All messages of a focus leave, also the user's.
    - The message that calls `complete_focus` stays if it calls other tools too, as their results were not read yet.
    - If the messages cannot be kept, for example because a quota is full, none leaves, and the agent is told why.
    """

    def __init__(self, messages: Iterable[Message], pruned: PrunedMessages, *, nudge_after: int = 15) -> None:
        require("nudge_after", nudge_after, nudge_after >= 1, "at least 1")
        self.messages = [checked(message) for message in messages]
        self.pruned, self.nudge_after, self.tools = pruned, nudge_after, TOOLS
        self.learned: list[Learned] = []
        self.readings: list[Reading] = []
        self._objective = ""
        self._start: Message | None = None
        """The message that calls `start_focus`, while a focus is open."""
        self._reply: Message = {}
        """The last message of the agent's model."""
        self._system = self.messages[0] if self.messages and self.messages[0]["role"] in SYSTEM else None
        self._waiting: set[str] = set()
        """Ids of calls without a result."""
        self._calls, self._next_nudge, self._tokens_pruned = 0, nudge_after, 0
        self._count = lru_cache(maxsize=10_000)(pruned.count)
        self._actions: dict[str, tuple[str, Callable[[str], str | None]]] = {
            "start_focus": ("objective", self._start_focus),
            "complete_focus": ("learnings", self._complete_focus),
            "ask_pruned": ("question", self.pruned.ask),
        }

    @property
    def knowledge(self) -> str:
        """The Knowledge block; empty before the first focus is complete."""
        return knowledge_block(self.learned)

    def tokens(self, messages: Iterable[Message]) -> int:
        """Return the number of tokens of messages, without those of a chat template."""
        return sum(self._count(transcript([message])) for message in messages)

    def add(self, message: Message) -> list[Message]:
        """Add a message, and run its calls of the tools here.

        Parameters
        ----------
        message : dict
            A reply of the agent's model, the result of a tool call, or what the user says.

        Returns
        -------
        list of dict
            The tool calls that the caller has to run. Add the result of each.

        Raises
        ------
        GradmemError
            If the message has no role, is a result without a call, or is no result while calls wait for one.
        """
        message, role = checked(message), message.get("role")
        if role == "tool":
            self._add_result(message)
            return []
        if self._waiting:
            raise GradmemError(f"add the results of these tool calls first: {', '.join(sorted(self._waiting))}")
        if role != "assistant":
            self.messages.append(message)
            return []
        self._read()
        self.messages.append(message)
        self._reply, calls = message, calls_of(message)
        own = [call for call in calls if call["function"]["name"] in self._actions]
        self._calls += len(calls) - len(own)
        self._waiting = {call["id"] for call in calls}
        for call in own:
            self._run(call)
        self._nudge()
        return [call for call in calls if call["id"] in self._waiting]

    def _add_result(self, message: Message) -> None:
        id = str(message.get("tool_call_id"))
        if id not in self._waiting:
            raise GradmemError(f"no tool call '{id}' waits for a result")
        self._waiting.remove(id)
        self.messages.append(message)
        self._nudge()

    def _read(self) -> None:
        """Note what the agent's model has read before its reply."""
        knowledge = self._count(self.knowledge) if self.learned else 0
        self.readings.append(Reading(self.tokens(self.messages), knowledge, self._tokens_pruned))

    def _run(self, call: Message) -> None:
        """Run a call of a tool here, and add its result unless the call has left with its focus."""
        parameter, action = self._actions[call["function"]["name"]]
        try:
            result = action(_argument(call["function"]["arguments"], parameter))
        except GradmemError as error:  # for the agent, which may do something about it
            result = f"Error: {error}"
        self._waiting.discard(call["id"])
        if result is not None:
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def _start_focus(self, objective: str) -> str:
        if self._start is not None:
            raise GradmemError(f"a focus is open already ({self._objective}): call complete_focus first")
        self._objective, self._start = objective, self._reply
        return "Focus started."

    def _complete_focus(self, learnings: str) -> str | None:
        """Prune the open focus. Return the result of the call; None if the call has left too."""
        if self._start is None:
            raise GradmemError("no focus is open: call start_focus first")
        if self._start is self._reply:
            raise GradmemError("there is nothing to prune: call complete_focus after you have read something")
        first, last = _position(self.messages, self._start), _position(self.messages, self._reply)
        alone = len(calls_of(self._reply)) == 1
        leaving = self.messages[first:] if alone else self.messages[first:last]
        self.pruned.keep(leaving)
        self.messages = self.messages[:first] + self.messages[first + len(leaving) :]
        self._tokens_pruned += self.tokens(leaving)
        self.learned.append(Learned(self._objective, learnings))
        self._start, self._calls, self._next_nudge = None, 0, self.nudge_after
        self._show_knowledge()
        return None if alone else "Focus completed: your learnings are in the Knowledge block."

    def _show_knowledge(self) -> None:
        """Put the Knowledge block into the system message, as many chat templates allow one only."""
        if self._system is None:
            system: Message = {"role": "system", "content": self.knowledge}
        elif isinstance(self._system.get("content"), list):
            parts = [*self._system["content"], {"type": "text", "text": f"\n\n{self.knowledge}"}]
            system = {**self._system, "content": parts}
        else:
            text = message_text(self._system)
            system = {**self._system, "content": f"{text}\n\n{self.knowledge}" if text else self.knowledge}
        begun = self._system is not None or len(self.learned) > 1
        self.messages = [system, *(self.messages[1:] if begun else self.messages)]

    def _nudge(self) -> None:
        """Remind the agent after every `nudge_after` calls without compression, as soon as no call waits."""
        if self._waiting or self._calls < self._next_nudge:
            return
        text = NUDGE.format(count=self._calls) + (CLOSED_NUDGE if self._start is None else OPEN_NUDGE)
        self.messages.append({"role": "user", "content": text})
        self._next_nudge = self._calls + self.nudge_after


def _argument(arguments: str, name: str) -> str:
    """Read the one argument of a call, which a model has written.

    Raises
    ------
    GradmemError
        If it is not JSON, or the argument is missing or no text.
    """
    try:
        given: Any = json.loads(arguments)
    except (TypeError, ValueError) as error:
        raise GradmemError(f"the arguments are no JSON: {error}") from error
    value = given.get(name) if isinstance(given, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise GradmemError(f"give `{name}` as a text")
    return value.strip()


def _position(messages: list[Message], wanted: Message) -> int:
    """Place of a message itself, as another one may be equal."""
    return next(place for place, message in enumerate(messages) if message is wanted)
