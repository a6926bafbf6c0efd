"""`gradmem store`: its commands, as plain functions like those in `gradmem.cli.memory`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from ..device import device_named
from ..errors import GradmemError
from ..files import write_bytes
from ..store.entries import Diff, Entry
from ..store.listing import Filters
from ..store.store import Store
from .console import console, dumps, progress_bar, read_text
from .store_tables import diff_table, entries_table, entry_table, versions_table


def _store() -> Store:
    """The store that is there already."""
    return Store(create=False)


def ls(limit: int = 50, after: str | None = None, json: bool = False, **filters: Unpack[Filters]) -> list[Entry]:
    """List memories, the newest first.

    Parameters
    ----------
    limit
        Most memories to list, up to 1,000.
    after
        Go on after this cursor, which the page before ended with.
    json
        Print them as JSON.
    """
    with _store() as store:
        found = list(store.list(limit=limit, after=after, **filters))
    if json:
        print(dumps([entry.to_dict() for entry in found]))
        return found
    console.print(entries_table(found))
    if len(found) == limit:
        console.print(f"more: --after {found[-1].cursor}", highlight=False, soft_wrap=True)
    return found


def show(ref: str, json: bool = False) -> Entry:
    """Show a memory and its versions.

    Parameters
    ----------
    ref
        Id or name.
    json
        Print them as JSON.
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
    """Delete memories: those that are named, or all that match the filters; pinned ones stay.

    Parameters
    ----------
    refs
        Ids or names.
    """
    if bool(refs) == any(filters.values()):  # an empty filter would delete everything
        raise GradmemError("say which memories: ids or names, or filters")
    with _store() as store:
        deleted = store.delete(*refs) if refs else store.prune(**filters)
    console.print(f"deleted {deleted}")
    return deleted


def export(ref: str, output: Path = Path("memory.safetensors"), version: int | None = None) -> Path:
    """Copy a memory out of the store, as a memory file.

    Parameters
    ----------
    ref
        Id or name.
    output
        Memory file (short: -o).
    version
        Version to copy; default: the current one.
    """
    with _store() as store:
        data = store.read(ref, version)
    write_bytes(output, data)
    console.print(f"saved {output}: {len(data)} bytes")
    return output


def import_files(files: list[Path], name: str | None = None, tags: str = "") -> list[Entry]:
    """Keep memory files in the store, as they are.

    Parameters
    ----------
    files
        Memory files.
    name
        Name, for one file.
    tags
        Tags of each, as a,b.
    """
    if name is not None and len(files) > 1:
        raise GradmemError(f"one name for {len(files)} memories: import them one by one, or give tags")
    from ..memory import read_bytes

    with Store() as store:
        return [_said(store.put(read_bytes(file), name=name, tags=tags), "kept") for file in files]


def rename(ref: str, name: str | None = None) -> Entry:
    """Give a memory another name, or none.

    Parameters
    ----------
    ref
        Id or name.
    name
        New name; without one the memory has none.
    """
    with _store() as store:
        return _said(store.rename(ref, name), "renamed")


def tag(ref: str, tags: str) -> Entry:
    """Give a memory these tags in place of those it has.

    Parameters
    ----------
    ref
        Id or name.
    tags
        Tags, as a,b.
    """
    with _store() as store:
        return _said(store.tag(ref, tags), "tagged")


def pin(ref: str, off: bool = False) -> Entry:
    """Keep a memory from being deleted.

    Parameters
    ----------
    ref
        Id or name.
    off
        No longer keep it from that.
    """
    with _store() as store:
        return _said(store.pin(ref, not off), "unpinned" if off else "pinned")


def append(
    ref: str,
    file: Path,
    checkpoint: str | None = None,
    before: Path | None = None,
    may_forget: bool = False,
    steps: int | None = None,
    device: str = "auto",
) -> Entry:
    """Write more text into a memory, as its next version, and show what became of the text before.

    Parameters
    ----------
    ref
        Id or name.
    file
        Text to append; - for standard input.
    checkpoint
        The model that wrote the memory; not needed where that is a checkpoint of the package.
    before
        The text that was written before: measures what is still kept of it. The memory itself holds no text.
    may_forget
        Append also with a checkpoint that was never trained to, which forgets most of what was written before.
    steps
        Write steps; default: as many as the checkpoint was trained for.
    device
        Device to run on: auto for the accelerator where there is one; or cpu, cuda, cuda:1.
    """
    more = read_text(file)
    given: dict[str, Any] = {} if before is None else {"before": read_text(before)}
    with _store() as store:
        found = store.get(ref)  # by its id from here on: the name may move
        last = found.current.number
        model = store.open(found.id, last, checkpoint).model
        assert model is not None  # open binds
        model.to(device_named(device))
        entry = store.append(found.id, more, model, steps=steps, may_forget=may_forget, progress=progress_bar, **given)
        changes = store.diff(entry.id, last, entry.current.number)
    console.print(diff_table(changes))
    return _said(entry, "appended to")


def rollback(ref: str, version: int) -> Entry:
    """Make another version of a memory the current one; none is deleted.

    Parameters
    ----------
    ref
        Id or name.
    version
        Number of the version.
    """
    with _store() as store:
        return _said(store.rollback(ref, version), "rolled back")


def diff(ref: str, a: int, b: int, json: bool = False) -> Diff:
    """Show what became of one version's tokens in another.

    Parameters
    ----------
    ref
        Id or name.
    a, b
        Numbers of the versions.
    json
        Print it as JSON.
    """
    with _store() as store:
        found = store.diff(ref, a, b)
    if json:
        print(dumps(found.to_dict()))
    else:
        console.print(diff_table(found))
    return found


def _said(entry: Entry, what: str) -> Entry:
    name = f"{entry.name} " if entry.name else ""
    tags = f", tags {', '.join(entry.tags)}" if entry.tags else ""
    line = f"{what} {name}({entry.id}), version {entry.current.number}{tags}"
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
}
