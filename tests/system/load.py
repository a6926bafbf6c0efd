"""Many clients use one server that is killed again and again, and keep account of what it acknowledged.

Then as many use one that is not killed: without, and with three hostile clients beside them (`hostile.py`), whom nobody
else should notice much.

`make load` runs it for ten minutes with 64 clients and prints the tables; `test_load.py` runs it for less.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import string
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from served import Server

from gradmem import Client, GradmemError, Memory
from gradmem.receipts import text_digest
from gradmem.serving import Busy
from gradmem.store import Store

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


class Killer:
    """Starts the server, and ends it at random moments, mostly with SIGKILL."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.starting: list[float] = []
        self.ending: list[float] = []
        self.logs = ""
        self.resident = 0
        self.server = Server(folder, CHECKPOINT, "--rate", "1000000")
        self.url = self.server.url

    def watch(self, seconds: float) -> None:
        """Let some time pass; note how much memory the server takes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.resident = max(self.resident, psutil.Process(self.server.process.pid).memory_info().rss)
            time.sleep(min(1.0, left))

    def end(self, how: signal.Signals) -> None:
        """End the server."""
        started = time.monotonic()
        self.server.process.send_signal(how)
        self.server.process.wait(PATIENCE)
        self.ended[how.name] += 1
        if how == signal.SIGTERM:
            self.ending.append(time.monotonic() - started)
        self.logs += self.server.log.read_text()

    def restart(self) -> None:
        """End it somehow, and start it where it was."""
        self.end(self.draw.choices((signal.SIGKILL, signal.SIGTERM), (4, 1))[0])
        started = time.monotonic()
        port = self.url.rpartition(":")[2]
        self.server = Server(self.folder, CHECKPOINT, "--rate", "1000000", "--port", port)
        self.starting.append(time.monotonic() - started)


@dataclass
class Result:
    """What a run was, and all that went wrong in it."""

    clients: int
    seconds: float
    account: Account
    killer: Killer
    acknowledged: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        seconds = self.account.seconds
        every = [one for kind in seconds.values() for one in kind]
        return {
            "clients": self.clients,
            "seconds": self.seconds,
            "requests_answered": len(every),
            "requests_per_s": len(every) / self.seconds,
            "by_kind": {kind: {"answered": len(each), **quantiles(each)} for kind, each in sorted(seconds.items())},
            "failed": {f"{kind}: {what}": count for (kind, what), count in sorted(self.account.failed.items())},
            "ended": dict(self.killer.ended),
            "start_s": quantiles(self.killer.starting),
            "sigterm_s": quantiles(self.killer.ending),
            "resident_bytes": self.killer.resident,
            "memories_acknowledged": self.acknowledged,
            "right": self.account.right / max(1, self.account.asked),
            "wrong": self.account.wrong,
        }


def run(folder: Path, minutes: float, clients: int, pause: tuple[float, float], seed: int = 0) -> Result:
    """Let clients use a server that is ended after pauses of random length, and compare it with what they know."""
    killer, account, over = Killer(folder, seed), Account(), threading.Event()
    users = [User(number, killer.url, account, over) for number in range(clients)]
    started = time.monotonic()
    for user in users:
        user.start()
    while (left := started + 60 * minutes - time.monotonic()) > 0:
        killer.watch(min(left, killer.draw.uniform(*pause)))
        if time.monotonic() < started + 60 * minutes:
            killer.restart()
    killer.end(signal.SIGKILL)
    seconds = time.monotonic() - started
    over.set()
    for user in users:
        user.join(PATIENCE)
        if user.is_alive():
            account.wrong.append(f"{user.prefix} never came back")
    for line in killer.logs.splitlines():
        if '"status": 500' in line or "Traceback" in line:
            account.wrong.append(line)
    with Store(folder / "store.db") as store:
        for user in users:
            account.wrong += compare(store, user)
    return Result(clients, seconds, account, killer, sum(len(user.kept) for user in users))


def compare(store: Store, user: User) -> list[str]:
    """What a store has otherwise than a user was told."""
    listed = {entry.name: entry for entry in store.list(limit=1000, tags=user.prefix)}
    wrong = [f"neither kept nor unsure: {name}" for name in listed.keys() - user.kept.keys() - user.unsure.keys()]
    for name, entry in listed.items():
        versions = len(store.versions(entry.id))
        if name in user.kept and versions - len(user.kept[name].texts) not in (0, bool(user.kept[name].appending)):
            wrong.append(f"{name} has {versions} versions")
        store.load(entry.id)  # raises where anything of it is missing or damaged
    for name, kept in user.kept.items():
        if name not in listed:
            wrong.append(f"lost: {name}")
            continue
        receipts = store.load(listed[name].id, version=1).receipts
        if receipts[0].context_sha256 != text_digest(kept.texts[0]):
            wrong.append(f"{name} was written from another text")
    return wrong


def quantiles(values: list[float]) -> dict[str, float]:
    found = np.quantile(values, [0.5, 0.99]) if values else [float("nan")] * 2
    return {"p50_s": float(found[0]), "p99_s": float(found[1])}


def table(row: dict[str, Any]) -> Table:
    """What happened, by kind of request."""
    built = Table(
        title=f"{row['clients']} clients, {row['seconds'] / 60:.1f} minutes, server ended {row['ended']}",
        caption=f"{row['requests_answered']:,} requests answered ({row['requests_per_s']:.1f}/s), "
        f"{sum(row['failed'].values()):,} ended in a clear error; {row['memories_acknowledged']:,} memories "
        f"acknowledged and kept; {len(row['wrong'])} things wrong; {row['right']:.2%} of the answers right; "
        f"server: at most {row['resident_bytes'] / 2**20:.0f} MB, started in {row['start_s']['p50_s']:.1f} s, after "
        f"SIGTERM ended in {row['sigterm_s']['p50_s']:.1f} s (medians)",
    )
    for heading in ("request", "answered", "p50, s", "p99, s", "server down", "busy"):
        built.add_column(heading, justify="left" if heading == "request" else "right")
    for kind, one in row["by_kind"].items():
        failed = [str(row["failed"].get(f"{kind}: {what}", 0)) for what in ("server down", "busy (429)")]
        built.add_row(kind, f"{one['answered']:,}", f"{one['p50_s']:.2f}", f"{one['p99_s']:.2f}", *failed)
    return built


def main() -> int:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--minutes", type=float, default=10.0, help="how long")
    command.add_argument("--clients", type=int, default=64, help="at a time")
    command.add_argument("--pause", type=float, nargs=2, default=(10.0, 40.0), help="seconds between two kills")
    command.add_argument("--seed", type=int, default=0, help="of kills")
    command.add_argument("--only", choices=("killed", "hostile"), help="one of the two runs")
    command.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    options = command.parse_args()
    from beside import beside, beside_table  # which use this module

    found: dict[str, Any] = {}
    if options.only != "hostile":
        with tempfile.TemporaryDirectory() as folder:
            killed = run(Path(folder), options.minutes, options.clients, tuple(options.pause), options.seed).to_dict()
        Console().print(table(killed), *killed["wrong"][:20], sep="\n")
        found["killed"] = killed
    if options.only != "killed":
        with tempfile.TemporaryDirectory() as folder:
            compared = beside(Path(folder), options.minutes, options.clients)
        Console().print(beside_table(compared), *compared["wrong"][:20], sep="\n")
        found["hostile"] = compared
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return any(one["wrong"] for one in found.values())


if __name__ == "__main__":
    sys.exit(main())
