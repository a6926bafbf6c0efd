"""Memory: what a WRITE leaves behind, and all that a READ needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .choices import Precision
from .errors import GradmemError
from .files import write_bytes
from .receipts import Receipt, text_digest

if TYPE_CHECKING:
    from .model import MemoryModel
    from .prefix import Prefix

FORMAT, VERSION = "gradmem-memory", 1
SCALE = ".scale"
LENGTHS = "lengths"
LONGEST_NAME = 200
"""Characters of a tensor's name in a file."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass
class Memory:
    """Memories of one or more contexts.

    A memory that grows with its context has a tensor `lengths`, int64, of shape (batch,). The second dimension of
    its tensors of more than one dimension is then that length, padded with zeros at the end.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
    receipts : list of Receipt
        One for each row where text was written; empty for memories of bare tokens.
    model : MemoryModel or None
        The model that answers `ask`.
    prefix : Prefix or None
        What `ask` has run of the model: kept, so that it is run once for all questions.
    """

    tensors: dict[str, Tensor]
    receipts: list[Receipt] = field(default_factory=list)
    model: MemoryModel | None = field(default=None, repr=False, compare=False)
    prefix: Prefix | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, row: int) -> Memory:
        """One row, as a memory of its own."""
        return self.select([range(len(self))[row]])

    def select(self, rows: Sequence[int] | Tensor) -> Memory:
        """Rows in any order and any number of times."""
        index = torch.as_tensor(rows, dtype=torch.long)
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        if LENGTHS in tensors:
            longest = max(tensors[LENGTHS].tolist(), default=0)
            tensors = {name: tensor[:, :longest] if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
        return Memory(tensors, [self.receipts[i] for i in index.tolist()] if self.receipts else [], self.model)

    @classmethod
    def join(cls, memories: Sequence[Memory]) -> Memory:
        """Rows of several memories of one method, one after the other, bound to no model."""
        tensors = {}
        for name in memories[0].tensors:
            parts = [memory.tensors[name] for memory in memories]
            if LENGTHS in memories[0].tensors and parts[0].ndim > 1:
                longest = max(part.shape[1] for part in parts)
                pads = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
                parts = [F.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
            tensors[name] = torch.cat(parts)
        return cls(tensors, [receipt for memory in memories for receipt in memory.receipts])

    @property
    def history(self) -> list[Receipt]:
        """What was written into each row, one row after the other."""
        return [part for receipt in self.receipts for part in receipt.history]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without padding."""
        return sum(self._count(tensor) * tensor.element_size() for tensor in self.tensors.values())

    def _count(self, tensor: Tensor) -> int:
        """Numbers in a tensor, without padding."""
        if LENGTHS in self.tensors and tensor.ndim > 1:
            return int(self.tensors[LENGTHS].sum()) * math.prod(tensor.shape[2:])
        return tensor.numel()

    def rounded(self, precision: Precision) -> Memory:
        """The memory as it comes back from a file of this precision."""
        tensors = {
            name: tensor.to(self.tensors[name].device)
            for name, tensor in _decode(_encode(self.tensors, precision)).items()
        }
        return Memory(tensors, self.receipts, self.model)

    def ask(self, query: Any, **generate: Any) -> Any:
        """Answer from the memory alone; see `MemoryModel.ask`.

        Raises
        ------
        GradmemError
            When the memory is bound to no model.
        """
        return self._bound().ask(self, query, **generate)

    def answer(self, query: Any, **generate: Any) -> Any:
        """Answer from the memory alone, with what speaks for each answer; see `MemoryModel.answer`.

        Raises
        ------
        GradmemError
            When the memory is bound to no model.
        """
        return self._bound().answer(self, query, **generate)

    def restore(self) -> list[str]:
        """Texts that the memory gives back, from the memory alone; see `MemoryModel.restore`.

        Raises
        ------
        GradmemError
            When the memory is bound to no model, or says nothing of what was written.
        """
        return self._bound().restore(self)

    def _bound(self) -> MemoryModel:
        if self.model is None:
            raise GradmemError("this memory is bound to no model: open it with gradmem.open(FILE) or model.open(FILE)")
        return self.model

    def to_bytes(self, precision: Precision = "float32") -> bytes:
        """The memory as the bytes of one safetensors file.

        Parameters
        ----------
        precision : {"float32", "float16", "int8"}
            Of floating-point tensors; others are kept as they are. int8 keeps one float32 scale for each vector.
        """
        tensors = _encode(self.tensors, precision)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "sha256": digest(tensors),
            "records": json.dumps([dataclasses.asdict(receipt) for receipt in self.receipts]),
        }
        return save(tensors, header)

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "the memory") -> Memory:
        """Read the bytes of a memory file, bound to no model; nothing in them is executed, no size they state believed.

        Parameters
        ----------
        data : bytes
        what : str
            Name of their source in messages.

        Raises
        ------
        GradmemError
            When they are damaged, of another kind or of a newer version.
        """
        try:
            stored = load(data)
            if not all(name.isprintable() and len(name) <= LONGEST_NAME for name in stored):
                raise ValueError(f"names of tensors are printable, up to {LONGEST_NAME} characters")
            about = _header(data).get("__metadata__", {})
            if about.get("format") != FORMAT:
                raise GradmemError(f"{what} is no memory file")
            if about.get("version") != str(VERSION):
                raise GradmemError(f"{what} has format version {about.get('version')}, this gradmem reads {VERSION}")
            told = json.loads(about["records"])
            json.dumps(told, ensure_ascii=False).encode()  # text that is none would break whoever prints it
            receipts = [Receipt.read(receipt) for receipt in told]
            same = digest(stored) == about.get("sha256")
            tensors = _decode(stored) if same else {}
        except (SafetensorError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise GradmemError(f"{what} is damaged or no memory file: {error}") from error
        if not same:
            raise GradmemError(f"{what} is damaged: its contents do not match its checksum")
        sizes = {tensor.shape[:1] for tensor in tensors.values()}
        if len(sizes) != 1 or (receipts and sizes != {(len(receipts),)}):
            raise GradmemError(f"{what} is damaged: its tensors and receipts do not fit together")
        return cls(tensors, receipts)

    def save(self, path: str | os.PathLike[str], precision: Precision = "float32") -> Path:
        """Save as one safetensors file, which appears whole or not at all; see `to_bytes`.

        Raises
        ------
        GradmemError
            When the file cannot be written.
        """
        return write_bytes(Path(path), self.to_bytes(precision))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Memory:
        """Load a memory file, bound to no model; `gradmem.open` also finds the model.

        Raises
        ------
        GradmemError
            When the file is missing, damaged, of another kind or of a newer version.
        """
        return cls.from_bytes(read_bytes(Path(path)), str(path))


def stored_precision(data: bytes) -> Precision:
    """Precision of the floating-point tensors in the bytes of a memory file."""
    header = _header(data)
    if any(name.endswith(SCALE) for name in header):
        return "int8"
    return "float16" if any(about.get("dtype") == "F16" for about in header.values()) else "float32"


def identity(data: bytes) -> str:
    """SHA-256 of all that a memory file says, in whatever order its header says it."""
    about = _header(data)["__metadata__"]
    return text_digest(about["sha256"] + about["records"])


def _header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file that safetensors has read: tensors by name, and `__metadata__`."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _encode(tensors: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Tensors as they stand in a file; int8 adds one scale for each vector. Integers and truth values stay exact."""
    if precision not in DTYPES:
        raise GradmemError(f"precision must be float32, float16 or int8, not {precision!r}")
    encoded = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            encoded[name] = tensor.cpu().contiguous()
            continue
        values = tensor.detach().to("cpu", torch.float32)
        if precision == "int8":
            scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            encoded[name + SCALE] = scale
            values = (values / scale).round()
        encoded[name] = values.to(DTYPES[precision]).contiguous()
    return encoded


def _decode(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are read, floating-point ones in float32."""
    tensors = {}
    for name, tensor in stored.items():
        if name + SCALE in stored:
            scale = stored[name + SCALE]
            if scale.shape != (*tensor.shape[:-1], 1):  # it would be spread to any size
                raise ValueError(f"the scale of '{name}' does not fit")
            tensors[name] = tensor.float() * scale
        elif not name.endswith(SCALE):
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def read_bytes(path: Path) -> bytes:
    """Read a memory file whole.

    Raises
    ------
    GradmemError
        When there is none, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise GradmemError(f"{path} is damaged or no memory file: it is no regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise GradmemError(f"no memory file at {path}") from error
    except (OSError, ValueError) as error:
        raise GradmemError(f"cannot read {path}: {error}") from error


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
