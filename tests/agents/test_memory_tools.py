"""The tools that write, ask, change and list memories, beside the model and the store by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradmem
from gradmem.store import Store

pytest.importorskip("mcp")
from mcp import Client, MCPError

from gradmem.agents.memory_tools import MemoryTools

from .calling import call, refused

TEXT, MORE, OTHER = "Ann signed the paper.\n", "The code is 4711.\n", "The code is 1234.\n"
QUESTION = "What is the code?"
Talk = Callable[..., Any]


@pytest.fixture(scope="module")
def model(language_model: str) -> gradmem.MemoryModel:
    """The same model, without a server."""
    return gradmem.load(language_model)


def test_a_text_is_written_once_with_progress_and_asked(talk: Talk, place: Path, model: gradmem.MemoryModel) -> None:
    seen: list[tuple[float, float | None]] = []

    async def progress(done: float, total: float | None, _: str | None) -> None:
        seen.append((done, total))

    async def say(client: Client) -> None:
        arguments = {"text": TEXT, "name": "paper", "tags": ["a", "b"]}
        result = await client.call_tool("remember", arguments, progress_callback=progress)
        entry = result.structured_content
        assert (entry["name"], entry["tags"], entry["version"], entry["chunks"]) == ("paper", ["a", "b"], 1, 1)
        assert entry["tokens"] == len(TEXT)  # each byte is a token
        assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
        assert {total for _, total in seen} == {len(seen)}
        assert len(seen) > 1
        found = await call(client, "ask", memory="paper", question=QUESTION)
        wanted = model.write(TEXT).answer(QUESTION)
        assert (found["answer"], found["complete"]) == (wanted.text, wanted.finish_reason == "stop")
        assert found["logprob"] == pytest.approx(wanted.logprob, abs=1e-3)
        assert (await call(client, "ask", memory=entry["id"], question=QUESTION)) == found
        again = await client.call_tool("remember", {"text": TEXT, "tags": ["c"]}, progress_callback=progress)
        assert again.structured_content == entry | {"tags": ["a", "b", "c"]}
        assert len(seen) == seen[-1][0]  # nothing was written

    talk(say)
    with Store(place) as store:  # the same memory as in Python and on the command line
        assert store.write(model, TEXT).name == "paper"


def test_tools_say_what_they_do(talk: Talk) -> None:
    async def say(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"remember", "ask", "append", "replace", "forget", "list", "inspect", "memory"} <= set(tools)
        for tool in tools.values():
            assert tool.description
            assert "\n " not in tool.description
            assert all("description" in given for given in tool.input_schema["properties"].values()), tool.name
        assert tools["ask"].annotations.read_only_hint
        assert tools["forget"].annotations.destructive_hint

    talk(say)


def test_a_long_text_is_cut_into_chunks(talk: Talk, model: gradmem.MemoryModel) -> None:
    text = "Line of a long report.\n" * 30
    chunks = model.encoder.chunks(text)
    assert len(chunks) > 1
    seen: list[float] = []

    async def progress(done: float, total: float | None, _: str | None) -> None:
        assert total is not None
        seen.append(done / total)

    async def say(client: Client) -> None:
        result = await client.call_tool("remember", {"text": text, "name": "long"}, progress_callback=progress)
        assert result.structured_content["chunks"] == len(chunks)
        assert seen == sorted(set(seen))
        assert seen[-1] == 1
        told = await call(client, "inspect", memory="long")
        assert [one["tokens"] for one in told["chunks"]] == [len(chunk) for chunk in chunks]

    talk(say)


def test_chunks_are_appended_replaced_and_forgotten(talk: Talk, model: gradmem.MemoryModel) -> None:
    async def say(client: Client) -> None:
        async def answers_like(parts: list[str]) -> None:
            found = await call(client, "ask", memory="paper", question=QUESTION)
            assert found["answer"] == model.join([model.write(part) for part in parts]).ask(QUESTION)

        await call(client, "remember", text=TEXT, name="paper")
        assert (await call(client, "append", memory="paper", text=MORE))["version"] == 2
        await answers_like([TEXT, MORE])
        assert (await call(client, "replace", memory="paper", chunk=2, text=OTHER))["version"] == 3
        await answers_like([TEXT, OTHER])
        told = await call(client, "forget", memory="paper", chunk=1)
        assert "Version 3 still has it" in told["result"]
        await answers_like([OTHER])
        assert (await call(client, "replace", memory="paper", text=TEXT))["chunks"] == 1
        await answers_like([TEXT])
        versions = (await call(client, "inspect", memory="paper"))["versions"]
        assert [(one["version"], one["chunks"]) for one in versions] == [(1, 1), (2, 2), (3, 2), (4, 1), (5, 1)]
        assert await refused(client, "replace", memory="paper", chunk=2, text=OTHER) == (
            "there is no chunk 2: the memory has one chunk, number 1"
        )
        assert "without it nothing is left" in await refused(client, "forget", memory="paper", chunk=1)
        await call(client, "forget", memory="paper")
        assert (await call(client, "list"))["memories"] == []

    talk(say)


def test_a_memory_of_other_options_is_changed_with_these(talk: Talk, place: Path, language_model: str) -> None:
    """As it was written by `gradmem write --budget 0.5`."""
    model = gradmem.load(language_model, {"budget": 0.5})
    with Store(place) as store:
        store.put(model.write(TEXT), name="half")

    async def say(client: Client) -> None:
        await call(client, "append", memory="half", text=MORE)
        found = await call(client, "ask", memory="half", question=QUESTION)
        assert found["answer"] == model.join([model.write(TEXT), model.write(MORE)]).ask(QUESTION)

    talk(say)


def test_pages_of_the_list_and_receipts(talk: Talk, place: Path) -> None:
    async def say(client: Client) -> None:
        for name, tags in (("one", ["x"]), ("two", []), ("three", ["x"])):
            await call(client, "remember", text=f"Text {name}.", name=name, tags=tags)
        page = await call(client, "list", limit=2)
        assert [one["name"] for one in page["memories"]] == ["three", "two"]
        page = await call(client, "list", limit=2, after=page["next"])
        assert ([one["name"] for one in page["memories"]], page["next"]) == (["one"], None)
        assert [one["name"] for one in (await call(client, "list", tags=["x"]))["memories"]] == ["three", "one"]
        assert [one["name"] for one in (await call(client, "list", name="t*"))["memories"]] == ["three", "two"]
        resources = (await client.list_resources()).resources
        assert [one.name for one in resources] == ["receipts of three", "receipts of two", "receipts of one"]
        told = await call(client, "inspect", memory="two")
        assert told["receipts"] == resources[1].uri
        (receipts,) = (await client.read_resource(resources[1].uri)).contents
        with Store(place) as store:
            assert json.loads(receipts.text) == [one.to_dict() for one in store.load("two").receipts]
        with pytest.raises(MCPError, match="there is no memory 'four'"):
            await client.read_resource("gradmem://memories/four/receipts")

    talk(say)


def test_errors_are_one_line(talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("secret\ntext")

    async def say(client: Client) -> None:
        await call(client, "remember", text=TEXT, name="paper")
        for tool, arguments, words in (
            ("ask", {"memory": "other", "question": QUESTION}, "there is no memory 'other': the tool `list` shows"),
            ("ask", {"memory": "paper"}, "question: Field required"),
            ("ask", {"memory": "paper", "question": ""}, "the query is empty"),
            ("remember", {"text": ""}, "the context is empty"),
            ("remember", {"text": MORE, "name": "paper"}, "the name 'paper' is taken"),
            ("remember", {"text": MORE, "name": "a*"}, "a name must be printable"),
            ("remember", {"text": MORE, "name": "/memories/a"}, "names below /memories are those of files"),
            ("remember", {"text": "\ud800"}, "text: "),
            ("list", {"limit": 0}, "limit: "),
            ("list", {"after": "x"}, "is not a cursor"),
            ("nothing", {}, "Unknown tool"),
        ):
            assert words in await refused(client, tool, **arguments)
        monkeypatch.setattr(MemoryTools, "_own", crash)
        assert await refused(client, "forget", memory="paper") == "internal error: see the server's log"
        assert "RuntimeError" in caplog.text

    talk(say)


def test_a_model_that_cannot_be_loaded(talk: Talk, language_model: str, tmp_path: Path) -> None:
    (Path(language_model) / "config.json").rename(tmp_path / "config.json")
    try:
        assert "is no checkpoint: it needs config.json" in talk(lambda client: refused(client, "remember", text=TEXT))
    finally:
        (tmp_path / "config.json").rename(Path(language_model) / "config.json")
