"""Memory: what a WRITE leaves behind, and all that a READ needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import GradmemError

if TYPE_CHECKING:
    from .backbone import Prefix
    from .model import MemoryModel

FORMAT, VERSION = "gradmem-memory", 1
SCALE = ".scale"
Precision = Literal["float32", "float16", "int8"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Record:
    """Provenance and write receipt of one memory: who wrote it, from what, and how well.

    Attributes
    ----------
    method, model : str
        Name of the method, and name or path of the checkpoint.
    backbone, checkpoint, tokenizer : str
        SHA-256 of the backbone's weights, of all weights and settings, and of the tokenizer.
    context_sha256 : str
        SHA-256 of the context text, UTF-8.
    context_tokens : int
    steps : int
        Write steps taken.
    inner_lr : list of float
        Inner learning rate of each memory vector (one number where all share it; empty without).
    losses : list of float
        Mean token loss before each step and after the last, nats.
    token_losses : list of float
        Loss of each context token under the final memory, nats. Numbers only: no token is kept.
    """

    method: str
    model: str
    backbone: str
    checkpoint: str
    tokenizer: str
    context_sha256: str
    context_tokens: int
    steps: int
    inner_lr: list[float]
    losses: list[float]
    token_losses: list[float]

    LOST = 0.6931471805599453
    """Nats beyond which a token counts as lost: the memory gives it less than an even chance."""

    @property
    def loss_before(self) -> float:
        """Write loss of the unwritten memory."""
        return self.losses[0]

    @property
    def loss_after(self) -> float:
        """Write loss of this memory."""
        return self.losses[-1]

    def row(self) -> dict[str, Any]:
        """The record as plain data, with what follows from it."""
        return {**vars(self), "loss_before": self.loss_before, "loss_after": self.loss_after, "lost": self.lost}

    @property
    def lost(self) -> list[int]:
        """Positions of the tokens that the memory lost."""
        return [i for i, loss in enumerate(self.token_losses) if loss > self.LOST]


@dataclass
class Memory:
    """Memories of one or more contexts.

    Attributes
    ----------
    tensors : dict of Tensor, shapes (batch, ...)
    records : list of Record
        One for each row where text was written; empty for memories of bare tokens.
    model : MemoryModel or None
        The model that answers `ask`.
    prefix : Prefix or None
        What `ask` has run of the model: kept, so that it is run once for all questions.
    """

    tensors: dict[str, Tensor]
    records: list[Record] = field(default_factory=list)
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
        return Memory(tensors, [self.records[i] for i in index.tolist()] if self.records else [], self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def rounded(self, precision: Precision) -> Memory:
        """The memory as it comes back from a file of this precision."""
        tensors = {
            name: tensor.to(self.tensors[name].device)
            for name, tensor in _decode(_encode(self.tensors, precision)).items()
        }
        return Memory(tensors, self.records, self.model)

    def ask(self, query: Any, **generate: Any) -> Any:
        """Answer from the memory alone; see `MemoryModel.ask`.

        Raises
        ------
        GradmemError
            When the memory is bound to no model.
        """
        if self.model is None:
            raise GradmemError("this memory is bound to no model: open it with gradmem.open(FILE) or model.open(FILE)")
        return self.model.ask(self, query, **generate)

    def save(self, path: str | os.PathLike[str], precision: Precision = "float32") -> Path:
        """Save as one safetensors file, which appears whole or not at all.

        Parameters
        ----------
        path : path
        precision : {"float32", "float16", "int8"}
            int8 keeps one float32 scale for each vector.

        Raises
        ------
        GradmemError
            When the file cannot be written.
        """
        tensors = _encode(self.tensors, precision)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "sha256": digest(tensors),
            "records": json.dumps([dataclasses.asdict(record) for record in self.records]),
        }
        return write_bytes(Path(path), save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Memory:
        """Load a memory file, bound to no model; `gradmem.open` also finds the model.

        Raises
        ------
        GradmemError
            When the file is missing, damaged, of another kind or of a newer version.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise GradmemError(f"{path} is no memory file")
                if header.get("version") != str(VERSION):
                    raise GradmemError(
                        f"{path} has format version {header.get('version')}, this gradmem reads {VERSION}"
                    )
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                records = [Record(**record) for record in json.loads(header["records"])]
        except FileNotFoundError as error:
            raise GradmemError(f"no memory file at {path}") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise GradmemError(f"{path} is damaged or no memory file: {error}") from error
        if digest(stored) != header.get("sha256"):
            raise GradmemError(f"{path} is damaged: its contents do not match its checksum")
        tensors = _decode(stored)
        sizes = {tensor.shape[:1] for tensor in tensors.values()}
        if len(sizes) != 1 or (records and sizes != {(len(records),)}):
            raise GradmemError(f"{path} is damaged: its tensors and records do not fit together")
        return cls(tensors, records)


def _encode(tensors: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Tensors as they stand in a file; int8 adds one scale for each vector."""
    if precision not in DTYPES:
        raise GradmemError(f"precision must be float32, float16 or int8, not {precision!r}")
    encoded = {}
    for name, tensor in tensors.items():
        values = tensor.detach().to("cpu", torch.float32)
        if precision == "int8":
            scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            encoded[name + SCALE] = scale
            values = (values / scale).round()
        encoded[name] = values.to(DTYPES[precision]).contiguous()
    return encoded


def _decode(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are read, float32."""
    return {
        name: tensor.float() * stored[name + SCALE] if name + SCALE in stored else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(SCALE)
    }


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file under a temporary name beside it, then rename it into place.

    Raises
    ------
    GradmemError
        When it cannot be written; an existing file is then untouched.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise GradmemError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def text_digest(text: str) -> str:
    """SHA-256 of a text, UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
