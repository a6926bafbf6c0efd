"""Where the memories of a corpus are kept: a folder of Parquet shards, or a store."""

from __future__ import annotations

import io
import json
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..errors import GradmemError, Unavailable, reason
from ..files import write_bytes
from ..receipts import Receipt, text_digest
from ..store import Store
from ..store.database import locate

T = TypeVar("T")
RUN = ".run"
"""File of a folder with the token of the run that may write to it: the last one that has begun."""
SHARD = ".parquet"
FAILED = "failed.jsonl"
"""The side file: documents that failed in the last run."""
READERS = 16
"""Shards that are read at once."""
STORE_SUFFIXES = (".db", ".sqlite")
PATIENCE = (1, 2, 4, 8, 16, 32)
"""Seconds to wait, time after time, for a database that does not answer."""


@dataclass(frozen=True)
class Written:
    """A memory of one document.

    Attributes
    ----------
    document : str
        SHA-256 of the text, the checkpoint and the options; see `document_key`.
    content : str
        `gradmem.store.content_hash`.
    name : str
    tags : list of str
    receipts : list of Receipt
    data : bytes
        The memory file.
    """

    document: str
    content: str
    name: str
    tags: list[str]
    receipts: list[Receipt]
    data: bytes


def document_key(settings: str, digest: str) -> str:
    """What a run knows a document by: the SHA-256 of how it is written, and that of its text."""
    return text_digest(f"{settings} {digest}")


@dataclass(frozen=True)
class Shards:
    """A folder of Parquet files, each with the memories of some documents. They are the list of what is done too.

    Attributes
    ----------
    url : str
        Path, or URL that fsspec opens.
    token : str
        Of the run that writes.
    """

    url: str
    token: str = ""

    def begin(self) -> Shards:
        """Take over the folder: from now on no earlier run writes to it, even if its processes are still alive.

        Raises
        ------
        GradmemError
            If the folder cannot be written to.
        """
        mine = Shards(self.url, secrets.token_hex(16))
        mine._write(RUN, mine.token.encode())
        return mine

    def done(self) -> set[str]:
        """Keys of the documents whose memories are there.

        Raises
        ------
        GradmemError
            If a shard is damaged, or the folder cannot be read.
        """
        import pyarrow.parquet as pq

        def keys(name: str) -> list[str]:
            try:
                with self._system.open(self._path(name), "rb") as file:
                    found: list[str] = pq.read_table(file, columns=["document"])["document"].to_pylist()
            except Exception as error:
                raise GradmemError(f"{name} in {self.url} is damaged ({reason(error)}): delete it") from error
            return found

        with ThreadPoolExecutor(READERS) as pool:
            return {key for found in pool.map(keys, self.names()) for key in found}

    def names(self) -> list[str]:
        """Names of the shards."""
        try:
            found = self._system.ls(self._root, detail=False) if self._system.isdir(self._root) else []
        except OSError as error:
            raise GradmemError(f"cannot list {self.url}: {reason(error)}") from error
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name.endswith(SHARD) and name[0] != ".")

    def present(self, keys: list[str]) -> set[str]:
        """Keys in the shard that a batch of these documents has, if it was written before."""
        import pyarrow.parquet as pq

        path = self._path(_shard(keys))
        if not self._system.exists(path):
            return set()
        with self._system.open(path, "rb") as file:
            return set(pq.read_table(file, columns=["document"])["document"].to_pylist())

    def stored(self, content: str, name: str) -> bool:
        """Whether a memory is there; `done` has said so already."""
        return False

    def save(self, keys: list[str], rows: list[Written]) -> dict[str, str]:
        """Write the shard of a batch: whole or not at all, and if it returns, on the disk.

        Parameters
        ----------
        keys : list of str
            Keys of all documents of the batch, those that failed too: they name the shard.
        rows : list of Written

        Returns
        -------
        dict of str
            Keys of documents whose memories were refused, with the reason: none.

        Raises
        ------
        GradmemError
            If the folder cannot be written to, is another one on this machine, or another run has taken it over.
        """
        self._write(_shard(keys), to_parquet(rows))
        return {}

    def write_failed(self, lines: str) -> str:
        """Write the side file beside the shards, and return where it is."""
        self._write(FAILED, lines.encode(errors="replace"))
        return f"{self.url.rstrip('/')}/{FAILED}"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from .documents import opened

        return opened(self.url)

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1].rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, data: bytes) -> None:
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._system, LocalFileSystem):
            if name != RUN:
                self._check_token()
            write_bytes(Path(self._path(name)), data)
            return
        temporary = self._path(f".{secrets.token_hex(8)}.tmp")
        try:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(temporary, data)
            if name != RUN:
                self._check_token()
            self._system.mv(temporary, self._path(name))
        except GradmemError:
            self._system.rm(temporary)
            raise
        except Exception as error:  # each file system has errors of its own
            raise GradmemError(f"cannot write {name} to {self.url}: {reason(error)}") from error

    def _check_token(self) -> None:
        try:
            found = self._system.cat_file(self._path(RUN)).decode()
        except OSError as error:
            raise GradmemError(
                f"a worker does not see {self.url}: give a folder that all machines share, or a URL"
            ) from error
        if found != self.token:
            raise GradmemError(f"another run writes to {self.url} now: one at a time")


