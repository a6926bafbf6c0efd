"""Clients of a server that may be killed: what they do, and the account that they keep of what it acknowledged."""

from __future__ import annotations

import random
import string
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from gradmem import Client, GradmemError, Memory
from gradmem.serving import Busy

CHECKPOINT = "kv-16"
PATIENCE = 120.0
"""Seconds after which a request without any answer counts as lost."""
DOWN = ("cannot reach the server", "the server stopped before", "the server is shutting down")
"""How a request may fail whose server has been killed, or is ending."""


@dataclass
class Kept:
    """A memory whose write was acknowledged.

    Attributes
    ----------
    texts : list of str
        What was written and appended.
    answers : dict
        First answer to each query, by version.
    appending : str
        A text whose appending may have happened or not.
    """

    texts: list[str]
    answers: dict[tuple[int, str], str] = field(default_factory=dict)
    appending: str = ""


@dataclass
class Account:
    """What happened in a run; clients share it.

    Attributes
    ----------
    seconds : dict of list of float
        Of answered requests, by kind.
    failed : Counter
        Requests that ended in a clear error, by kind and error.
    wrong : list of str
        Whatever should not have happened.
    right, asked : int
        Answers that are those written.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    right: int = 0
    asked: int = 0


class User(threading.Thread):
    """One client with memories of its own, which it remembers as a user would."""

    def __init__(self, number: int, url: str, account: Account, over: threading.Event, called: str = "user") -> None:
        super().__init__(daemon=True)
        self.prefix, self.account, self.over = f"{called}{number}", account, over
        self.draw = random.Random(self.prefix)  # no two clients write the same
        self.client = Client(url, timeout=PATIENCE)
        self.kept: dict[str, Kept] = {}
        self.unsure: dict[str, str] = {}
        """Names whose write, or delete, was not answered, with their texts."""
        self.written = 0

    def run(self) -> None:
        """Do one thing after the other."""
        kinds = (self.ask, self.write, self.append, self.delete, self.list, self.download, self.chat, self.mistake)
        kinds = (*kinds, self.leave)
        weights = (50, 16, 4, 5, 8, 5, 5, 4, 3)
        with self.client:
            while not self.over.is_set():
                kind = self.draw.choices(kinds, weights)[0] if self.kept else self.write
                if kind is self.write and self.unsure and self.draw.random() < 0.5:
                    kind = self.write_again
                self.attempt(kind)

    def attempt(self, kind: Callable[[], None]) -> None:
        """Do one thing, and note how it ended."""
        started = time.monotonic()
        try:
            kind()
            self.account.seconds[kind.__name__].append(time.monotonic() - started)
        except Busy as error:
            self.account.failed[kind.__name__, "busy (429)"] += 1
            self.over.wait(min(error.retry_after, 1))
        except GradmemError as error:
            if not any(down in str(error) for down in DOWN) or time.monotonic() - started > PATIENCE:
                self.account.wrong.append(f"{kind.__name__} after {time.monotonic() - started:.1f} s: {error}")
            self.account.failed[kind.__name__, "server down"] += 1
            self.wait()
        except Exception as error:
            self.account.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def wait(self) -> None:
        """Wait until the server is there again."""
        while not self.over.wait(self.draw.random()):
            try:
                self.client.list(limit=1)
            except GradmemError:
                continue
            return

    def check(self, good: bool, what: str) -> None:
        """Note what should not be."""
        if not good:
            self.account.wrong.append(what)

    def any(self) -> str:
        """Name of a memory that is kept."""
        return self.draw.choice(list(self.kept))

    def text(self, pairs: int) -> str:
        """Key-value pairs."""
        letters = string.ascii_letters + string.digits
        keys = {"".join(self.draw.choices(letters, k=2)) for _ in range(pairs)}
        return "\n".join(f"{key}:{''.join(self.draw.choices(letters, k=2))}" for key in sorted(keys))

    # What users do

    def write(self) -> None:
        """Write a new memory."""
        self.written += 1
        self.put(f"{self.prefix}-{self.written}", self.text(self.draw.randint(4, 12)))

    def write_again(self) -> None:
        """Write what may have been written: it is there once, whether it was or not."""
        name = self.draw.choice(list(self.unsure))
        self.put(name, self.unsure[name])

    def put(self, name: str, text: str) -> None:
        """Write a text under a name."""
        self.unsure[name] = text
        entry = self.client.write(text, CHECKPOINT, name=name, tags=[self.prefix])
        self.check(entry.name == name, f"{name} was written as {entry.name}")
        self.kept[name] = Kept([text])
        del self.unsure[name]

    def ask(self) -> None:
        """Ask a memory: the same query has the same answer for ever."""
        name = self.any()
        memory = self.kept[name]
        version = len(memory.texts)
        pairs = dict(line.split(":") for text in memory.texts for line in text.splitlines())
        queries = self.draw.sample(sorted(pairs), self.draw.randint(1, min(4, len(pairs))))
        for query, answer in zip(queries, self.client.ask(name, queries), strict=True):
            if not memory.appending:
                before = memory.answers.setdefault((version, query), answer.text)
                self.check(before == answer.text, f"{name}: '{query}' was {before} and is {answer.text}")
            if version == 1:
                self.account.asked += 1
                self.account.right += answer.text == pairs[query]

    def append(self) -> None:
        """Append to a memory."""
        name = self.any()
        memory, text = self.kept[name], self.text(2)
        if memory.appending or len(memory.texts) > 2:
            return
        memory.appending = text
        entry = self.client.append(name, text, may_forget=True)
        memory.texts.append(text)
        memory.appending = ""
        self.check(entry.current.number == len(memory.texts), f"{name}: version {entry.current.number}")

    def delete(self) -> None:
        """Delete a memory."""
        name = self.any()
        # Whatever comes of it, nothing more is promised of this name.
        text = self.kept.pop(name).texts[0]
        self.unsure[name] = text
        self.client.delete(name)
        del self.unsure[name]

    def list(self) -> None:
        """List what is there: all that was acknowledged, and nothing else."""
        found = {entry.name for entry in self.client.list(tags=self.prefix, limit=1000)}
        self.check(self.kept.keys() <= found, f"not listed: {self.kept.keys() - found}")
        self.check(found <= self.kept.keys() | self.unsure.keys(), f"listed: {found - self.kept.keys()}")

    def download(self) -> None:
        """Fetch a memory file, whose checksum is checked."""
        name = self.any()
        memory = Memory.from_bytes(self.client.download(name, version=1))
        self.check(memory.receipts[0].context_tokens > 0, f"{name}: an empty file")

    def chat(self) -> None:
        """Ask as a client of OpenAI."""
        name = self.any()
        query = self.kept[name].texts[0].splitlines()[0].partition(":")[0]
        body = {"model": f"{CHECKPOINT}:{name}", "messages": [{"role": "user", "content": query}]}
        found = self.client._json("POST", "chat/completions", json=body)
        self.check(bool(found["choices"][0]["message"]["content"]), f"{name}: no content")

    def mistake(self) -> None:
        """Send what is wrong: the server says so."""
        wrong: dict[str, Callable[[], object]] = {
            "no such memory": lambda: self.client.ask(f"{self.prefix}-none", "a7"),
            "unknown checkpoint": lambda: self.client.write("a7:Qz", "kv-17"),
            "steps": lambda: self.client.write("a7:Qz", CHECKPOINT, steps=-1),
            "no memory file": lambda: self.client.upload(b"{}" * 100),
        }
        told = self.draw.choice(list(wrong))
        try:
            wrong[told]()
        except Busy:
            raise
        except GradmemError as error:
            if any(down in str(error) for down in DOWN):
                raise
            self.check(told in str(error), f"instead of '{told}': {error}")
        else:
            self.check(False, f"accepted: {told}")

    def leave(self) -> None:
        """Leave in the middle of a write, which then ends."""
        self.written += 1
        name, text = f"{self.prefix}-{self.written}", self.text(8)
        self.unsure[name] = text

        class Left(Exception):
            pass

        def go(*_: object) -> None:
            raise Left

        try:
            self.client.write(text, CHECKPOINT, name=name, tags=[self.prefix], on_step=go)
        except Left:
            return
