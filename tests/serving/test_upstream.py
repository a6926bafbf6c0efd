"""The gateway: queries that another server answers, with prompt embeddings made here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.serving.requesting import authorized, client_of, events, refused
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from gradmem import GradmemError
from gradmem.sampling import Sampling, Token
from gradmem.serving import upstream as gateway
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.settings import Settings
from gradmem.serving.upstream import checked_url
from gradmem.store import Store

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from tests.serving.upstream_standin import Upstream

pytest.importorskip("fastapi")
TEXT = "Clara signed the minutes in Velmouth."
ASKED = "Who signed?"
CRAM = {"name": "cram", "n_mem": 3, "write_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cram(folder: str) -> gradmem.BoundMemory:
    """A memory of vectors."""
    return gradmem.load(folder, CRAM).write(TEXT)


@pytest.fixture
def upstream(folder: str) -> Iterator[Upstream]:
    """A server that takes prompt embeddings."""
    from tests.serving.upstream_standin import Upstream, running

    with running(Upstream(AutoModelForCausalLM.from_pretrained(folder).eval())) as found:
        yield found


@pytest.fixture
def client(
    upstream: Upstream, folder: str, cram: gradmem.BoundMemory, tmp_path: Path, keys: ApiKeys
) -> Iterator[TestClient]:
    """A client of a gateway that has the memory as `notes`."""
    with client_of(folder, keys, tmp_path, upstream=upstream.url) as found:
        found.app.state.store.put(cram, name="notes")
        yield found


def ask(client: TestClient) -> Any:
    return client.post("/v1/memories/notes/ask", json={"queries": [ASKED]})


def chat(client: TestClient, folder: str, **more: Any) -> Any:
    asked = {"model": f"{folder}:notes", "messages": [{"role": "user", "content": ASKED}]}
    return client.post("/v1/chat/completions", json=asked | more)


@pytest.mark.filterwarnings("ignore:cram recites")
def test_the_answer_and_its_evidence_are_those_of_read(
    client: TestClient, upstream: Upstream, cram: gradmem.BoundMemory
) -> None:
    found, wanted = ask(client).json()["answers"][0], cram.answer(ASKED)
    assert found["text"] == wanted.text
    for name in ("logprob", "lowest", "margin"):
        assert found[name] == pytest.approx(getattr(wanted, name), abs=1e-4)
    for name in ("finish_reason", "query_tokens", "answer_tokens"):
        assert found[name] == getattr(wanted, name)
    assert found["near_loss"] is None
    unwritten = gradmem.load(cram.model.name, CRAM | {"seed": 1}).write(TEXT, 0)
    assert unwritten.ask(ASKED) != wanted.text, "the memory matters"


@pytest.mark.filterwarnings("ignore:cram recites")
def test_a_chat_streams_through(client: TestClient, upstream: Upstream, folder: str, cram: gradmem.BoundMemory) -> None:
    wanted = cram.ask([ASKED])[0]
    assert chat(client, folder).json()["choices"][0]["message"]["content"] == wanted
    sent = events(chat(client, folder, stream=True).text)
    pieces = [one["delta"].get("content") or "" for _, data in sent[:-1] for one in data["choices"]]
    assert "".join(pieces) == wanted
    assert len([piece for piece in pieces if piece]) > 1


@pytest.mark.filterwarnings("ignore:cram recites")
def test_options_of_an_answer_are_obeyed(upstream: Upstream, cram: gradmem.BoundMemory) -> None:
    wanted, tokens = cram.ask(ASKED), list[Token]()
    engine = gateway.UpstreamEngine(cram.model, upstream.url, max_queue=9, timeout=60)

    async def answers() -> list[gradmem.Answer]:
        options = [
            Sampling(max_tokens=5, top_logprobs=3),
            Sampling(stop=(wanted[4:7],)),
            Sampling(logit_bias={cram.model.task.encode("a")[0]: 100.0}, max_tokens=2),
            Sampling(temperature=0.5, top_p=0.9, seed=3, presence_penalty=1.0, frequency_penalty=0.5),
        ]
        listeners = [tokens.append, None, None, None]
        pairs = zip(options, listeners, strict=True)
        futures = [engine.ask("notes", cram, ASKED, sampling=one, on_token=told) for one, told in pairs]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    short, cut, biased, _ = asyncio.run(answers())
    assert (short.finish_reason, short.answer_tokens) == ("length", 5)
    assert wanted.startswith(short.text)
    assert [one.text for one in tokens] == [one.likeliest[0][0] for one in tokens]
    assert [len(one.likeliest) for one in tokens] == [3] * 5
    assert sum(one.logprob for one in tokens) / 5 == pytest.approx(short.logprob)
    assert (cut.text, cut.finish_reason) == (wanted[: wanted.index(wanted[4:7])], "stop")
    assert biased.text == "aa"
    names = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
    assert sorted([body[name] for name in names] for body in upstream.bodies)[-1] == [0.5, 0.9, 3, 1.0, 0.5]
    engine.close()


def test_no_tensor_of_a_client_is_passed_on(client: TestClient, upstream: Upstream, folder: str) -> None:
    for answer in (
        chat(client, folder, prompt_embeds="AAAA"),
        chat(client, folder, messages=[{"role": "user", "content": ASKED, "prompt_embeds": "AAAA"}]),
        client.post("/v1/memories/notes/ask", json={"queries": [ASKED], "prompt_embeds": ["AAAA"]}),
    ):
        refused(answer, 400, "prompt_embeds: this server takes no tensors")
    part = {"type": "prompt_embeds", "data": "AAAA"}
    assert chat(client, folder, messages=[{"role": "user", "content": [part]}]).status_code == 400
    assert not upstream.bodies
    named = {"queries": ['Is "prompt_embeds": a field?', "prompt_embeds"]}
    assert client.post("/v1/memories/notes/ask", json=named).status_code == 200
    assert all("Is" not in json.dumps(body | {"prompt_embeds": ""}) for body in upstream.bodies)


def test_who_may_ask_is_checked_here(
    upstream: Upstream, folder: str, cram: gradmem.BoundMemory, keys: ApiKeys, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GRADMEM_UPSTREAM_KEY", "secret")
    upstream.key = "secret"
    mine, other = keys.add("ann"), keys.add("bob")
    with client_of(folder, keys, tmp_path, host="0.0.0.0", upstream=upstream.url) as client:
        client.app.state.store.owned_by("ann").put(cram, name="notes")
        refused(ask(client), 401, "a key is needed")
        client.headers = authorized(other)
        assert ask(client).status_code == 404
        assert not upstream.headers
        client.headers = authorized(mine)
        assert ask(client).status_code == 200
        assert [one["authorization"] for one in upstream.headers] == ["Bearer secret"]
        upstream.key = "another"
        refused(ask(client), 502, "the upstream server refuses the key of this server")


def test_keys_and_values_are_refused(upstream: Upstream, folder: str, keys: ApiKeys, tmp_path: Path) -> None:
    compacted = gradmem.load(folder, {"name": "full_context"}).write(TEXT)
    with client_of(folder, keys, tmp_path, upstream=upstream.url) as client:
        client.app.state.store.put(compacted, name="notes")
        refused(ask(client), 422, "the upstream server takes memories of vectors only")
        new = client.post("/v1/memories", json={"text": TEXT, "checkpoint": folder})
        refused(new, 422, "write with `gradmem write --method vectors --store`")


def test_a_checkpoint_of_vectors_writes_here(
    upstream: Upstream, served: str, keys: ApiKeys, tmp_path: Path, tiny: gradmem.MemoryModel
) -> None:
    upstream.model = tiny.method.backbone.model
    with client_of(served, keys, tmp_path, upstream=upstream.url) as client:
        new = {"text": "a7:Qz\nk2:9f", "checkpoint": served, "name": "pairs"}
        assert client.post("/v1/memories", json=new).status_code == 201
        found = client.post("/v1/memories/pairs/ask", json={"queries": ["a7", "k2"]}).json()["answers"]
        assert [one["text"] for one in found] == tiny.write(new["text"]).ask(["a7", "k2"])


def test_a_lost_connection_is_tried_again_before_the_first_byte(
    client: TestClient, upstream: Upstream, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gateway, "PAUSES", (0.0, 0.0))
    upstream.drop = 2
    assert ask(client).status_code == 200
    upstream.drop = 3
    answer = ask(client)
    refused(answer, 503, "the upstream server cannot be reached")
    assert answer.headers["Retry-After"] == "5"


def test_nothing_is_repeated_once_it_has_begun(client: TestClient, upstream: Upstream, folder: str) -> None:
    upstream.tokens_before_end = 3
    refused(ask(client), 502, "the upstream server broke off its answer")
    assert len(upstream.bodies) == 1
    *pieces, (name, data) = events(chat(client, folder, stream=True).text)
    assert pieces
    assert (name, data["error"]["message"]) == ("error", "the upstream server broke off its answer")
    assert len(upstream.bodies) == 2


def test_errors_are_told(client: TestClient, upstream: Upstream) -> None:
    for status, shown, words in (
        (429, 503, "the upstream server is busy"),
        (503, 503, "the upstream server is busy"),
        (504, 504, "did not answer in time"),
        (400, 502, "refuses the request: not now"),
        (404, 502, "its base URL mostly ends in /v1"),
        (500, 502, "failed with status 500"),
    ):
        upstream.refuse = [status]
        answer = ask(client)
        refused(answer, shown, words)
        assert answer.headers.get("Retry-After") == ("7" if shown == 503 else None)
    assert not upstream.bodies, "what was answered is not repeated"
    assert ask(client).status_code == 200


def test_a_silent_upstream_is_left(upstream: Upstream, cram: gradmem.BoundMemory) -> None:
    """If nothing comes for so long, whoever waits is told."""
    upstream.hold = True
    engine = gateway.UpstreamEngine(cram.model, upstream.url, max_queue=1, timeout=1.0)

    async def wait() -> None:
        with pytest.raises(gateway.Refused, match=r"the upstream server (did not answer|stopped)") as told:
            await asyncio.wrap_future(engine.ask("notes", cram, ASKED))
        assert told.value.status == 504

    asyncio.run(wait())
    engine.close()


def test_too_many_queries_are_refused_and_those_whose_client_leaves_end(
    upstream: Upstream, folder: str, cram: gradmem.BoundMemory
) -> None:
    upstream.hold = True
    engine = gateway.UpstreamEngine(cram.model, upstream.url, max_queue=1, timeout=60)

    async def crowd() -> None:
        began = asyncio.Event()
        waiting = engine.ask("notes", cram, ASKED, on_text=lambda _: began.set())
        with pytest.raises(gateway.Busy, match="1 requests are waiting already"):
            engine.ask("notes", cram, ASKED)
        await began.wait()
        assert waiting.cancel()
        while engine._asked or not upstream.left:
            await asyncio.sleep(0.01)
        late = engine.ask("notes", cram, ASKED)
        await asyncio.to_thread(engine.close, 0.01)
        assert late.cancelled()
        with pytest.raises(gateway.Closed):
            engine.ask("notes", cram, ASKED)

    asyncio.run(crowd())


def test_an_upstream_answers_for_one_checkpoint(folder: str, tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="name the one checkpoint"):
        Settings(checkpoints=("kv-32", folder), upstream="http://127.0.0.1:8001/v1")
    Store(tmp_path / "store.db").close()
    for url in ("127.0.0.1:8001", "ftp://127.0.0.1/v1", "http://", "http://[::1", "http://a:b/v1"):
        with pytest.raises(GradmemError, match="--upstream must be the base URL"):
            checked_url(url)
    assert checked_url("https://gpu:8001/v1") == "https://gpu:8001/v1/"
