"""Agreement with published implementations: fixtures of their inputs, weights, outputs and gradients.

`GRADMEM_PARITY_DIR` names the directories of the fixtures, separated by colons.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gradmem.backbone import Backbone
from gradmem.batch import Tokens
from gradmem.methods import ARMT, RMT, GradMem, Method
from helpers import SHARED

DIRECTORIES = list(map(Path, (os.environ.get("GRADMEM_PARITY_DIR") or str(SHARED / "parity")).split(":")))
FIXTURES = [path for directory in DIRECTORIES for path in sorted(directory.glob("*.safetensors"))]
DEVICE = os.environ.get("GRADMEM_TEST_DEVICE") or "cpu"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PREFIX_NAMES = {
    r"^initial_memory": "mem",
    r"^control\.(write|read)_start": r"\1_st",
    r"^control\.(write|read)_end": r"\1_end",
    r"^proj\.": "mem_proj.",
    r"^read_proj\.": "read_mem_proj.",
    r"^norm\.": "mem_residual_ln.",
    r"^backbone\.model\.(.*?)(?:\.base_layer)?((?:\.lora_[AB])?)(?:\.write)?(\.\w+)$": r"model.\1\2\3",
}
ARMT_NAMES = {
    r"^memory_tokens": "memory",
    r"^associative\.(\d+)\.query\.": r"model.model.layers.\1.W_mq.",
    r"^associative\.(\d+)\.key\.": r"model.model.layers.\1.W_mk.",
    r"^associative\.(\d+)\.value\.": r"model.model.layers.\1.W_mv.",
    r"^associative\.(\d+)\.strength\.": r"model.model.layers.\1.W_mb.",
    r"^backbone\.model\.(model\.layers\.\d+)\.": r"model.\1.layer.",
    r"^backbone\.model\.": "model.",
}


@dataclass
class Case:
    """A method built from a fixture's options.

    Attributes
    ----------
    names : dict of str
        Patterns that turn our parameter names into the fixture's.
    memory_outputs : callable
        (context, queries) -> the fixture's names of what was written, and ours.
    write_weight : float
        Weight of the write loss in the outer loss.
    masks_pads : bool
        The published READ masks pads as keys: logits at pads differ from ours, and nothing depends on them.
    write_loss : bool
        The write loss is published as we define it; of chunks it is that of the last one alone.
    """

    method: Method
    names: dict[str, str]
    memory_outputs: Callable[[Tokens, Tokens], dict[str, Tensor]]
    write_weight: float = 0.0
    masks_pads: bool = True
    write_loss: bool = True

    def theirs(self, name: str) -> str:
        """Our parameter name -> the fixture's."""
        for pattern, published in self.names.items():
            if re.match(pattern, name):
                return re.sub(pattern, published, name)
        return name


def prefix_case(method: Method, weight: float, masks_pads: bool, write_loss: bool = True) -> Case:
    """Of a method whose memory is prefix vectors."""

    def memory_outputs(context: Tokens, queries: Tokens) -> dict[str, Tensor]:
        return {"memory": method.write(context).memory.tensors["memory"]}

    return Case(method, PREFIX_NAMES, memory_outputs, weight, masks_pads, write_loss)


def common(options: dict[str, Any]) -> dict[str, Any]:
    """Our options, of those that the published methods with prefix vectors share."""
    mode = options.pop("mem_proj_mode", "proj")
    return {
        "n_mem": options.pop("n_mem_tokens"),
        "write_steps": options.pop("K"),
        "n_ctrl": options.pop("n_ctrl_tokens", 0),
        "projection": mode if options.pop("use_mem_proj", False) else "none",
        "write_head": "copy" if options.pop("use_write_head", False) else "none",
    }


def gradmem(options: dict[str, Any], backbone: Backbone) -> Case:
    """Prefix memories; those of chunks in sequence too, and with adapters of WRITE."""
    for name, ours in (("memory_backend", "prefix"), ("write_objective", "reconstruction"), ("parallel_chunks", False)):
        if (theirs := options.pop(name, ours)) != ours:
            pytest.skip(f"there is no {name} '{theirs}' yet")
    assert not options.pop("use_mem_residual", False)
    assert not options.pop("use_reconstruction_loss", False)
    options.pop("reconstruction_loss_weight", None)
    added, weight = options.pop("add_inner_loss_to_outer", False), options.pop("inner_loss_weight", 1.0)
    method = GradMem(
        backbone,
        **common(options),
        inner_lr=options.pop("lr"),
        order=options.pop("grad_mode"),
        last_k=options.pop("last_K_second_order", None),
        clip_value=options.pop("inner_clip_value", None) or None,
        clip_norm=options.pop("inner_clip_norm", None) or None,
        chunk_size=options.pop("chunk_size", None),
        write_lora=(rank := options.pop("write_lora_r", 0)) if options.pop("use_write_lora", False) else 0,
    )
    for layer in method.adapters:
        layer.scaling["write"] = options["write_lora_alpha"] / rank
    options.pop("write_lora_alpha", None)
    return prefix_case(method, weight if added else 0.0, masks_pads=False, write_loss=method.chunk_size is None)


