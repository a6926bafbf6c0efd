"""Tables of stored memories, their versions, and differences between versions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from ..store.entries import Diff, Entry, Version


def entries_table(entries: Sequence[Entry]) -> Table:
    """Build a table of the memories of one page."""
    built = Table(pad_edge=False)
    built.add_column("name or id", overflow="fold")
    for heading in ("tags", "checkpoint"):
        built.add_column(heading, overflow="fold")
    built.add_column("created (UTC)", no_wrap=True)
    for heading in ("tokens kept", "bytes"):
        built.add_column(heading, justify="right")
    for entry in entries:
        current = entry.current
        built.add_row(
            Text(entry.label + (" (pinned)" if entry.pinned else "")),
            Text(", ".join(entry.tags)),
            Text(entry.model),
            _time(entry.created),
            _kept(current),
            str(current.size),
        )
    return built


def entry_table(entry: Entry) -> Table:
    """Build a table of the entry of a memory, without its versions."""
    built = Table(title=Text(entry.label), show_header=False)
    rows = {
        "id": entry.id,
        "name": entry.name or "none",
        "tags": ", ".join(entry.tags) or "none",
        "pinned": "yes" if entry.pinned else "no",
        "written by": f"{entry.method}, checkpoint '{entry.model}'",
        "checkpoint": entry.checkpoint,
        "created": f"{_time(entry.created)} UTC",
        "updated": f"{_time(entry.updated)} UTC",
        "SHA-256": entry.current.sha256,
    }
    for name, value in rows.items():
        built.add_row(name, Text(value, overflow="fold"))
    return built


def versions_table(versions: Sequence[Version], current: int) -> Table:
    """Build a table of the versions of a memory, with the sums of their receipts."""
    built = Table(title="versions", pad_edge=False)
    for heading in ("version", "written (UTC)", "tokens kept", "answers at risk", "write loss", "precision", "bytes"):
        right = heading in ("tokens kept", "answers at risk", "bytes")
        built.add_column(heading, justify="right" if right else "left")
    for version in versions:
        built.add_row(
            f"{version.number}, current" if version.number == current else str(version.number),
            _time(version.created),
            _kept(version),
            _at_risk(version),
            f"{version.loss_before:.3f} to {version.loss_after:.3f}",
            version.precision,
            str(version.size),
        )
    return built


def diff_table(diff: Diff) -> Table:
    """Build a table of the tokens that one version keeps and another does not."""
    a, b = diff.before, diff.after
    built = Table(title=f"version {a.number} to version {b.number}", show_header=False)
    built.add_row("tokens kept", f"{_kept(a)}, then {_kept(b)}")
    built.add_row("answers at risk", f"{_at_risk(a)}, then {_at_risk(b)}")
    built.add_row(
        "write loss", f"{a.loss_before:.4f} to {a.loss_after:.4f}, then {b.loss_before:.4f} to {b.loss_after:.4f}"
    )
    built.add_row("tokens added", str(diff.added))
    for heading, positions in (("kept, then lost", diff.lost), ("lost, then kept", diff.regained)):
        built.add_row(heading, _positions(positions, max(a.rows, b.rows), diff.unmeasured))
    return built


def _kept(version: Version) -> str:
    """Return the number of tokens kept, out of those measured."""
    measured = version.tokens - version.unmeasured
    rest = f" ({version.unmeasured} not measured)" if version.unmeasured else ""
    return f"{version.kept}/{measured}{rest}" if measured else "not measured"


def _at_risk(version: Version) -> str:
    if version.answers is None or version.at_risk is None:
        return "not measured"
    return f"{version.at_risk}/{version.answers}" if version.answers else "none known"


def _positions(positions: Sequence[tuple[int, int]], rows: int, unmeasured: int) -> str:
    """List positions, with their row if there are several, and the number of tokens that were not measured."""
    shown = [f"{row}:{position}" if rows > 1 else str(position) for row, position in positions]
    found = f"{len(shown)} at " + ", ".join(shown) if shown else "none"
    if not unmeasured:
        return found
    return f"{found if shown else 'not measured'}: {unmeasured} tokens were not measured (give the text: --before FILE)"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"
