"""SmolLM2-135M in two files small enough to travel: the blocks of its GGUF file as they are, compressed.

    python -m benchmarks.gpu.carry pack MODEL.gguf CONVERTED OUT     writes OUT/model-1.xz and OUT/model-2.xz
    python -m benchmarks.gpu.carry unpack OUT/model-1.xz OUT/model-2.xz DIR

CONVERTED is the directory that gradmem makes of the GGUF file; DIR gets the same weights to the bit, its config and
tokenizer. Unpacking needs neither the gguf package nor a network.
"""

from __future__ import annotations

import argparse
import lzma
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, load_file, save
from safetensors.torch import save_file

BLOCK = 32
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 3, "lc": 0, "lp": 0, "pb": 0}]
LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
LAYER |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
LAYER |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def plain_name(name: str) -> str:
    """The name of a GGUF tensor in transformers."""
    parts = name.split(".")
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight" if parts[0] == "blk" else f"{OUTSIDE[parts[0]]}.weight"


def planes(name: str, tensor: Any, heads: dict[str, int]) -> dict[str, np.ndarray]:
    """Codes and scales of a tensor; rows of queries and keys in transformers' order."""
    kind, data, plain = tensor.tensor_type.name, np.asarray(tensor.data), plain_name(name)
    if kind == "F32":
        return {f"F32.{plain}": data}
    size = {"Q8_0": 34, "Q4_1": 20}[kind]
    blocks = data.reshape(len(data), -1, size)
    for part, count in heads.items():
        if f".{part}." in name:
            blocks = blocks.reshape(count, -1, 2, *blocks.shape[1:]).swapaxes(1, 2).reshape(blocks.shape)
    ends = {"Q8_0": {"d": (0, 2), "q": (2, 34)}, "Q4_1": {"d": (0, 2), "m": (2, 4), "q": (4, 20)}}[kind]
    return {f"{kind}.{end}.{plain}": np.ascontiguousarray(blocks[..., a:b]) for end, (a, b) in ends.items()}


def values(parts: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights from codes and scales: the very products and sums of the gguf package, in float32."""
    found = {}
    for key, array in parts.items():
        kind, rest = key.split(".", 1)
        if kind == "F32":
            found[rest] = torch.from_numpy(array.copy())
        elif rest.startswith("q."):
            name = rest[2:]
            scale = parts[f"{kind}.d.{name}"].view(np.float16).astype(np.float32)
            if kind == "Q8_0":
                weights = array.view(np.int8).astype(np.float32) * scale
            else:
                codes = np.concatenate([array & 15, array >> 4], axis=-1).astype(np.float32)
                weights = scale * codes + parts[f"{kind}.m.{name}"].view(np.float16).astype(np.float32)
            found[name] = torch.from_numpy(weights.reshape(len(array), -1))
    return found


def pack(gguf_file: Path, converted: Path, out: Path) -> None:
    """Write two files of about the same size."""
    import gguf

    tensors = gguf.GGUFReader(str(gguf_file)).tensors
    parts: dict[str, np.ndarray] = {}
    for tensor in tensors:
        parts |= planes(tensor.name, tensor, {"attn_q": 9, "attn_k": 3})
    wanted, made = load_file(converted / "model.safetensors"), values(parts)
    wanted["model.embed_tokens.weight"] = wanted.pop("lm_head.weight")  # one weight for both
    assert set(wanted) == set(made), set(wanted) ^ set(made)
    assert all(np.array_equal(wanted[name], made[name].numpy()) for name in made)
    files = {f"file.{file.name}": np.frombuffer(file.read_bytes(), np.uint8) for file in converted.glob("*.json*")}
    items = sorted({**parts, **files}.items())
    # A tensor's planes stay together; the larger half gives tensors away until both are as large.
    owners = {name: 0 if name.startswith("Q8_0") else 1 for name, _ in items}
    size = lambda half: sum(array.nbytes for name, array in items if owners[name] == half)  # noqa: E731
    for tensor in sorted({name.split(".", 2)[2] for name, _ in items if name.startswith("Q4_1")}):
        if size(0) * 1.083 >= size(1):
            break
        owners |= {name: 0 for name, _ in items if name.startswith("Q4_1") and name.split(".", 2)[2] == tensor}
    out.mkdir(parents=True, exist_ok=True)
    for half in (0, 1):
        data = save({name: array for name, array in items if owners[name] == half})
        file = out / f"model-{half + 1}.xz"
        file.write_bytes(lzma.compress(data, format=lzma.FORMAT_XZ, filters=FILTERS))
        print(file, file.stat().st_size)


def _read(file: Path) -> dict[str, np.ndarray]:
    return load(lzma.decompress(file.read_bytes()))


def unpack(first: Path, second: Path, out: Path) -> None:
    """Write weights, config and tokenizer."""
    with ProcessPoolExecutor(2) as pool:
        one, two = pool.map(_read, (first, second))
    parts = one | two
    out.mkdir(parents=True, exist_ok=True)
    for name in [name for name in parts if name.startswith("file.")]:
        (out / name.removeprefix("file.")).write_bytes(parts.pop(name).tobytes())
    save_file(values(parts), out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("places", nargs=3, type=Path)
    given = parser.parse_args()
    {"pack": pack, "unpack": unpack}[given.what](*given.places)


if __name__ == "__main__":
    main()
