"""Whatever is sent, the server answers as its OpenAPI document says: no 500, no traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from safetensors.torch import save
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from gradmem import GradmemError, Memory, MemoryModel
from gradmem.memory import FORMAT, SCALE, digest
from gradmem.serving.api_keys import ApiKeys
from gradmem.serving.app import create_app
from gradmem.serving.settings import Settings
from gradmem.store import Store
from stored import made

EXAMPLES = 40
LOCAL = {"Host": "127.0.0.1"}
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
QUIET = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def client(tiny: MemoryModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server that has a memory, named `notes`, of a checkpoint `tiny`."""
    folder = tmp_path_factory.mktemp("fuzz")
    tiny.save_pretrained(folder / "tiny")
    named = str(folder / "tiny")
    app = create_app(Store(folder / "store.db"), Settings(checkpoints=(named,), rate=10**6), ApiKeys(folder / "keys"))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True) as client:
        wanted = {"text": "a7:Qz", "checkpoint": named, "name": "notes"}
        assert client.post("/v1/memories", json=wanted).status_code == 201
        yield client


PATHS = (
    "/v1/memories",
    "/v1/memories/notes/ask",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/memories/files",
    "/v1/memories/texts",
)
TEXTS = st.text().map(lambda text: json.dumps({"text": text, "checkpoint": "x"}).encode())


def test_every_path_answers_as_documented(client: TestClient) -> None:
    """Requests that the OpenAPI document allows, and such that it forbids."""
    api = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=LOCAL)
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) > 9
    for operation in operations:
        for mode in GenerationMode:

            @QUIET
            @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
            def answers(case: Any, known: bool) -> None:
                if known and "ref" in (case.path_parameters or {}):
                    case.path_parameters["ref"] = "notes"
                case.call_and_validate(headers=LOCAL, checks=CHECKS)

            # Nothing that could be sent is forbidden where an operation takes nothing.
            with suppress(*([Unsatisfiable] if mode is GenerationMode.NEGATIVE else [])):
                answers()


@QUIET
@given(body=st.binary(max_size=200) | TEXTS)
@pytest.mark.parametrize("path", PATHS)
def test_any_bytes_are_refused(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert list(answer.json()) == ["error"]


MEMORY = "/v1/memories/notes"
PLACES = ("/", "/main.js", "/docs", "/nowhere", "/healthz", "/v1/memories", MEMORY, f"{MEMORY}/file")
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
PARAMETERS = ["since", "until", "after", "limit", "tags", "name", "version"]
RANGES = st.lists(st.from_regex(r"\A(bytes|x)?=?[0-9]{0,30}-?[0-9]{0,3}\Z"), max_size=3).map(",".join)


@QUIET
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ODD"]),
    headers=st.fixed_dictionaries(
        {},
        optional={"Range": RANGES | VALUES, "If-Range": VALUES, "If-None-Match": VALUES, "If-Modified-Since": VALUES}
        | {"Content-Type": VALUES, "Authorization": VALUES, "Accept": VALUES, "Accept-Encoding": VALUES},
    ),
    query=st.dictionaries(
        st.sampled_from(["since", "until", "after", "limit", "tags", "name", "version"]), st.text(max_size=30)
    ),
)
@pytest.mark.parametrize("path", PLACES)
def test_any_headers_and_any_query_are_answered(
    client: TestClient, path: str, method: str, headers: dict[str, str], query: dict[str, str]
) -> None:
    if (method, path) == ("DELETE", MEMORY):
        return
    answer = client.request(method, path, headers=headers, params=query)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        assert list(answer.json()) == ["error"], answer.text


# Memory files


def file_of(tensors: dict[str, torch.Tensor], receipts: Any) -> bytes:
    """A memory file with any tensors and receipts, whose checksum is right."""
    told = receipts if isinstance(receipts, str) else json.dumps(receipts)
    return save(tensors, {"format": FORMAT, "version": "1", "sha256": digest(tensors), "records": told})


RECORD: dict[str, Any] = vars(made(1).receipts[0])
VECTORS = {"memory": torch.randn(1, 4, 8)}
DEEP: Any = []
for _ in range(200):
    DEEP = [{**RECORD, "earlier": DEEP}]
