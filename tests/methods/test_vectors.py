"""Vectors in the place of a text: against plain passes of the model, and what they start from and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import gradmem
from chat_models import save_model
from gradmem import MemoryModel
from gradmem.compaction import study
from gradmem.compaction.questions import HELD_OUT, STOCK
from gradmem.exports.prompt_embeds import has_vectors, memory_embeds
from gradmem.methods import vectors as module

TEXT = "Ann signed the long lease in May. The code of the old blue door is 4711. Bob came by train at noon today."


@pytest.fixture
def model(tmp_path: Path) -> MemoryModel:
    return load(tmp_path)


def load(folder: Path, **options: Any) -> MemoryModel:
    return gradmem.load(save_model(folder / "lm"), {"name": "vectors", "n_mem": 6, "write_steps": 12, **options})


class Plain:
    """The language model itself, with embeddings or tokens in the place of the text."""

    def __init__(self, model: MemoryModel) -> None:
        self.task = model.task
        self.model = AutoModelForCausalLM.from_pretrained(model.name)
        self.embed = self.model.get_input_embeddings()

    @torch.no_grad()
    def logprobs(self, place: Tensor, query: list[int], answer: list[int]) -> Tensor:
        before, after = (self.embed(torch.tensor([ids])) for ids in (self.task.before_context, [*query, *answer]))
        logits = self.model(inputs_embeds=torch.cat([before, place, after], 1)).logits
        return logits[0, -len(answer) - 1 : -1].log_softmax(-1)

    def text(self) -> Tensor:
        return self.embed(torch.tensor([self.task.encode(TEXT)])).detach()

    def divergence(self, place: Tensor) -> float:
        """Mean KL divergence to the model with the text, along its own answers to the questions that fit any text."""
        found = []
        for query in map(self.task.encode_query, STOCK):
            answer: list[int] = []
            for _ in range(8):
                answer.append(int(self.logprobs(self.text(), query, [*answer, 0])[-1].argmax()))
            wanted, own = (self.logprobs(one, query, answer) for one in (self.text(), place))
            found.append((wanted.exp() * (wanted - own)).sum(-1))
        return float(torch.cat(found).mean())


def test_they_stand_in_the_place_of_the_text(model: MemoryModel) -> None:
    memory, plain = model.write(TEXT, 1), Plain(model)
    query, answer = model.task.encode_query("What is the code?"), [40, 41, 42]
    hidden = model.method.read_hidden(memory.prefix, gradmem.Tokens.from_lists([[*query, *answer]]))
    found = model.method.backbone.head(hidden[0, len(query) : -1]).log_softmax(-1)
    wanted = plain.logprobs(memory.tensors["memory"], query, answer)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_other_programs_get_the_same_embeddings(model: MemoryModel) -> None:
    memory, plain = model.write(TEXT, 1), Plain(model)
    before = plain.embed(torch.tensor(model.task.before_context))
    assert has_vectors(memory.model.method)
    assert torch.equal(memory_embeds(memory), torch.cat([before, memory.tensors["memory"][0]]))


def test_steps_bring_answers_nearer(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ids = Plain(model), model.task.encode(TEXT)
    memory = model.write(TEXT)
    with monkeypatch.context() as still:
        still.setattr(module, "RATE", 0.0)
        start = model.write(TEXT).tensors["memory"]
    spaced = [ids[round(i * (len(ids) - 1) / 5)] for i in range(6)]
    assert torch.equal(start[0], plain.embed(torch.tensor(spaced)))
    assert plain.divergence(memory.tensors["memory"]) < 0.8 * plain.divergence(start)
    fidelity = memory.receipts[0].fidelity
    assert fidelity is not None
    assert fidelity["questions"] == len(HELD_OUT)
    assert fidelity["kl"] != fidelity["kl_start"]


def test_questions_that_are_not_studied_decide(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the start and the states after ten steps and twenty, those with the least divergence are kept."""
    kept: dict[int, Tensor] = {}
    for best in range(3):
        told = iter([0.5 if place == best else 1.0 for place in range(3)])
        monkeypatch.setattr(study, "fidelity", lambda *given, told=told: (next(told), 0.0))
        kept[best] = model.write(TEXT, 20).tensors["memory"]
    assert torch.equal(kept[0][0, 0], Plain(model).embed(torch.tensor(model.task.encode(TEXT)[0])))
    assert not any(torch.equal(kept[one], kept[other]) for one, other in ((0, 1), (1, 2), (0, 2)))


def test_the_users_questions_are_studied_and_every_fourth_measures(tmp_path: Path) -> None:
    model = load(tmp_path, write_steps=1)
    asked = ["Who signed?", "What is the code?", "Who came by train?", "When did Bob come?"]
    memory = model.write(TEXT, questions=asked)
    assert memory.receipts[0].fidelity["questions"] == len(HELD_OUT) + 1
    with pytest.raises(gradmem.GradmemError, match="give a number of `steps`"):
        model.write(TEXT, until=0.1)
