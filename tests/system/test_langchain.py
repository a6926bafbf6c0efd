"""LangChain asks memories through OpenAI's API: the example runs against a server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server

from chat_models import save_model
from gradmem import Client
from helpers import ROOT

langchain = pytest.importorskip("langchain_openai", reason="LangChain is absent: pip install langchain-openai")
EXAMPLE = ROOT / "examples" / "ask-with-langchain.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("langchain")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    server = Server(folder, "kv-16", save_model(folder / "lm"))
    with Client(server.url) as client:
        client.write("a7:Qz\nk2:9f", "kv-16", name="notes")
        client.write("Ann signed the report.", str(folder / "lm"), name="report")
    yield server.url
    server.stop()


def test_the_example(url: str) -> None:
    command = [sys.executable, str(EXAMPLE), url, "kv-16:notes", "a7", "k2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "a7 -> Qz\nk2 -> 9f\n9f\n", done.stderr


def test_a_conversation_and_what_it_costs(url: str, folder: Path) -> None:
    memory = langchain.ChatOpenAI(model=f"{folder / 'lm'}:report", base_url=f"{url}/v1", api_key="none")
    turns = [("system", "Be short."), ("human", "Who signed it?")]
    first = memory.invoke(turns)
    turns += [("ai", "Ann."), ("human", "And when?")]
    second = memory.invoke(turns)
    assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"] > 0
    assert "".join(str(piece.content) for piece in memory.stream(turns)) == second.content


def test_an_error_says_what_is_wrong(url: str) -> None:
    memory = langchain.ChatOpenAI(model="kv-16:none", base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(Exception, match="no such memory"):
        memory.invoke("a7")
