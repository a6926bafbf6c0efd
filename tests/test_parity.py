"""Agreement with the published implementation on the fixtures of METHOD.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.methods import GradMem

DIRECTORY = Path(os.environ.get("GRADMEM_PARITY_DIR") or Path(__file__).parents[2] / "shared" / "parity")
FIXTURES = sorted(DIRECTORY.glob("*.safetensors")) if DIRECTORY.is_dir() else []
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RENAMED = {
    "initial_memory": "mem",
    "proj.": "mem_proj.",
    "control.write_start": "write_st",
    "control.write_end": "write_end",
    "control.read_start": "read_st",
    "control.read_end": "read_end",
    "backbone.model.": "model.",
}


def theirs(name: str) -> str:
    """Our parameter name -> the fixture's."""
    for ours, published in RENAMED.items():
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def difference(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the wanted tensor's norm."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def gradmem(options: dict, backbone: Backbone) -> GradMem:
    """Build our method from the published option names; an unknown one fails loudly."""
    mode = options.pop("mem_proj_mode", "proj")
    built = GradMem(
        backbone,
        n_mem=options.pop("n_mem_tokens"),
        write_steps=options.pop("K"),
        inner_lr=options.pop("lr"),
        order=options.pop("grad_mode"),
        last_k=options.pop("last_K_second_order", None),
        n_ctrl=options.pop("n_ctrl_tokens", 0),
        clip_value=options.pop("inner_clip_value", None) or None,
        clip_norm=options.pop("inner_clip_norm", None) or None,
        projection=mode if options.pop("use_mem_proj", False) else "none",
        write_head="copy" if options.pop("use_write_head", False) else "none",
    )
    options.pop("add_inner_loss_to_outer", None)
    options.pop("inner_loss_weight", None)
    assert not options, f"options that no one maps: {options}"
    return built


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    metadata, tensors = load(path)
    method = metadata["method"]
    if method != "gradmem":
        pytest.skip(f"{method} is not built yet")
    options = json.loads(metadata["options"])
    weight = options.get("inner_loss_weight", 1.0) if options.get("add_inner_loss_to_outer") else 0.0

    config = AutoConfig.for_model(metadata["base"], **json.loads(metadata["base_config"]), **PADS)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    ours = gradmem(options, Backbone(model)).double()
    state = ours.state_dict(keep_vars=True)
    published = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}
    used = set()
    with torch.no_grad():
        for name, parameter in state.items():
            source = theirs(name)
            if source not in published and model.config.tie_word_embeddings and "lm_head" in name:
                continue
            parameter.copy_(published[source])
            used.add(source)
    assert used == set(published)

    ids = tensors["input.context_ids"]
    context = Tokens(ids, ids != 0)
    written = ours.write(context)
    query_ids, labels = tensors["input.query_ids"], tensors["input.labels"]
    queries = Tokens(query_ids, query_ids != 0)
    logits = ours.read(written.memory, queries)
    target_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss = target_loss + weight * written.losses[-1].mean() if weight else target_loss
    loss.backward()

    outputs = {
        "loss": loss,
        "target_loss": target_loss,
        "inner_loss": written.losses[-1].mean(),
        "logits": logits,
        "memory": written.memory.tensors["memory"],
    }
    for name, value in outputs.items():
        if f"output.{name}" in tensors:
            assert difference(value.detach(), tensors[f"output.{name}"]) < OUTPUT_TOLERANCE, name
    for name, parameter in ours.named_parameters():
        wanted = tensors.get(f"grad.{theirs(name)}")
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} should have no gradient"
        else:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert difference(parameter.grad, wanted) < GRADIENT_TOLERANCE, name


def test_parity_directory() -> None:
    """The fixtures are there, or the reason they are not is said."""
    if not DIRECTORY.is_dir():
        pytest.skip(f"no parity fixtures at {DIRECTORY}")
    assert any("gradmem" in path.stem for path in FIXTURES)
