"""Agreement with published implementations: fixtures of their inputs, weights, outputs and gradients.

`GRADMEM_PARITY_DIR` names the directories of the fixtures, separated by colons.

What the published code does in batches only, which nothing else should do, happens here: see `as_published`.
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
from gradmem.memory import LENGTHS, Memory
from gradmem.methods import ARMT, RMT, GradMem, Method
from helpers import SHARED

DEFAULT = f"{SHARED / 'parity'}:{SHARED / 'parity_backends'}"
DIRECTORIES = list(map(Path, (os.environ.get("GRADMEM_PARITY_DIR") or DEFAULT).split(":")))
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
    r"^energy\.(ln|head)\.": r"energy_\1.",
    r"^backbone\.model\.(.*?)(?:\.base_layer)?((?:\.lora_[AB])?)(?:\.write)?(\.\w+)$": r"model.\1\2\3",
}
FORMS = {"prefix": "vectors", "kv_cache": "keys_values", "lora": "lora"}
FORM_NAMES = {
    r"^form\.initial\.keys_(\d+)$": r"kv_mem_K0.\1",
    r"^form\.initial\.values_(\d+)$": r"kv_mem_V0.\1",
    r"^form\.proj\.keys_(\d+)\.": r"mem_proj_K_l.\1.",
    r"^form\.proj\.values_(\d+)\.": r"mem_proj_V_l.\1.",
    r"^form\.initial\.(layer\w+)_([AB])$": r"lora_mem_\g<2>0.\1",
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
        (what was written, context, queries) -> the fixture's names of memories, and ours.
    write_weight : float
        Weight of the write loss in the outer loss.
    masks_pads : bool
        The published READ masks pads as keys: logits at pads differ from ours, and nothing depends on them.
    write_loss : bool
        The write loss is published as we define it; of chunks it is that of the last one alone.
    unused : str
        Pattern of published parameters that have no effect.
    as_published : callable, optional
        Turns what was written from a context into what the published code reads.
    """

    method: Method
    names: dict[str, str]
    memory_outputs: Callable[[Memory, Tokens, Tokens], dict[str, Tensor]]
    write_weight: float = 0.0
    masks_pads: bool = True
    write_loss: bool = True
    unused: str = "(?!)"
    as_published: Callable[[Memory], Memory] | None = None

    def theirs(self, name: str) -> str:
        """Our parameter name -> the fixture's."""
        for pattern, published in self.names.items():
            if re.match(pattern, name):
                return re.sub(pattern, published, name)
        return name


def prefix_case(method: Method, **about: Any) -> Case:
    """Of a method whose memory is prefix vectors."""

    def memory_outputs(memory: Memory, context: Tokens, queries: Tokens) -> dict[str, Tensor]:
        vectors = memory.tensors["memory"]
        return {"memory": vectors.flatten(1, 2) if LENGTHS in memory.tensors else vectors}

    return Case(method, PREFIX_NAMES, memory_outputs, **about)


def form_case(method: Method, **about: Any) -> Case:
    """Of a method whose memory is keys and values or low-rank matrices."""

    def memory_outputs(memory: Memory, context: Tokens, queries: Tokens) -> dict[str, Tensor]:
        found = {}
        for name, tensor in memory.tensors.items():
            if name == LENGTHS:
                continue
            kind = re.fullmatch(r"(keys|values)_(\d+)|(layer\w+)_([AB])", name)
            if LENGTHS in memory.tensors:  # one after the other: slots, or ranks
                tensor = tensor.flatten(1, 2) if kind[4] == "B" else tensor.transpose(1, 2).flatten(2, 3)
            slots = f"layers.{kind[2]}.{(kind[1] or '').removesuffix('s')}"
            found[f"memory.{kind[3]}.{kind[4]}" if kind[3] else f"memory.{slots}"] = tensor
        return found

    return Case(method, PREFIX_NAMES | FORM_NAMES, memory_outputs, unused=r"(write|read)_(st|end)$|mem$", **about)


def common(options: dict[str, Any]) -> dict[str, Any]:
    """Our options, of those that the published methods with prefix vectors share."""
    mode = options.pop("mem_proj_mode", "proj")
    return {
        "n_mem": options.pop("n_mem_tokens", 8),
        "write_steps": options.pop("K"),
        "n_ctrl": options.pop("n_ctrl_tokens", 0),
        "projection": mode if options.pop("use_mem_proj", False) else "none",
        "write_head": "copy" if options.pop("use_write_head", False) else "none",
    }


def form_options(form: str, options: dict[str, Any]) -> dict[str, Any]:
    """Our options that only a form of the memory has."""
    theirs = {name: options.pop(name) for name in [*options] if name.startswith("lora_mem_")}
    assert options.pop("kv_mem_layers", None) in (None, "all")
    assert not theirs.pop("lora_mem_dropout", 0.0)
    if form == "vectors":
        return {}
    if form == "keys_values":
        return {"memory": form, "begin": False}
    listed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in theirs.items()}
    listed = {name: None if value in ("", "auto", "none") else value for name, value in listed.items()}
    ours = {
        "memory": form,
        "begin": False,
        "lora_rank": listed.pop("lora_mem_r", 8),
        "lora_alpha": float(listed.pop("lora_mem_alpha", 16)),
        "lora_placement": listed.pop("lora_mem_placement", "between_layers"),
        "lora_layers": listed.pop("lora_mem_layers", None) or "all",
        "lora_targets": listed.pop("lora_mem_target_modules", None),
    }
    assert not listed, f"options that no one maps: {listed}"
    return ours