@dataclass(frozen=True)
class InStore:
    """A store of memories.

    Attributes
    ----------
    location : str
        As `gradmem.store.Store` takes it.
    """

    location: str

    def begin(self) -> InStore:
        """Create the store if there is none."""
        with Store(self.location):
            return self

    def done(self) -> set[str]:
        """Nothing: the store knows memories by their content, see `stored`."""
        return set()

    def present(self, keys: list[str]) -> set[str]:
        """Nothing, likewise."""
        return set()

    def stored(self, content: str, name: str) -> bool:
        """Whether a memory is there, under whatever name.

        Raises
        ------
        Conflict
            If it is not, and another memory has the name.
        """
        if self._patiently(lambda: self._store.reuse(content)):
            return True
        self._patiently(lambda: self._store.reuse(content, name=name))
        return False

    def save(self, keys: list[str], rows: list[Written]) -> dict[str, str]:
        """Store memories, and return the keys of those that were refused, with the reason; see `Shards.save`."""
        refused = {}
        for row in rows:
            try:
                self._patiently(
                    lambda row=row: self._store.put(  # type: ignore[misc]
                        row.data, name=row.name, tags=row.tags, content=row.content
                    )
                )
            except Unavailable:
                raise
            except GradmemError as error:
                refused[row.document] = str(error)
        return refused

    def write_failed(self, lines: str) -> str:
        """Write the side file into the current directory, and return where it is."""
        return str(write_bytes(Path(FAILED), lines.encode(errors="replace")))

    @cached_property
    def _store(self) -> Store:
        return Store(self.location)

    def _patiently(self, change: Callable[[], T]) -> T:
        """Make a change, which may be made twice, and wait for a database that restarts."""
        for seconds in PATIENCE:
            try:
                return change()
            except Unavailable:
                time.sleep(seconds)
        return change()


Destination = Shards | InStore


def destination(out: str | None) -> Destination:
    """The destination that a user names: none for the default store, a store's URL or file, or a folder.

    It holds in every process, whatever its directory and its environment.
    """
    from .documents import absolute

    kind = out.partition("://")[0].partition("+")[0] if out and "://" in out else ""
    in_store = not out or kind in ("sqlite", "postgresql", "postgres") or (not kind and out.endswith(STORE_SUFFIXES))
    return InStore(locate(out).render_as_string(hide_password=False)) if in_store else Shards(absolute(str(out)))


def _shard(keys: list[str]) -> str:
    """The name of a shard: the same documents always have the same one."""
    return text_digest(" ".join(sorted(keys)))[:32] + SHARD


def to_parquet(rows: list[Written]) -> bytes:
    """A shard: one row a document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "document": pa.array([row.document for row in rows], pa.string()),
        "content": pa.array([row.content for row in rows], pa.string()),
        "name": pa.array([row.name for row in rows], pa.string()),
        "tags": pa.array([row.tags for row in rows], pa.list_(pa.string())),
        "checkpoint": pa.array([row.receipts[0].checkpoint for row in rows], pa.string()),
        "receipts": pa.array([json.dumps([asdict(one) for one in row.receipts]) for row in rows], pa.large_string()),
        "memory": pa.array([row.data for row in rows], pa.large_binary()),
    }
    file = io.BytesIO()
    packed: Any = {name: "NONE" if name == "memory" else "ZSTD" for name in columns}  # numbers do not get smaller
    pq.write_table(pa.table(columns), file, compression=packed, use_dictionary=["checkpoint"])
    return file.getvalue()


def from_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a shard.

    Raises
    ------
    GradmemError
        If it is no shard, or a package is missing.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise GradmemError("a shard of a corpus needs one more package: pip install 'gradmem[ray]'") from error
    columns = ["content", "name", "tags", "memory"]
    try:
        for batch in pq.ParquetFile(path).iter_batches(64, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise GradmemError(f"{path} is no shard of a corpus: {reason(error)}") from error