def rmt(options: dict[str, Any], backbone: Backbone) -> Case:
    assert not options.pop("add_inner_loss_to_outer", False)
    for name in ("lr", "grad_mode", "last_K_second_order", "inner_clip_value", "inner_clip_norm", "inner_loss_weight"):
        options.pop(name, None)  # of an inner loop, which RMT has not
    reconstruction = bool(options.pop("use_reconstruction_loss", False))
    weight = options.pop("reconstruction_loss_weight", 1.0)
    residual = bool(options.pop("use_mem_residual", False))
    method = RMT(backbone, **common(options), residual=residual, reconstruction=reconstruction)
    return prefix_case(method, weight if reconstruction else 0.0, masks_pads=True)


def armt(options: dict[str, Any], backbone: Backbone) -> Case:
    """As published, pads leak into memory tokens."""
    assert options.pop("n_heads", 1) == 1
    assert options.pop("use_denom", True)
    assert options.pop("segment_alignment", "left") == "left"
    assert options.pop("attention_mask", "ids!=0") == "ids!=0"
    options.pop("context_padded", None)
    segments = options.pop("n_segments", None)
    method = ARMT(
        backbone,
        n_mem=options.pop("num_mem_tokens"),
        d_mem=options.pop("d_mem"),
        nu=options.pop("nu", 3),
        correction=options.pop("correction"),
        segment_length=options.pop("segment_size"),
        leak_pads=True,
    )

    def memory_outputs(context: Tokens, queries: Tokens) -> dict[str, Tensor]:
        """State after every segment of the context, and after the query, whose write no READ needs."""
        states, hidden, state = {}, [], None
        for index, segment in enumerate(method.segments(context), 1):
            rows, state = method.write_segment(segment, state)
            hidden.append(rows)
            states["memory" if index == 1 else f"memory_seg{index}"] = state
        assert segments in (None, len(hidden) + 1)
        states["memory_final"] = method.write_segment(queries, state)[1]
        found = {"context_logits": method.backbone.head(torch.cat(hidden, 1))}
        for name, state in states.items():
            for layer, (a, z) in enumerate(state):
                found |= {f"{name}.layers.{layer}.W": a[:, None], f"{name}.layers.{layer}.z": z[:, None]}
        return found

    return Case(method, ARMT_NAMES, memory_outputs)


BUILDERS = {"gradmem": gradmem, "rmt": rmt, "armt": armt}


def difference(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the wanted tensor's norm."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).to(DEVICE) for name in file.keys()}  # noqa: SIM118


def build(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Case:
    """Build the method with the fixture's options and weights; an option or weight that no one maps fails loudly."""
    config = AutoConfig.for_model(metadata["base"], **json.loads(metadata["base_config"]), **PADS)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    options = json.loads(metadata["options"])
    case = BUILDERS[metadata["method"]](options, Backbone(model))
    assert not options, f"options that no one maps: {options}"
    case.method.to(DEVICE).double()
    published = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param.")}
    used = set()
    with torch.no_grad():
        for name, parameter in case.method.state_dict(keep_vars=True).items():
            source = case.theirs(name)
            if source not in published and model.config.tie_word_embeddings and "lm_head" in name:
                continue
            parameter.copy_(published[source])
            used.add(source)
    assert used == set(published)
    return case


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parity(path: Path) -> None:
    metadata, tensors = load(path)
    if metadata["method"] not in BUILDERS:
        pytest.skip(f"there is no method '{metadata['method']}' yet")
    case = build(metadata, tensors)
    method = case.method
    context, queries = (Tokens(ids, ids != 0) for ids in (tensors["input.context_ids"], tensors["input.query_ids"]))
    labels = tensors["input.labels"]
    written = method.write(context)
    logits = method.read(written.memory, queries)
    target_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    write_loss = method.write_loss(written, context)
    loss = target_loss + case.write_weight * write_loss if case.write_weight else target_loss
    loss.backward()

    outputs = {
        "loss": loss,
        "target_loss": target_loss,
        **({"inner_loss": write_loss, "rec_loss": write_loss} if case.write_loss else {}),
        **case.memory_outputs(context, queries),
    }
    # Row 0, which predicts the first query token, is published of GradMem only.
    wanted = tensors["output.logits"]
    counts = torch.cat([torch.ones_like(queries.mask[:, :1]), queries.mask | (not case.masks_pads)], dim=1)
    counts = counts[:, -wanted.shape[1] :, None]
    assert difference((logits[:, -wanted.shape[1] :] * counts).detach(), wanted * counts) < OUTPUT_TOLERANCE
    for name, value in outputs.items():
        if f"output.{name}" in tensors:
            assert difference(value.detach(), tensors[f"output.{name}"]) < OUTPUT_TOLERANCE, name
    memories = {name[7:] for name in tensors if name.startswith("output.memory")}
    assert memories <= set(outputs), "a memory is not compared"
    for name, parameter in method.named_parameters():
        wanted = tensors.get(f"grad.{case.theirs(name)}")
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} should have no gradient"
        else:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert difference(parameter.grad, wanted) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda directory: directory.name)
def test_parity_directory(directory: Path) -> None:
    """There are fixtures, unless the directory that is looked in by default is not there."""
    if not directory.is_dir() and "GRADMEM_PARITY_DIR" not in os.environ:
        pytest.skip(f"no parity fixtures at {directory}")
    assert any(directory.glob("*.safetensors"))
