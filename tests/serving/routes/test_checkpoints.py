"""`/v1/checkpoints`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import torch
from starlette.testclient import TestClient
from tests.serving.requesting import client_of, refused, written

from chat_models import save_model
from gradmem import load
from gradmem.serving.api_keys import ApiKeys


def test_checkpoints_say_what_they_are_for(client: TestClient, served: str) -> None:
    assert client.get("/v1/checkpoints").json() == {"checkpoints": [served], "max_body": 2**23}
    about = client.get(f"/v1/checkpoints/{quote(served, safe='')}?seed=3").json()
    model = load(served)
    assert (about["name"], about["task"], about["method"], about["write_steps"]) == (served, "kv", "gradmem", 2)
    assert (about["vectors"], about["width"], about["calibrated"]) == (8, 16, False)
    text, truth = model.task.example(3)
    shown = about["example"]
    assert (shown["text"], [(one["query"], one["answer"]) for one in shown["questions"]]) == (text, truth)
    assert truth == model.task.examples(text)
    ids = model.task.encode(model.task.context_text(text))
    assert about["token_cache_bytes"] * len(ids) == model.method.backbone.cache_bytes(torch.tensor([ids]))
    refused(client.get("/v1/checkpoints/gpt2"), 404, "no such checkpoint")
    ref = written(client, served)["id"]
    assert client.get(f"/v1/memories/{ref}").json()["memory_bytes"] == 4 * about["vectors"] * about["width"]


def test_a_language_model_offers_a_paragraph(tmp_path: Path, keys: ApiKeys) -> None:
    name = save_model(tmp_path / "lm")
    with client_of(name, keys, tmp_path) as client:
        about, other = (client.get(f"/v1/checkpoints/{quote(name, safe='')}?seed={seed}").json() for seed in (3, 4))
    assert about["task"] == "document"
    text, questions = about["example"]["text"], about["example"]["questions"]
    assert len(questions) == 3
    assert all(one["answer"] in text and one["query"].endswith("?") for one in questions)
    assert [one["answer"] for one in questions] != [one["answer"] for one in other["example"]["questions"]]
