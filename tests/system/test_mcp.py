"""`gradmem mcp` as a process, and the official SDK as its client: over standard input and output, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

import gradmem
from chat_models import save_model

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

TEXT, QUESTION = "Ann signed the paper.\n", "Who signed?"
LONG = "Line of a report that goes on and on.\n" * 2000
NOTES = "/memories/notes.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny language model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where the server keeps memories and keys."""
    return {**os.environ, "GRADMEM_STORE": str(tmp_path / "store.db"), "GRADMEM_KEYS": str(tmp_path / "keys.json")}


def run(environment: dict[str, str], *arguments: str) -> str:
    """Output of a command."""
    command = [sys.executable, "-m", "gradmem", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


async def called(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_client_writes_asks_and_forgets(model: str, environment: dict[str, str], mode: str) -> None:
    """By the newest protocol and by that of earlier clients."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "gradmem", "mcp", model], env=environment)
    steps: list[tuple[float, float | None]] = []

    async def progress(done: float, total: float | None, _: str | None) -> None:
        steps.append((done, total))

    async def talk() -> str:
        async with Client(server, mode=mode) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            assert names[:8] == ["remember", "ask", "append", "replace", "forget", "list", "inspect", "memory"]
            result = await client.call_tool("remember", {"text": TEXT, "name": "paper"}, progress_callback=progress)
            assert not result.is_error, result.content
            assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
            assert steps[-1] == (len(steps), len(steps))
            answer: str = (await called(client, "ask", memory="paper", question=QUESTION))["answer"]
            assert (await called(client, "append", memory="paper", text="Tea at noon."))["version"] == 2
            (resource,) = (await client.list_resources()).resources
            assert "context_sha256" in (await client.read_resource(resource.uri)).contents[0].text
            await client.call_tool("memory", {"command": "create", "path": NOTES, "file_text": TEXT})
            assert (await called(client, "ask", memory=NOTES, question=QUESTION))["answer"] == answer
            result = await client.call_tool("ask", {"memory": "none", "question": QUESTION})
            assert (result.is_error, "there is no memory 'none'" in result.content[0].text) == (True, True)
            await called(client, "forget", memory="paper")
            assert [one["name"] for one in (await called(client, "list"))["memories"]] == [NOTES]
            return answer

    assert asyncio.run(talk()) == gradmem.load(model).write(TEXT).ask(QUESTION)
    assert NOTES in run(environment, "store", "ls", "--json")


def test_a_call_that_is_cancelled_ends_its_write(model: str, environment: dict[str, str]) -> None:
    server = StdioServerParameters(command=sys.executable, args=["-m", "gradmem", "mcp", model], env=environment)

    async def talk() -> None:
        async with Client(server) as client:
            begun = anyio.Event()

            async def progress(*_: Any) -> None:
                begun.set()

            async with anyio.create_task_group() as group:

                async def remember() -> None:
                    await client.call_tool("remember", {"text": LONG}, progress_callback=progress)

                group.start_soon(remember)
                await begun.wait()
                group.cancel_scope.cancel()
            # Another write has its turn long before all chunks of the first would be written.
            await called(client, "remember", text=TEXT, name="paper")
            assert [one["name"] for one in (await called(client, "list"))["memories"]] == ["paper"]

    asyncio.run(talk())


def test_the_server_ends_with_its_client(model: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gradmem", "mcp", model]
    for leave in (lambda one: one.stdin.close(), lambda one: one.send_signal(signal.SIGINT)):
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdin is not None
        server.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        server.stdin.flush()
        assert server.stdout is not None
        assert b'"id":1' in server.stdout.readline()
        leave(server)
        assert server.wait(60) in (0, -signal.SIGINT)


class HttpServer:
    """`gradmem mcp --http` as a process."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "gradmem", "mcp", *arguments, "--http", "--port", "0"]
        self.log = Path(environment["GRADMEM_STORE"]).with_name("log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 120)[0], self.log.read_text()
        self.url = self.process.stdout.readline().decode().strip().replace("0.0.0.0", "127.0.0.1") + "/mcp"

    def client(self, key: str, mode: str) -> AbstractAsyncContextManager[Client]:
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120)
        return Client(streamable_http_client(self.url, http_client=http), mode=mode)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def http_server(model: str, environment: dict[str, str]) -> Iterator[HttpServer]:
    """A server that other machines can reach, with keys of Ann and Bob."""
    environment["ANN"], environment["BOB"] = (run(environment, "keys", "add", name) for name in ("ann", "bob"))
    server = HttpServer(environment, model, "--host", "0.0.0.0")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_each_key_has_its_own_memories(http_server: HttpServer, environment: dict[str, str], mode: str) -> None:
    async def talk() -> None:
        steps: list[float] = []

        async def progress(done: float, *_: Any) -> None:
            steps.append(done)

        async with http_server.client(environment["ANN"], mode) as ann:
            wanted = {"text": TEXT, "name": "paper"}
            assert not (await ann.call_tool("remember", wanted, progress_callback=progress)).is_error
            assert len(steps) > 1
            await ann.call_tool("memory", {"command": "create", "path": NOTES, "file_text": TEXT})
            (resource,) = (await ann.list_resources()).resources
        async with http_server.client(environment["BOB"], mode) as bob:
            assert (await called(bob, "list"))["memories"] == []
            assert (await bob.list_resources()).resources == []
            for tool, arguments in (
                ("ask", {"memory": "paper", "question": QUESTION}),
                ("ask", {"memory": NOTES, "question": QUESTION}),
                ("memory", {"command": "view", "path": NOTES}),
                ("forget", {"memory": "paper"}),
            ):
                assert (await bob.call_tool(tool, arguments)).is_error
            with pytest.raises(Exception, match="there is no memory"):
                await bob.read_resource(resource.uri)
        async with http_server.client(environment["ANN"], mode) as ann:
            assert (await called(ann, "ask", memory="paper", question=QUESTION))["answer"]

    asyncio.run(talk())
    assert http_server.stop() in (0, -signal.SIGTERM)
    log = http_server.log.read_text()
    assert "Traceback" not in log
    assert not {word for word in ("Ann", "paper", "notes") if word in log}


def test_who_is_not_let_in(http_server: HttpServer) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"Accept": "application/json, text/event-stream"}
    for headers in ({}, {"Authorization": "Bearer gm-wrong"}):
        answer = httpx2.post(http_server.url, json=body, headers=accept | headers)
        assert (answer.status_code, "a key is needed" in answer.json()["error"]["message"]) == (401, True)


def test_on_loopback_the_local_user_needs_no_key(model: str, environment: dict[str, str]) -> None:
    server = HttpServer(environment, model)
    try:

        async def talk() -> None:
            async with Client(server.url) as client:
                assert (await called(client, "list"))["memories"] == []

        asyncio.run(talk())
        accept = {"Accept": "application/json, text/event-stream"}
        foreign = httpx2.post(server.url, json={}, headers=accept | {"Origin": "https://other.example"})
        assert foreign.status_code == 403
        stream = httpx2.get(server.url, headers=accept)
        assert (stream.status_code, stream.headers["Allow"]) == (405, "POST")
    finally:
        server.process.kill()
        server.process.wait()


def test_without_its_packages_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['mcp'] = None\nfrom gradmem.cli.main import main; raise SystemExit(main(['mcp']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "an MCP server needs more packages (mcp" in done.stderr
    assert "pip install 'gradmem[mcp]'" in done.stderr


def test_without_keys_no_other_machine_is_served(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gradmem", "mcp", "--http", "--host", "0.0.0.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "make a key first" in done.stderr


def test_the_protocols_inspector_lists_and_calls_tools(model: str, environment: dict[str, str]) -> None:
    """It would complain about schemas that some clients cannot use (`--strict`); it hides our environment."""
    if shutil.which("mcp-inspector") is None:
        pytest.skip("the inspector is not installed: npm install -g @modelcontextprotocol/inspector (Node.js 22.19)")

    def inspected(*method: str) -> Any:
        given = [f"{name}={environment[name]}" for name in ("GRADMEM_STORE", "PYTHONPATH") if name in environment]
        line = [
            "mcp-inspector",
            "--cli",
            "--connect-timeout",
            "120000",
            *(part for one in given for part in ("-e", one)),
        ]
        line += [sys.executable, "-m", "gradmem", "mcp", model, "--method", *method]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert "remember" in [tool["name"] for tool in inspected("tools/list", "--strict")["tools"]]
    said = ["memory", "--tool-arg", "command=create", "path=/memories/a.md", "file_text=Ann signed."]
    assert not inspected("tools/call", "--tool-name", *said)["isError"]
    seen = inspected("tools/call", "--tool-name", "memory", "--tool-arg", "command=view", "path=/memories/a.md")
    assert "Ann signed." in seen["content"][0]["text"]