def gradmem(options: dict[str, Any], backbone: Backbone) -> Case:
    """Memories of every form, of chunks too, and with adapters of WRITE."""
    form = FORMS[options.pop("memory_backend", "prefix")]
    assert not options.pop("use_mem_residual", False)
    assert not options.pop("use_reconstruction_loss", False)
    options.pop("reconstruction_loss_weight", None)
    added, weight = options.pop("add_inner_loss_to_outer", False), options.pop("inner_loss_weight", None) or 1.0
    rank, alpha = options.pop("write_lora_r", 8), options.pop("write_lora_alpha", 16)
    adam, size = options.pop("use_adam", False), options.pop("chunk_size", None)
    parallel, concat = options.pop("parallel_chunks", False), options.pop("concat_chunk_memory", False)
    assert not (parallel and concat)
    shared = common(options) | form_options(form, options)
    for name in {"vectors": [], "keys_values": ["n_ctrl"], "lora": ["n_ctrl", "n_mem"]}[form]:
        shared.pop(name)
    method = GradMem(
        backbone,
        **shared,
        inner_lr=options.pop("lr"),
        inner_optimizer="published_adam" if adam else "sgd",
        order=options.pop("grad_mode"),
        last_k=options.pop("last_K_second_order", None),
        clip_value=options.pop("inner_clip_value", None) or None,
        clip_norm=options.pop("inner_clip_norm", None) or None,
        chunk_size=size,
        chunk_mode="parallel" if parallel else "growing" if concat else "sequential",
        write_objective=options.pop("write_objective", "reconstruction"),
        write_lora=rank if options.pop("use_write_lora", False) else 0,
        freeze_backbone=options.pop("freeze_backbone", False),
    )
    for layer in method.adapters:
        layer.scaling["write"] = alpha / rank
    about = {"write_weight": weight if added and size is None else 0.0, "write_loss": size is None}
    about |= {"masks_pads": False, "as_published": copies_for_pads if concat else None}
    return prefix_case(method, **about) if form == "vectors" else form_case(method, **about)


def copies_for_pads(memory: Memory) -> Memory:
    """Repeat the last memory of contexts that have fewer chunks than others: as published, pads are chunks too."""
    counts = memory.tensors[LENGTHS]
    most = torch.arange(int(counts.max()))
    index = torch.minimum(most, counts[:, None] - 1)
    rows = torch.arange(len(counts))[:, None]
    own = {name: tensor[rows, index] for name, tensor in memory.tensors.items() if name != LENGTHS}
    return Memory({**own, LENGTHS: torch.full_like(counts, len(most))})


def rmt(options: dict[str, Any], backbone: Backbone) -> Case:
    assert not options.pop("add_inner_loss_to_outer", False)
    for name in ("lr", "grad_mode", "last_K_second_order", "inner_clip_value", "inner_clip_norm", "inner_loss_weight"):
        options.pop(name, None)  # of an inner loop, which RMT has not
    reconstruction = bool(options.pop("use_reconstruction_loss", False))
    weight = options.pop("reconstruction_loss_weight", 1.0)
    residual = bool(options.pop("use_mem_residual", False))
    method = RMT(backbone, **common(options), residual=residual, reconstruction=reconstruction)
    return prefix_case(method, write_weight=weight if reconstruction else 0.0)


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

    def memory_outputs(memory: Memory, context: Tokens, queries: Tokens) -> dict[str, Tensor]:
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
    assert used == {name for name in published if not re.match(case.unused, name)}
    return case


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parity(path: Path) -> None:
    metadata, tensors = load(path)
    if metadata["method"] == "gradlora":
        pytest.skip("GradLoRA is not built")
    case = build(metadata, tensors)
    method = case.method
    context, queries = (Tokens(ids, ids != 0) for ids in (tensors["input.context_ids"], tensors["input.query_ids"]))
    if (size := method.chunk_size) and context.ids.shape[1] % size == 1:  # as published: a last chunk of one is dropped
        context = Tokens(context.ids[:, :-1], context.mask[:, :-1])
    labels = tensors["input.labels"]
    written = method.write(context)
    memory = case.as_published(written.memory) if case.as_published else written.memory
    logits = method.read(memory, queries)
    # Where nothing predicts the first token, a first label is dropped, as published.
    first = 0 if getattr(method, "predicts_first", True) else 1
    target_loss = F.cross_entropy(logits[:, first:-1].flatten(0, 1), labels[:, first:].flatten(), ignore_index=-100)
    write_loss = method.write_loss(written, context)
    loss = target_loss + case.write_weight * write_loss if case.write_weight else target_loss
    loss.backward()

    outputs = {
        "loss": loss,
        "target_loss": target_loss,
        **({"inner_loss": write_loss, "rec_loss": write_loss} if case.write_loss else {}),
        **case.memory_outputs(memory, context, queries),
    }
    # Row 0, which predicts the first query token, is published of GradMem's vectors only.
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