MALFORMED = {
    "nested": file_of(VECTORS, DEEP),
    "nested beyond any parser": file_of(VECTORS, "[" * 100_000),
    "half a character": file_of(VECTORS, [{**RECORD, "options": {"a": "\ud800"}}]),
    "unprintable": file_of(VECTORS, [{**RECORD, "model": "a\x00\x1b[2J"}]),
    "no losses": file_of(VECTORS, [{**RECORD, "losses": []}]),
    "not numbers": file_of(VECTORS, '[{"losses": [NaN]}]'),
    "other fields": file_of(VECTORS, [{**RECORD, "evil": 1}]),
    "spreading scale": file_of({"m": torch.ones(1, 9**5, 1).char(), f"m{SCALE}": torch.ones(1, 1, 9**5)}, [RECORD]),
    "no tensors": file_of({}, [RECORD]),
    "rows and records": file_of({"memory": torch.randn(2, 4, 8)}, [RECORD]),
    "header of 2**62 bytes": struct.pack("<Q", 2**62) + b"{}",
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00cposix\nsystem\n(X\x04\x00\x00\x00echoR.",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_memory_files_are_refused(client: TestClient, name: str) -> None:
    answer = client.post("/v1/memories/files", content=MALFORMED[name])
    assert answer.status_code == 422, answer.text
    with pytest.raises(GradmemError):
        Memory.from_bytes(MALFORMED[name])


def numbers(value: float) -> dict[str, torch.Tensor]:
    """Vectors of one value."""
    return {"memory": torch.full((1, 8, 16), value)}


def test_files_that_are_valid_but_mean_nothing_are_answered(client: TestClient, tiny: MemoryModel) -> None:
    """Losses and vectors that are no numbers, and shapes of another method, under the checkpoint's own fingerprint."""
    written = tiny.write("a7:Qz").receipts[0]
    name = client.app.state.engines.names[0]
    receipt = {**vars(written), "model": name}
    for number, (tensors, more) in enumerate(
        [
            (numbers(float("nan")), {}),
            (numbers(float("inf")), {}),
            (numbers(1e38), {"losses": [float("nan")], "token_losses": [float("inf")], "inner_lr": [float("nan")]}),
            ({"memory": torch.zeros(1, 10**5, 16)}, {}),
            ({"else": torch.zeros(1)}, {"context_tokens": -(10**30), "steps": 10**30}),
            ({"memory": torch.zeros(3, 8, 16)}, {}),
        ]
    ):
        receipts = [{**receipt, **more, "context_sha256": str(number)}] * len(next(iter(tensors.values())))
        kept = client.post("/v1/memories/files", content=file_of(tensors, receipts))
        assert kept.status_code in (201, 422, 503), kept.text
        if kept.status_code == 201:
            ref = kept.json()["id"]
            assert client.get(f"/v1/memories/{ref}").status_code == 200
            asked = client.post(f"/v1/memories/{ref}/ask", json={"queries": ["a7"]})
            assert asked.status_code in (200, 422), asked.text
            chat = {"model": f"{name}:{ref}", "messages": [{"role": "user", "content": "a7"}]}
            for drawn in ({}, {"temperature": 1, "logprobs": True, "top_logprobs": 2}):
                assert client.post("/v1/chat/completions", json=chat | drawn).status_code in (200, 400)
            assert client.get("/v1/memories").status_code == 200


INFINITE = [float("inf"), float("-inf"), float("nan")]
ODD_NUMBERS = st.sampled_from([10**400, -(10**400), 2**63, -(2**63) - 1, 2**31, 1e308, -0.0, 0, *INFINITE])
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | ODD_NUMBERS | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
NESTED = st.integers(1, 900).map(lambda depth: json.loads('{"a":' * depth + "1" + "}" * depth))
ANYTHING = ODD | st.lists(ODD_NUMBERS, max_size=3) | NESTED


@QUIET
@given(more=st.dictionaries(st.sampled_from(sorted(RECORD)), ANYTHING, min_size=1, max_size=3))
def test_files_with_any_records_are_kept_and_read_or_refused(
    client: TestClient, tiny: MemoryModel, more: dict[str, Any]
) -> None:
    receipt = {**vars(tiny.write("a7:Qz").receipts[0]), "model": client.app.state.engines.names[0], **more}
    told = json.dumps([receipt])
    kept = client.post("/v1/memories/files", content=file_of(VECTORS, told))
    assert kept.status_code in (201, 422), kept.text
    if kept.status_code == 201:
        ref = kept.json()["id"]
        for path in (f"/v1/memories/{ref}", f"/v1/memories/{ref}/file", "/v1/memories", "/v1/models"):
            assert client.get(path).status_code == 200
        for path, body in (
            (f"/v1/memories/{ref}/ask", {"queries": ["a7"]}),
            (f"/v1/memories/{ref}/append", {"text": "b1:c2", "before": "a7:Qz"}),
        ):
            assert client.post(path, json=body).status_code in (200, 409, 422)
        assert client.delete(f"/v1/memories/{ref}").status_code == 204


@QUIET
@given(place=st.integers(0, 4000), bit=st.integers(0, 7), cut=st.integers(0, 4000) | st.none())
def test_damaged_memory_files_are_refused(
    client: TestClient, tiny: MemoryModel, place: int, bit: int, cut: int
) -> None:
    data = bytearray(made(1).to_bytes())
    data[place % len(data)] ^= 1 << bit
    answer = client.post("/v1/memories/files", content=bytes(data[:cut]))
    assert answer.status_code in (201, 422), answer.text
