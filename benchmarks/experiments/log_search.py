"""A task of searching logs with an answer that a program knows, and an agent that is a script instead of a model.

A request is handed from one service to the next until one fails it; a person rolled out what made it fail. The agent
reads the logs page by page. It acts on nothing but the messages that it is given: what left the conversation and is not
in its learnings is gone for it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradmem.agents.pruned import Message, transcript

SERVICES = ("orders", "payments", "ledger", "stock", "mail", "billing", "search", "invoices")
WORKERS = ("heron", "osprey", "kite", "plover", "curlew", "dunlin")
PEOPLE = ("Ines Okafor", "Tomas Brandt", "Marta Lindqvist", "Yusuf Demir", "Clara Novak", "Owen Gallagher")
FIRST, LAST = "gateway", "deploys"
PAGE = 12
"""Lines of a page."""
CALLS = 500
"""Most calls of the agent's model."""
READ_LOG: Message = {
    "type": "function",
    "function": {
        "name": "read_log",
        "description": f"Read one page ({PAGE} lines) of the log of a service.",
        "parameters": {
            "type": "object",
            "properties": {"service": {"type": "string"}, "page": {"type": "integer", "minimum": 1}},
            "required": ["service", "page"],
        },
    },
}
SYSTEM = (
    "You find the causes of failures. Read the logs of the services. `deploys` has what was rolled out, and by whom."
)


@dataclass(frozen=True)
class Hop:
    """Where a request went from one service, and details of that line which nobody needs for the answer."""

    service: str
    request: str
    to: str
    worker: str
    milliseconds: int

    @property
    def details(self) -> list[tuple[str, str]]:
        """Questions about the details, and their answers."""
        return [
            (f"Which worker handed request {self.request} to {self.to}?", self.worker),
            (f"After how many ms was request {self.request} handed to {self.to}?", str(self.milliseconds)),
        ]


@dataclass(frozen=True)
class Search:
    """One instance of the task.

    Attributes
    ----------
    question, answer : str
    logs : dict of list of str
        Lines by service.
    hops : list of Hop
        The way of the request, without its end.
    """

    question: str
    answer: str
    logs: dict[str, list[str]]
    hops: list[Hop]

    @classmethod
    def draw(cls, seed: int, pages: int) -> Search:
        """Draw an instance whose clues stand on one of the first `pages` pages of each log."""
        draw = random.Random(seed)
        services = [FIRST, *draw.sample(SERVICES, draw.randint(3, 5))]
        names, person, deploy = _names(draw), draw.choice(PEOPLE), f"d{draw.randint(1000, 9999)}"
        requests = [next(names) for _ in services]
        logs, hops = {}, []
        for place, (service, request) in enumerate(zip(services, requests, strict=True)):
            worker, milliseconds = _worker(draw), draw.randint(100, 999)
            if place + 1 < len(services):
                to = services[place + 1]
                clue = f"{worker} handed request {request} to {to} as {requests[place + 1]} after {milliseconds} ms"
                hops.append(Hop(service, request, to, worker, milliseconds))
            else:
                clue = f"{worker} failed request {request} because of deploy {deploy}"
            logs[service] = _log(draw, clue, pages, names)
        clue = f"deploy {deploy} was rolled out by {person}"
        logs[LAST] = _log(draw, clue, pages, names)
        question = f"Request {requests[0]} failed. It arrived at {FIRST}. Who rolled out the deploy that made it fail?"
        return cls(question, person, logs, hops)

    def read(self, service: str, page: int) -> str:
        """Return a page of a log."""
        lines = self.logs[service][(page - 1) * PAGE : page * PAGE]
        return "\n".join(lines) or "The log ends before this page."


def _names(draw: random.Random) -> Iterator[str]:
    """Names of requests, each one once."""
    for number in draw.sample(range(1000, 10000), 9000):
        yield f"r{number}"


def _worker(draw: random.Random) -> str:
    return f"{draw.choice(WORKERS)}-{draw.randint(1, 9)}"


def _log(draw: random.Random, clue: str, pages: int, names: Iterator[str]) -> list[str]:
    """Lines of a log with the clue in one of the first pages, and one page behind them."""
    kinds = ("served request {} in {} ms", "put request {} off by {} ms", "answered request {} from its cache in {} ms")
    clue_at = draw.randrange(pages * PAGE)
    lines = []
    for number in range((pages + 1) * PAGE):
        noise = f"{_worker(draw)} {draw.choice(kinds).format(next(names), draw.randint(2, 999))}"
        time = f"10:{number // 60:02d}:{number % 60:02d}"
        lines.append(f"{time} {clue if number == clue_at else noise}")
    return lines


class ScriptedAgent:
    """An agent that follows the request through the logs.

    Parameters
    ----------
    focuses : bool
        Whether it uses `start_focus` and `complete_focus`, once for each log.
    """

    def __init__(self, focuses: bool) -> None:
        self.focuses, self.calls = focuses, 0

    def reply(self, messages: list[Message]) -> Message:
        """Reply to a conversation: a tool call, or the answer."""
        text = transcript(messages)
        if found := re.search(r"was rolled out by (\w+ \w+)", text):
            if self._open(messages):
                return self._call("complete_focus", learnings=found[0])
            return {"role": "assistant", "content": found[1]}
        service, clue, known = self._follow(text)
        objective = f"Find {clue} in {service}"
        opened = self._open(messages)
        if opened and opened != objective:
            return self._call("complete_focus", learnings=known)
        if self.focuses and not opened:
            return self._call("start_focus", objective=objective)
        page = len(re.findall(rf'call of read_log: {{"service": "{service}"', text)) + 1
        return self._call("read_log", f"I look for {clue} on page {page}.", service=service, page=page)

    def _follow(self, text: str) -> tuple[str, str, str]:
        """Follow the request as far as the text tells. Return the log to read, what to look for, and the last clue."""
        service, known = FIRST, ""
        (request,) = re.findall(r"^user: Request (\w+)", text, re.MULTILINE)
        while found := re.search(rf"handed request {request} to (\w+) as (\w+)", text):
            known, service, request = found[0], found[1], found[2]
        if found := re.search(rf"failed request {request} because of (deploy \w+)", text):
            return LAST, found[1], found[0]
        return service, f"request {request}", known

    def _open(self, messages: list[Message]) -> str:
        """Objective of the focus that is open in a conversation."""
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        started = [call["arguments"] for call in calls if call["name"] == "start_focus"]
        return str(json.loads(started[-1])["objective"]) if started else ""

    def _call(self, tool: str, content: str | None = None, **arguments: Any) -> Message:
        self.calls += 1
        if self.calls > CALLS:
            raise RuntimeError("the agent goes round in circles")
        function = {"name": tool, "arguments": json.dumps(arguments)}
        call = {"id": f"call-{self.calls}", "type": "function", "function": function}
        return {"role": "assistant", "content": content, "tool_calls": [call]}
