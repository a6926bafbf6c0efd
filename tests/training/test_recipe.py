"""Recipes: the packaged ones build, and what a recipe leaves out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradmem import GradmemError
from gradmem.model import MemoryModel
from gradmem.model.build import build_task
from gradmem.training import Stage
from gradmem.training.recipe import load_recipe, recipe_names
from recipes import BACKBONE, METHOD, TASK, recipe


def test_stages_take_the_write_steps_of_the_method() -> None:
    stages = [Stage(max_steps=1), Stage(max_steps=1, write_steps=[1, 2])]
    own = recipe(method=METHOD | {"write_steps": 3}, stages=stages)
    assert [stage.write_steps for stage in own.stages] == [[3], [1, 2]]
    assert not stages[0].write_steps, "what is given stays as it was"


@pytest.mark.parametrize("name", ["gradmem", "rmt", "mean_pool"])
def test_stages_take_what_the_method_takes_without_options(name: str) -> None:
    built = MemoryModel.from_spec(TASK, BACKBONE, {"name": name})
    own = recipe(method={"name": name}, stages=[Stage(max_steps=1)])
    assert own.stages[0].write_steps == [built.method.write_steps]


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_build(name: str, stand_ins: dict[str, str]) -> None:
    built = load_recipe(name)
    backbone, task = dict(built.backbone), dict(built.task)
    for part, option in ((backbone, "pretrained"), (task, "tokenizer")):
        if option in part:
            part[option] = stand_ins[part[option]]
    model = MemoryModel.from_spec(task, backbone, built.method)  # once, as the trainer does
    for options in (options for stage in built.stages for options in stage.tasks):
        of_stage = build_task({**task, **options})
        assert of_stage.tokenizer.get_vocab() == model.task.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each pretrained model in a packaged recipe: a directory with a small random one of its type."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {
        "openai-community/gpt2": GPT2LMHeadModel(GPT2Config(**sizes)),
        "smollm2-135m": LlamaForCausalLM(
            LlamaConfig(**sizes | {"num_hidden_layers": 13}, intermediate_size=16)  # english-pooled enters at layer 12
        ),
    }
    places = {name: str(tmp_path_factory.mktemp("stand-in")) for name in small}
    for name, place in places.items():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(place)
        small[name].save_pretrained(place)
    return places


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: kv-32\nseed: 7\ntask: {name: kv, pairs: 3}\n")
    whole, changed = load_recipe("kv-32"), load_recipe(str(mine))
    assert changed == dataclasses.replace(whole, seed=7, task={"name": "kv", "pairs": 3})
    mine.write_text("extends: kv-32\ntask: {pairs: 3}\nmethod: {name: rmt}\nbackbone: {num_hidden_layers: 2}\n")
    changed = load_recipe(str(mine))  # options of the same task and backbone, and another method
    assert changed.task == whole.task | {"pairs": 3}
    assert changed.backbone == whole.backbone | {"num_hidden_layers": 2}
    assert changed.method == {"name": "rmt"}
    other = tmp_path / "other.yaml"
    other.write_text("extends: mine.yaml\nseed: 8\n")  # beside it, wherever we are
    assert load_recipe(str(other)) == dataclasses.replace(changed, seed=8)
    mine.write_text("extends: other.yaml\n")
    with pytest.raises(GradmemError, match="extends itself"):
        load_recipe(str(mine))
    mine.write_text("extends: kv-33\n")
    with pytest.raises(GradmemError, match="kv-32"):
        load_recipe(str(mine))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("patience: 3", "a recipe has no field patience; fields of a recipe: adamw_lr, "),
        ("stages: [{max_steps: 3, lr: 0.5}]", "a stage has no field lr; fields of a stage: batch_size, .* lr_scale, "),
        ("stages: [3]", "a stage must be a mapping of fields"),
        ("- 3", "a recipe must be a mapping of fields"),
    ],
)
def test_unknown_fields_are_refused_with_the_known_ones(text: str, told: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(GradmemError, match=f"mine.yaml is not a recipe: {told}"):
        load_recipe(str(mine))
