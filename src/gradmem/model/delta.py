"""A small checkpoint: the difference between trained weights and the pretrained ones, of low rank or in four bits.

SmolLM2-135M in float32 takes 538 MB, its difference 10 MB after training with LoRA of rank 16, else 60 MB in four bits.
Of low rank, a matrix is the product of two in bfloat16. In four bits, matrices are rounded in groups of 32 neighbours
of a row with a scale each. Vectors, and the weights that the method added, are stored whole; unchanged weights are left
out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import GradmemError, refused
from ..language_model import loaded_model
from ..memory import digest
from ..pretrained import PACKAGED, pretrained_place
from ..untrusted import check_counts, read_json
from .checkpoint import read_abstain
from .checkpoint_model import NAMED
from .model import MemoryModel
from .packaged import DELTA

FORMAT = 1
GROUP = 32
"""Weights that share a scale."""
MOST = 7
"""Codes go from -7 to 7."""
SHARD = 15 * 2**20
"""Most bytes of a file."""
BACKBONE = "backbone.model."
"""Prefix of the language model's weights in the state of a method."""


def save_delta(
    model: MemoryModel, pretrained: str, directory: Path, name: str | None = None, rank: int | None = None
) -> list[Path]:
    """Write the difference between a model and the pretrained one that its training started from.

    Parameters
    ----------
    model : MemoryModel
    pretrained : str
        Name or directory of the pretrained model.
    directory : Path
    name : str, optional
        The name of the pretrained model on the machine that will load it, if it differs.
    rank : int, optional
        Store each matrix by its largest singular values, so many; by default in four bits.

    Returns
    -------
    list of Path
        The files, of at most 15 MiB each.
    """
    base = base_weights(pretrained)
    pieces: dict[str, Tensor] = {}
    for key, weight in model.method.state_dict().items():
        pieces |= _pieces(key, weight.detach(), base.get(key), rank)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for key, piece in pieces.items():
        if shards[-1] and sum(tensor.nbytes for tensor in shards[-1].values()) + piece.nbytes > SHARD:
            shards.append({})
        shards[-1][key] = piece
    files = [directory / f"delta-{number}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file)
    task = {key: value for key, value in model.spec["task"].items() if key not in ("data", "tokenizer")}
    config = {"format": FORMAT, "pretrained": name or pretrained, "digest": digest(base), "files": len(files)}
    text = json.dumps({**config, "task": task, "method": model.spec["method"]}, indent=1)
    (directory / DELTA).write_text(text, encoding="utf-8")
    return [*files, directory / DELTA]


def load_delta(directory: Path, pretrained: str | None = None) -> MemoryModel:
    """Build a model from a pretrained one and the difference that `save_delta` wrote.

    Parameters
    ----------
    directory : Path
    pretrained : str, optional
        Name or directory of the pretrained model; not needed if it comes as a Python package.

    Raises
    ------
    GradmemError
        If files are missing or damaged, or the pretrained model is another one.
    """
    with refused(f"{directory} is damaged"):
        if not (directory / DELTA).is_file():
            raise GradmemError(f"{directory} is incomplete: it has no {DELTA}")
        config = read_json(directory / DELTA)
        if config["format"] != FORMAT:
            raise GradmemError(f"{directory} has format {config['format']}, this gradmem reads {FORMAT}")
        pieces: dict[str, Tensor] = {}
        for file in (directory / f"delta-{number}.safetensors" for number in range(1, config["files"] + 1)):
            if not file.is_file():
                raise GradmemError(f"{directory} is incomplete: it has no {file.name}")
            pieces |= load_file(file)
        name = pretrained or config["pretrained"]
        task, method = {**config["task"], "tokenizer": name}, config["method"]
        task.pop("data", None)
        if pretrained is None and name not in PACKAGED:
            raise GradmemError(
                f"{directory} is for '{name}', and a file does not decide what is loaded: name it if you trust it"
            )
        check_counts(method, max((size for piece in pieces.values() for size in piece.shape), default=0))
    base = base_weights(name)
    if digest(base) != config["digest"]:
        raise GradmemError(f"{directory} is the difference to another model, not to {name}")
    model = MemoryModel.from_spec(task, {"pretrained": name}, method, trusted=False)
    with torch.no_grad():
        for key, weight in model.method.state_dict().items():
            weight.copy_(_whole(key, weight, base.get(key), pieces, directory))
    NAMED.add(str(directory))
    model.name = str(directory)
    model.method.eval()
    model.abstain = read_abstain(directory, model.fingerprints["checkpoint"], model.method.backbone.width)
    return model


def base_weights(pretrained: str) -> dict[str, Tensor]:
    """Weights of a pretrained model, under the names that they have in a method."""
    weights = loaded_model(pretrained_place(pretrained), torch.float32).state_dict()
    return {BACKBONE + key: weight for key, weight in weights.items()}


def rounded(weight: Tensor, base: Tensor) -> Tensor:
    """A weight as it is after its difference was saved and loaded."""
    if weight.shape != base.shape or not _rounds(weight):
        return weight
    return base + unpacked(*packed(weight - base))


def packed(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Round to four bits.

    Parameters
    ----------
    difference : Tensor, shape (rows, columns)
        A multiple of 32 columns.

    Returns
    -------
    tuple of Tensor
        Codes, two in a byte, uint8, shape (rows, columns / 2); and scales, bfloat16, shape (rows, columns / 32).
    """
    groups = difference.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / MOST).bfloat16()
    steps = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = (groups / steps).round_().clamp_(-MOST, MOST).add_(MOST).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    """What `packed` rounded, float32, shape (rows, columns)."""
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    groups = (pairs.float() - MOST).unflatten(1, (-1, GROUP))
    return (groups * scales.float()[..., None]).flatten(1)


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank (truncated SVD), as bfloat16 factors (rows, rank) and (rank, columns)."""
    left, sizes, right = torch.svd_lowrank(difference.float(), q=min(rank + 8, *difference.shape), niter=8)
    root = sizes[:rank].sqrt()
    return (left[:, :rank] * root).bfloat16(), (root[:, None] * right[:, :rank].T).bfloat16()


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix of two factors, float32: the same on every machine, as it is rounded after exact enough sums."""
    return (left.double() @ right.double()).bfloat16().float()


def _rounds(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.shape[1] % GROUP == 0


def _pieces(key: str, weight: Tensor, base: Tensor | None, rank: int | None) -> dict[str, Tensor]:
    """What is stored of a weight."""
    if base is None:
        return {f"whole.{key}": weight.cpu().clone()}
    base = base.to(weight.device)
    if weight.shape != base.shape:  # embeddings that have grown by a token
        if not torch.equal(weight[: len(base)], base):
            raise GradmemError(f"{key} has grown and changed: train it frozen (`freeze_embeddings`)")
        return {f"rows.{key}": weight[len(base) :].cpu().clone()}
    if torch.equal(weight, base):
        return {}
    if rank is not None and weight.ndim == 2 and rank < min(weight.shape):
        left, right = factors(weight - base, rank)
        return {f"left.{key}": left.cpu(), f"right.{key}": right.cpu().contiguous()}
    if not _rounds(weight):
        return {f"whole.{key}": weight.cpu().clone()}
    codes, scales = packed(weight - base)
    return {f"codes.{key}": codes.cpu(), f"scales.{key}": scales.cpu()}


def _whole(key: str, weight: Tensor, base: Tensor | None, pieces: dict[str, Tensor], directory: Path) -> Tensor:
    """A weight from what was stored of it."""
    found: Any = pieces.get(f"whole.{key}")
    if found is None and base is not None:
        if f"rows.{key}" in pieces:
            found = torch.cat([base, pieces[f"rows.{key}"]])
        elif f"codes.{key}" in pieces and f"scales.{key}" in pieces:
            found = base + unpacked(pieces[f"codes.{key}"], pieces[f"scales.{key}"])
        elif f"left.{key}" in pieces and f"right.{key}" in pieces:
            found = base + product(pieces[f"left.{key}"], pieces[f"right.{key}"])
        else:
            found = base
    if found is None or found.shape != weight.shape:
        raise GradmemError(f"{directory} is damaged: it lacks a part of {key}")
    return found
