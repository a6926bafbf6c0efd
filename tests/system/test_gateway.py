"""`gradmem serve --upstream` as a process: OpenAI's client asks it, and a stand-in of vLLM answers."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from served import Server
from tests.serving.upstream_standin import Upstream, running
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from gradmem.cli.main import main
from gradmem.serving.api_keys import ApiKeys
from gradmem.store import Store

TEXT = "Clara signed the minutes in Velmouth."
MESSAGES = [{"role": "user", "content": "Who signed?"}]


def test_a_key_asks_its_memories_through_the_gateway(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    memory = gradmem.load(folder, {"name": "vectors", "n_mem": 3, "write_steps": 1}).write(TEXT)
    with Store(tmp_path / "store.db") as store:
        store.owned_by("ann").put(memory, name="notes")
    key = ApiKeys(tmp_path / "keys.json").add("ann")
    wanted = memory.ask("Who signed?")
    upstream = Upstream(AutoModelForCausalLM.from_pretrained(folder).eval())
    with running(upstream):
        server = Server(tmp_path, folder, "--upstream", upstream.url)
        try:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            asked = {"model": f"{folder}:notes", "messages": MESSAGES}
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == wanted
            chunks = list(client.chat.completions.create(**asked, stream=True))
            pieces = [one.delta.content or "" for chunk in chunks for one in chunk.choices]
            assert "".join(pieces) == wanted
            stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            with pytest.raises(openai.NotFoundError):
                stranger.chat.completions.create(**asked)
            with pytest.raises(openai.BadRequestError, match="this server takes no tensors"):
                client.chat.completions.create(**asked, extra_body={"prompt_embeds": "AAAA"})
            assert len(upstream.bodies) == 2
            upstream.drop = 99
            with pytest.raises(openai.InternalServerError, match="the upstream server cannot be reached") as told:
                client.chat.completions.create(**asked)
            assert told.value.status_code == 503
        finally:
            server.stop()


def test_what_cannot_be_a_gateway_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--upstream", "http://127.0.0.1:8001/v1"]) == 2
    assert "name the one checkpoint that it has" in capsys.readouterr().err
    assert main(["serve", "kv-32", "--upstream", "127.0.0.1:8001"]) == 2
    assert "--upstream must be the base URL" in capsys.readouterr().err
