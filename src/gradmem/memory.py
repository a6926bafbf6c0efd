"""A memory: what a WRITE leaves behind, and all that a READ needs; and the file that it travels in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import Self

from .choices import Precision
from .errors import GradmemError
from .files import write_bytes
from .receipts import Receipt, text_digest

FORMAT, VERSION = "gradmem-memory", 1
SCALE = ".scale"
LENGTHS = "lengths"
LONGEST_NAME = 200
"""Most characters of a tensor's name in a file."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


class NotBound(GradmemError, AttributeError):
    """A memory without a model was asked; an `AttributeError` too, so that `hasattr` answers False."""


@dataclass
class Memory:
    """Memories of one or more contexts.

    A memory whose size depends on its context has a tensor `lengths`, int64, shape (batch,). The second dimension of
    its floating-point tensors is then that length, padded with zeros at the end.

    To ask a memory, bind it to the model that wrote it; see `BoundMemory`.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
    receipts : list of Receipt
        One for each row; empty if tokens were written rather than text.
    """

    tensors: dict[str, Tensor]
    receipts: list[Receipt] = field(default_factory=list)

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, row: int) -> Self:
        """One row, as a memory of its own."""
        return self.select([range(len(self))[row]])

    if not TYPE_CHECKING:  # type checkers know already

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("ask", "answer", "restore"):
                raise NotBound(
                    "this memory is not bound to a model: open it with gradmem.open(FILE) or model.open(FILE), or bind "
                    "it with model.bind(MEMORY)"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """Select rows, in any order and any number of times."""
        index = torch.as_tensor(rows, dtype=torch.long)
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        if LENGTHS in tensors:
            longest = max(tensors[LENGTHS].tolist(), default=0)
            tensors = {name: t[:, :longest] if t.is_floating_point() else t for name, t in tensors.items()}
        receipts = [self.receipts[row] for row in index.tolist()] if self.receipts else []
        return dataclasses.replace(self, tensors=tensors, receipts=receipts)

    @staticmethod
    def join(memories: Sequence[Memory]) -> Memory:
        """Concatenate the rows of several memories of the same method; the result is not bound to a model."""
        tensors = {}
        for name in memories[0].tensors:
            parts = [memory.tensors[name] for memory in memories]
            if LENGTHS in memories[0].tensors and parts[0].is_floating_point():
                longest = max(part.shape[1] for part in parts)
                pads = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
                parts = [F.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
            tensors[name] = torch.cat(parts)
        return Memory(tensors, [receipt for memory in memories for receipt in memory.receipts])

    @property
    def history(self) -> list[Receipt]:
        """Receipts of everything that was written, row by row and in the order of writing."""
        return [part for receipt in self.receipts for part in receipt.history]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, padding not counted."""
        return sum(self._count(tensor) * tensor.element_size() for tensor in self.tensors.values())

    def _count(self, tensor: Tensor) -> int:
        """Numbers in a tensor, padding not counted."""
        if LENGTHS in self.tensors and tensor.is_floating_point():
            return int(self.tensors[LENGTHS].sum()) * math.prod(tensor.shape[2:])
        return tensor.numel()

    def rounded(self, precision: Precision) -> Self:
        """Round the memory as saving it with this precision does."""
        tensors = {
            name: tensor.to(self.tensors[name].device)
            for name, tensor in _decode(_encode(self.tensors, precision)).items()
        }
        return dataclasses.replace(self, tensors=tensors)

    def to_bytes(self, precision: Precision = "float32") -> bytes:
        """The memory as the bytes of one safetensors file.

        Parameters
        ----------
        precision : {"float32", "float16", "int8"}
            Type of floating-point tensors; others are unchanged. int8 stores one float32 scale for each vector.
        """
        tensors = _encode(self.tensors, precision)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "sha256": digest(tensors),
            "records": json.dumps([dataclasses.asdict(receipt) for receipt in self.receipts]),
        }
        return save(tensors, header)

    @staticmethod
    def from_bytes(data: bytes, what: str = "the memory") -> Memory:
        """Read the bytes of a memory file, which anybody may have written.

        Nothing in them is executed, and sizes that they state are checked before memory is allocated. The result is not
        bound to a model.

        Parameters
        ----------
        data : bytes
        what : str
            What messages call these bytes.

        Raises
        ------
        GradmemError
            If they are damaged, no memory file, or of a newer version.
        """
        try:
            stored = load(data)
            if not all(name.isprintable() and len(name) <= LONGEST_NAME for name in stored):
                raise ValueError(f"a tensor's name must be printable and have at most {LONGEST_NAME} characters")
            about = _header(data).get("__metadata__", {})
            if about.get("format") != FORMAT:
                raise GradmemError(f"{what} is no memory file")
            if about.get("version") != str(VERSION):
                raise GradmemError(f"{what} has format version {about.get('version')}, this gradmem reads {VERSION}")
            told = json.loads(about["records"])
            json.dumps(told, ensure_ascii=False).encode()  # refuses lone surrogates, which could not be printed
            receipts = [Receipt.read(receipt) for receipt in told]
            same = digest(stored) == about.get("sha256")
            tensors = _decode(stored) if same else {}
        except (SafetensorError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise GradmemError(f"{what} is damaged or no memory file: {error}") from error
        if not same:
            raise GradmemError(f"{what} is damaged: its contents do not match its checksum")
        sizes = {tensor.shape[:1] for tensor in tensors.values()}
        if len(sizes) != 1 or (receipts and sizes != {(len(receipts),)}):
            raise GradmemError(f"{what} is damaged: its tensors and receipts have different numbers of rows")
        return Memory(tensors, receipts)

    def save(self, path: str | os.PathLike[str], precision: Precision = "float32") -> Path:
        """Save as one safetensors file, whole or not at all; see `to_bytes`.

        Raises
        ------
        GradmemError
            If the file cannot be written.
        """
        return write_bytes(Path(path), self.to_bytes(precision))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Memory:
        """Load a memory file without its model; `gradmem.open` also loads and binds the model.

        Raises
        ------
        GradmemError
            If the file is missing, damaged, no memory file, or of a newer version.
        """
        return Memory.from_bytes(read_bytes(Path(path)), str(path))


def stored_precision(data: bytes) -> Precision:
    """Find the precision of the floating-point tensors in the bytes of a memory file."""
    header = _header(data)
    if any(name.endswith(SCALE) for name in header):
        return "int8"
    return "float16" if any(about.get("dtype") == "F16" for about in header.values()) else "float32"


def identity(data: bytes) -> str:
    """SHA-256 of the contents of a memory file, independent of the order of its header."""
    about = _header(data)["__metadata__"]
    return text_digest(about["sha256"] + about["records"])


def _header(data: bytes) -> dict[str, Any]:
    """The header of valid safetensors bytes: tensors by name, and `__metadata__`."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _encode(tensors: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Tensors as a file stores them; int8 adds one scale for each vector, and integers and booleans stay exact."""
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
    """Tensors as they were encoded, floating-point ones in float32."""
    tensors = {}
    for name, tensor in stored.items():
        if name + SCALE in stored:
            scale = stored[name + SCALE]
            if scale.shape != (*tensor.shape[:-1], 1):  # broadcasting could make it any size
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
        If the file is missing or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise GradmemError(f"{path} is damaged or no memory file: it is not a regular file")
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
