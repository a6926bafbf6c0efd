"""The commands of `gradmem store`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

from typing_extensions import Unpack

from ..device import device_named
from ..errors import GradmemError
from ..files import write_bytes
from ..store.entries import Diff, Entry
from ..store.listing import Filters, labels
from ..store.store import Store
from .console import console, dumps, progress_bar, read_text
from .store_tables import diff_table, entries_table, entry_table, versions_table


def _store() -> Store:
    """Open the store, which must exist."""
    return Store(create=False)


def ls(limit: int = 50, after: str | None = None, json: bool = False, **filters: Unpack[Filters]) -> list[Entry]:
    """List memories, the newest first; by name if `--name` is the beginning of one.

    Parameters
    ----------
    limit
        Most memories to list, up to 1,000.
    after
        Cursor at the end of the previous page.
    json
        Print JSON.
    """
    with _store() as store:
        found = list(store.list(limit=limit, after=after, **filters))
    if json:
        print(dumps([entry.to_dict() for entry in found]))
        return found
    console.print(entries_table(found))
    if len(found) == limit:
        console.print(f"next page: --after {quote(found[-1].cursor)}", markup=False, highlight=False, soft_wrap=True)
    return found


def show(ref: str, json: bool = False) -> Entry:
    """Show a memory and its versions.

    Parameters
    ----------
    ref
        Id or name.
    json
        Print JSON.
    """
    with _store() as store:
        entry = store.get(ref)
        history = list(store.versions(entry.id))
    if json:
        print(dumps({**entry.to_dict(), "versions": [version.to_dict() for version in history]}))
    else:
        console.print(entry_table(entry), versions_table(history, entry.current.number))
    return entry


def rm(refs: list[str], **filters: Unpack[Filters]) -> int:
    """Delete the named memories, or all unpinned memories that match the filters.

    Parameters
    ----------
    refs
        Ids or names.
    """
    if bool(refs) == any(filters.values()):  # without filters everything would be deleted
        raise GradmemError("name the memories to delete: give either ids and names, or filters")
    with _store() as store:
        deleted = store.delete(*refs) if refs else store.prune(**filters)
    console.print(f"deleted {deleted}")
    return deleted


def export(ref: str, output: Path = Path("memory.safetensors"), version: int | None = None) -> Path:
    """Save a stored memory as a memory file.

    Parameters
    ----------
    ref
        Id or name.
    output
        Memory file (short: -o).
    version
        Version to save. Default: the current one.
    """
    with _store() as store:
        data = store.read(ref, version)
    write_bytes(output, data)
    console.print(f"saved {output}: {len(data)} bytes")
    return output


def import_files(files: list[Path], name: str | None = None, tags: str = "") -> list[Entry]:
    """Store memory files as they are, or the memories in shards of a corpus (gradmem write-corpus).

    Parameters
    ----------
    files
        Memory files, or shards: *.parquet.
    name
        Name of the memory. Only for one memory file.
    tags
        Tags of every memory, separated by commas.
    """
    shards = [file for file in files if file.suffix == ".parquet"]
    if name is not None and (len(files) > 1 or shards):
        raise GradmemError(f"--name fits one memory file, not {len(files)} files or a shard: use --tags")
    from ..memory import read_bytes

    stored = []
    with Store() as store:
        for file in files:
            if file in shards:
                stored += _import_shard(store, file, tags)
            else:
                stored.append(_print_saved(store.put(read_bytes(file), name=name, tags=tags), "stored"))
    return stored


def _import_shard(store: Store, file: Path, tags: str) -> list[Entry]:
    """Store the memories of a shard under their names; those that are stored already keep theirs."""
    from ..corpus.destination import from_parquet

    stored = []
    for row in from_parquet(file):
        entry = store.reuse(row["content"], tags=tags) or store.put(
            row["memory"], name=row["name"], tags=[*row["tags"], *labels(tags)], content=row["content"]
        )
        stored.append(entry)
    console.print(f"stored {len(stored)} memories of {file}", markup=False, highlight=False, soft_wrap=True)
    return stored


def rename(ref: str, name: str | None = None) -> Entry:
    """Rename a memory, or remove its name.

    Parameters
    ----------
    ref
        Id or name.
    name
        New name. Default: remove the name.
    """
    with _store() as store:
        return _print_saved(store.rename(ref, name), "renamed")


def tag(ref: str, tags: str) -> Entry:
    """Replace the tags of a memory.

    Parameters
    ----------
    ref
        Id or name.
    tags
        Tags, separated by commas.
    """
    with _store() as store:
        return _print_saved(store.tag(ref, tags), "tagged")


def pin(ref: str, off: bool = False) -> Entry:
    """Pin a memory, so that it cannot be deleted.

    Parameters
    ----------
    ref
        Id or name.
    off
        Unpin the memory.
    """
    with _store() as store:
        return _print_saved(store.pin(ref, not off), "unpinned" if off else "pinned")


def append(
    ref: str,
    file: Path,
    checkpoint: str | None = None,
    before: Path | None = None,
    may_forget: bool = False,
    steps: int | None = None,
    device: str = "auto",
) -> Entry:
    """Write more text into a memory as its next version, and show how much of the earlier text is kept.

    Parameters
    ----------
    ref
        Id or name.
    file
        File of the text to append; - for standard input.
    checkpoint
        Checkpoint that wrote the memory. Not needed for those that `gradmem list` shows.
    before
        File of the text written before, to measure how much of it is still kept. The memory holds no text.
    may_forget
        Append even if the checkpoint was not trained to append, and forgets most of the earlier text.
    steps
        Number of write steps. Default: as many as the checkpoint was trained for.
    device
        Device to run on: auto (an accelerator if there is one), cpu, cuda or cuda:1.
    """
    more = read_text(file)
    given: dict[str, Any] = {} if before is None else {"before": read_text(before)}
    with _store() as store:
        found = store.get(ref)  # used by its id from here on: the name may move to another memory
        last = found.current.number
        model = store.open(found.id, last, checkpoint).model
        assert model is not None  # open binds
        model.to(device_named(device))
        texts = model.encoder.chunks(more) if model.method.reads_together else more
        entry = store.append(found.id, texts, model, steps=steps, may_forget=may_forget, progress=progress_bar, **given)
        changes = store.diff(entry.id, last, entry.current.number)
    console.print(diff_table(changes))
    return _print_saved(entry, "appended to")


def rollback(ref: str, version: int) -> Entry:
    """Make another version of a memory the current one. No version is deleted.

    Parameters
    ----------
    ref
        Id or name.
    version
        Number of the version.
    """
    with _store() as store:
        return _print_saved(store.rollback(ref, version), "rolled back")


def diff(ref: str, a: int, b: int, json: bool = False) -> Diff:
    """Show which tokens of one version another version keeps.

    Parameters
    ----------
    ref
        Id or name.
    a, b
        Numbers of the versions.
    json
        Print JSON.
    """
    with _store() as store:
        found = store.diff(ref, a, b)
    if json:
        print(dumps(found.to_dict()))
    else:
        console.print(diff_table(found))
    return found


def upgrade() -> str:
    """Bring the tables of a store in PostgreSQL up to date; a store in a file is upgraded when it is opened.

    Make a backup and stop all other processes that use the store first.
    """
    from ..store import upkeep

    version = upkeep.upgrade()
    console.print(f"the tables have version {version}, the newest one")
    return version


def payloads(url: str | None = None) -> str | None:
    """Store large payloads (64 KiB or more) outside the database from now on, or show where they are.

    Parameters
    ----------
    url
        Folder for the payloads: a path, or a URL that fsspec opens, such as s3://BUCKET/FOLDER. All processes that use
        the store must reach it. Payloads that are outside already must have been copied there. Default: change nothing.
    """
    from ..store import upkeep

    with _store() as store:
        place = upkeep.place_of_payloads(store) if url is None else upkeep.place_payloads(store, url)
    console.print(f"large payloads are in {place or 'the database'}", markup=False, highlight=False, soft_wrap=True)
    return place


def clean() -> int:
    """Remove payloads outside the database that no memory has, written two days ago or earlier."""
    from ..store import upkeep

    with _store() as store:
        removed = upkeep.clean(store)
    console.print(f"removed {removed}")
    return removed


def _print_saved(entry: Entry, action: str) -> Entry:
    """Print what was done to a memory, and return its entry."""
    name = f"{entry.name} " if entry.name else ""
    tags = f", tags {', '.join(entry.tags)}" if entry.tags else ""
    line = f"{action} {name}({entry.id}), version {entry.current.number}{tags}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return entry


COMMANDS: dict[str, Callable[..., Any]] = {
    "ls": ls,
    "show": show,
    "rm": rm,
    "export": export,
    "import": import_files,
    "rename": rename,
    "tag": tag,
    "pin": pin,
    "append": append,
    "rollback": rollback,
    "diff": diff,
    "upgrade": upgrade,
    "payloads": payloads,
    "clean": clean,
}
