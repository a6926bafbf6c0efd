"""`/v1/memories`: what it answers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import event
from starlette.testclient import TestClient
from tests.serving.requesting import MANY, TEXT, client_of, events, refused, written
from tests.serving.routes.conftest import Plain

from gradmem import Memory, MemoryModel, load
from gradmem.memory import SCALE
from gradmem.serving.api_keys import ApiKeys
from gradmem.tasks.base import Task
from stored import made


def test_write_ask_list_inspect_append_and_delete(client: TestClient, served: str) -> None:
    entry = written(client, served, name="notes", tags=["work"])
    assert written(client, served)["id"] == entry["id"]
    answers = client.post("/v1/memories/notes/ask", json={"queries": ["a7", "zz"]}).json()["answers"]
    wanted = load(served).write(TEXT).answer(["a7", "zz"])
    assert [answer["text"] for answer in answers] == [answer.text for answer in wanted]
    assert answers[0]["logprob"] == pytest.approx(wanted[0].logprob, abs=1e-4)
    assert answers[0].keys() == vars(wanted[0]).keys()
    assert [one["id"] for one in client.get("/v1/memories?tags=work").json()["memories"]] == [entry["id"]]
    shown = client.get("/v1/memories/notes").json()
    assert shown["memory"]["id"] == entry["id"]
    assert len(shown["receipts"][0]["token_losses"]) == entry["current"]["tokens"]
    assert "Qz" not in json.dumps(shown)
    assert client.delete(f"/v1/memories/{entry['id']}").status_code == 204
    refused(client.get("/v1/memories/notes"), 404, "no such memory")


def test_pages_of_a_listing(client: TestClient, served: str) -> None:
    ids = [written(client, served, steps=steps)["id"] for steps in (0, 1, 2)]
    first = client.get("/v1/memories?limit=2").json()
    rest = client.get("/v1/memories", params={"limit": 2, "after": first["next"]}).json()
    assert [one["id"] for one in first["memories"] + rest["memories"]] == ids[::-1]
    assert rest["next"] is None


def test_a_write_tells_its_losses(client: TestClient, served: str) -> None:
    wanted = {"text": TEXT, "checkpoint": served, "steps": 3, "stream": True}
    told = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in told] == ["step"] * 4 + ["memory"]
    assert [(data["step"], data["of"]) for _, data in told[:-1]] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    losses = client.get(f"/v1/memories/{told[-1][1]['id']}").json()["receipts"][0]["losses"]
    assert [data["loss"] for _, data in told[1:-1]] == pytest.approx(losses[:-1], abs=1e-5)


def test_append_makes_a_version(client: TestClient, tiny: MemoryModel, tmp_path: Path, keys: ApiKeys) -> None:
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk_size": 8})
    chunked.save_pretrained(tmp_path / "chunked")
    with client_of(str(tmp_path / "chunked"), keys, tmp_path) as client:
        entry = written(client, str(tmp_path / "chunked"))
        more = client.post(f"/v1/memories/{entry['id']}/append", json={"text": "b1:c2", "before": TEXT})
        assert more.json()["current"]["number"] == 2
        receipts = client.get(f"/v1/memories/{entry['id']}").json()["receipts"]
        assert len(receipts[0]["earlier"]) == 1
        asked = {"queries": ["b1"], "version": 1}
        assert client.post(f"/v1/memories/{entry['id']}/ask", json=asked).status_code == 200


def test_a_watched_write_tells_tokens_and_their_losses(client: TestClient, served: str) -> None:
    """After each step the losses are those of a memory of as many steps; what is kept already is watched again."""
    wanted = {"text": TEXT, "checkpoint": served, "steps": 2, "stream": True, "tokens": True}
    told = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in told] == ["tokens", "step", "step", "step", "memory"]
    model = load(served)
    assert "".join(told[0][1]["tokens"]) == model.task.context_text(TEXT) == "!a7:Qz!!k2:9f!|"
    for number, (_, data) in enumerate(told[1:-1]):
        receipt = model.write(TEXT, number).receipts[0]
        assert data["token_losses"] == pytest.approx(receipt.token_losses, abs=1e-3)
    again = events(client.post("/v1/memories", json=wanted).text)
    assert [name for name, _ in again] == ["tokens", "step", "step", "step", "memory"]
    assert again[-1][1]["id"] == told[-1][1]["id"]
    assert "token_losses" not in events(client.post("/v1/memories", json=wanted | {"tokens": False}).text)[0][1]


def test_appending_is_refused_where_it_was_never_trained(client: TestClient, served: str) -> None:
    ref = written(client, served, steps=1)["id"]
    refused(client.post(f"/v1/memories/{ref}/append", json={"text": "b1:c2"}), 422, "never trained to append")
    assert client.get(f"/v1/memories/{ref}").json()["memory"]["current"]["number"] == 1
    more = client.post(f"/v1/memories/{ref}/append", json={"text": "b1:c2", "may_forget": True}).json()
    assert (more["current"]["number"], more["current"]["unmeasured"] > 0, more["current"]["at_risk"]) == (2, True, None)
    (receipt,) = client.get(f"/v1/memories/{ref}").json()["receipts"]
    assert (receipt["earlier"][0]["lost"], receipt["earlier"][0]["measured"]) == (None, False)


def test_a_watched_append_shows_what_is_appended(
    client: TestClient, tiny: MemoryModel, tmp_path: Path, keys: ApiKeys
) -> None:
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk_size": 8})
    chunked.save_pretrained(tmp_path / "chunked")
    with client_of(str(tmp_path / "chunked"), keys, tmp_path) as client:
        ref = written(client, str(tmp_path / "chunked"))["id"]
        wanted = {"text": "b1:c2", "steps": 1, "stream": True, "tokens": True}
        told = events(client.post(f"/v1/memories/{ref}/append", json=wanted).text)
        assert "".join(told[0][1]["tokens"]) == "!b1:c2!|"
        last = client.get(f"/v1/memories/{ref}").json()["receipts"][0]
        assert told[-2][1]["token_losses"] == pytest.approx(last["token_losses"], abs=1e-3)


def test_chunks_that_are_read_together_are_appended_to(plain: Plain) -> None:
    """With the options of the memory, which are not those of the server."""
    model = load(plain.name, {"budget": 0.5})
    parts = ["Ann signed the report.", "The code is 4711."]
    ref = plain.client.post("/v1/memories/files", content=model.write(parts[0]).to_bytes()).json()["id"]
    wanted = {"text": parts[1], "stream": True, "tokens": True}
    told = events(plain.client.post(f"/v1/memories/{ref}/append", json=wanted).text)
    assert "".join(told[0][1]["tokens"]) == parts[1]
    assert told[-1][1]["current"]["number"] == 2
    answers = plain.client.post(f"/v1/memories/{ref}/ask", json={"queries": ["Who?"]}).json()["answers"]
    assert answers[0]["text"] == model.join([model.write(part) for part in parts]).ask("Who?")
    refused(plain.client.post(f"/v1/memories/{ref}/append", json={"text": "x", "before": "y"}), 422, "stays as it is")


def test_change_renames_tags_and_pins(client: TestClient, served: str) -> None:
    ref = written(client, served, name="notes", tags=["a"])["id"]
    changed = client.patch("/v1/memories/notes", json={"name": "other", "tags": ["b", "c"], "pinned": True}).json()
    assert (changed["id"], changed["name"], changed["tags"], changed["pinned"]) == (ref, "other", ["b", "c"], True)
    assert client.get("/v1/memories?name=other").json()["memories"] == [changed]
    refused(client.get("/v1/memories/notes"), 404, "no such memory")
    refused(client.delete(f"/v1/memories/{ref}"), 409, "pinned")
    only = client.patch(f"/v1/memories/{ref}", json={"pinned": False}).json()
    assert (only["name"], only["tags"], only["pinned"]) == ("other", ["b", "c"], False)
    assert client.patch(f"/v1/memories/{ref}", json={"name": None}).json()["name"] is None
    assert client.patch(f"/v1/memories/{ref}", json={}).json()["tags"] == ["b", "c"]
    refused(client.patch("/v1/memories/none", json={"name": "x"}), 404, "no such memory")
    refused(client.patch(f"/v1/memories/{ref}", json={"name": "x", "tags": ["a,b"]}), 422, "a tag")
    assert client.get(f"/v1/memories/{ref}").json()["memory"]["name"] is None
    taken = client.post("/v1/memories", json={"text": "b1:c2", "checkpoint": served, "name": "taken"})
    assert taken.status_code == 201
    refused(client.patch(f"/v1/memories/{ref}", json={"name": "taken"}), 409, "taken")


def test_a_change_that_is_ended_in_the_middle_has_not_happened(client: TestClient, served: str) -> None:
    written(client, served, name="notes", tags=["a"])
    before, left = client.get("/v1/memories").json(), 0

    def end(_: object, cursor: object, statement: str, *rest: object) -> None:
        nonlocal left
        if statement.startswith(("UPDATE", "INSERT", "DELETE")):
            left -= 1
            if left < 0:
                raise RuntimeError

    event.listen(client.app.state.store._session.engine, "before_cursor_execute", end)
    wanted, changes = {"name": "other", "tags": ["b"], "pinned": True}, 0
    while client.patch("/v1/memories/notes", json=wanted).status_code == 500 and changes < 20:
        assert client.get("/v1/memories").json() == before
        left = changes = changes + 1
    (entry,) = client.get("/v1/memories").json()["memories"]
    assert (entry["name"], entry["tags"], entry["pinned"]) == ("other", ["b"], True)


def test_files_go_out_and_in(client: TestClient, served: str) -> None:
    entry = written(client, served)
    data = client.get(f"/v1/memories/{entry['id']}/file").content
    assert len(Memory.from_bytes(data)) == 1
    client.delete(f"/v1/memories/{entry['id']}")
    kept = client.post("/v1/memories/files?name=back&tags=a,b", content=data)
    assert (kept.status_code, kept.json()["tags"]) == (201, ["a", "b"])
    assert client.post("/v1/memories/back/ask", json={"queries": ["a7"]}).status_code == 200
    foreign = client.post("/v1/memories/files", content=made(1).to_bytes()).json()
    refused(client.post(f"/v1/memories/{foreign['id']}/ask", json={"queries": ["a7"]}), 409, "not served")


def test_text_files_are_written(client: TestClient, served: str) -> None:
    """As the same text in JSON is, so that it is written once."""
    about = {"checkpoint": served, "name": "notes", "tags": "a,b", "steps": "2"}
    kept = client.post("/v1/memories/texts", params=about, content=b"\xef\xbb\xbf" + TEXT.encode())
    assert (kept.status_code, kept.json()["tags"]) == (201, ["a", "b"])
    assert written(client, served, name="notes", steps=2)["id"] == kept.json()["id"]
    streamed = client.post("/v1/memories/texts", params={**about, "stream": True, "steps": 3}, content=TEXT).text
    assert streamed.count("event: step") == 0  # a name that is taken is told before
    streamed = client.post(
        "/v1/memories/texts", params={"checkpoint": served, "stream": True, "steps": 3}, content=TEXT
    )
    assert streamed.text.count("event: step") == 4
    refused(client.post("/v1/memories/texts", params=about, content=b"a7:\xff"), 422, "not UTF-8: byte 3")
    refused(client.post("/v1/memories/texts", content=TEXT), 422, "checkpoint")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/memories", {"text": "", "checkpoint": "HERE"}, 422, "empty"),
        ("/v1/memories", {"text": "a7:\ud800", "checkpoint": "HERE"}, 422, "text: "),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "gpt2"}, 422, "unknown checkpoint"),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "HERE", "steps": -1}, 422, "steps: "),
        ("/v1/memories", {"text": "a7:Qz", "checkpoint": "HERE", "name": "x" * 201}, 422, "name"),
        ("/v1/memories/none/ask", {"queries": ["a7"]}, 404, "no such memory"),
        ("/v1/memories/none/ask", {"queries": []}, 422, "queries: "),
        ("/v1/nowhere", {}, 404, "Not Found"),
        ("/v1/memories/files", {"no": "memory"}, 422, "damaged or no memory file"),
    ],
)
def test_bad_requests_are_told_why(
    client: TestClient, served: str, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    body = {key: served if value == "HERE" else value for key, value in body.items()}
    sent = json.dumps(body).encode()
    refused(client.post(path, content=sent, headers={"Content-Type": "application/json"}), status, words)


def test_a_name_that_is_taken_and_a_pin_are_conflicts(client: TestClient, served: str) -> None:
    entry = written(client, served, name="notes")
    other = {"text": "b1:c2", "checkpoint": served, "name": "notes"}
    refused(client.post("/v1/memories", json=other), 409, "taken")
    client.app.state.store.pin(entry["id"])
    refused(client.delete("/v1/memories/notes"), 409, "pinned")


def test_a_scale_that_would_spread_is_refused(client: TestClient) -> None:
    from safetensors.torch import save

    from gradmem.memory import FORMAT, digest

    tensors = {"memory": torch.ones(1, 30_000, 1, dtype=torch.int8), f"memory{SCALE}": torch.ones(1, 1, 30_000)}
    header = {"format": FORMAT, "version": "1", "sha256": digest(tensors), "records": "[]"}
    refused(client.post("/v1/memories/files", content=save(tensors, header)), 422, "does not fit")


def test_a_long_text_before_is_not_searched(
    tiny: MemoryModel, tmp_path: Path, keys: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything written before it is refused."""
    chunked = MemoryModel.from_spec(tiny.spec["task"], tiny.spec["backbone"], {**tiny.spec["method"], "chunk_size": 8})
    memory = chunked.write(TEXT)
    monkeypatch.setattr(chunked.method, "extend", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(Exception, match="`before` is not the text"):
        chunked.append(memory, "b1:c2", before="x" * MANY)


def test_no_long_text_reaches_a_tokenizer(
    client: TestClient, served: str, monkeypatch: pytest.MonkeyPatch, tiny: MemoryModel
) -> None:
    written(client, served, name="notes")
    encode = Task.encode

    def short(task: Task, text: str) -> list[int]:
        assert len(text) < 10**5
        return encode(task, text)

    monkeypatch.setattr(Task, "encode", short)
    long = "a7:Qz\n" * 10**5
    for path, body in (
        ("/v1/memories", {"text": long, "checkpoint": served}),
        ("/v1/memories", {"text": "x" * 10**6, "checkpoint": served, "stream": True}),
        ("/v1/memories/notes/ask", {"queries": ["x" * 60_000]}),
        ("/v1/chat/completions", {"model": f"{served}:notes", "messages": [{"role": "user", "content": long}]}),
    ):
        refused(client.post(path, json=body), 400 if "chat" in path else 422, "characters; the limit of")
    refused(client.post("/v1/memories/texts", params={"checkpoint": served}, content=long), 422, "characters")
