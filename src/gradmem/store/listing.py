"""Queries that list memories. Each reads one range of one index."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal, TypedDict

from sqlalchemy import ColumnElement, Connection, Select, and_, func, literal, select, tuple_

from ..errors import GradmemError, require
from .database import Moment, memories, tags, utc
from .entries import CURSOR

TAGS = 100
"""Most tags of a memory, and of a filter."""
COUNTED = 1000
"""Memories of a tag are counted up to this number, to find the rarest tag of a filter."""
_FINGERPRINT = re.compile("[0-9a-f]{64}")


class Filters(TypedDict, total=False):
    """Filters of a listing. A memory must match all of them."""

    checkpoint: str | None
    """Name or fingerprint of the checkpoint that wrote the memory."""
    name: str | None
    """Name, or the beginning of a name followed by *."""
    tags: str | Sequence[str]
    """Tags that the memory must have, on the command line separated by commas."""
    since: datetime | None
    """Earliest date or time of creation, in ISO 8601; UTC if it has no time zone."""
    until: datetime | None
    """Date or time before which the memory was created."""


def matching(connection: Connection, owner: str, filters: Filters, after: str | None = None) -> Select[tuple[str]]:
    """Build the query for the ids of an owner's memories that match all filters, the newest first.

    Rows of tags hold owner and time too, so that each filter is a range of an index in the order of the listing. If
    there are several tags, the query reads the range of the rarest, and looks up the others.

    Parameters
    ----------
    connection : Connection
        Used to count the tags.
    owner : str
    filters : Filters
    after : str, optional
        `Entry.cursor` of the last memory of the previous page.
    """
    wanted = _rarest_first(connection, owner, labels(filters.get("tags", ())))
    table, which = (tags, tags.c.memory) if wanted else (memories, memories.c.id)
    conditions = [table.c.owner == owner, *(tags.c.tag == tag for tag in wanted[:1])]
    for tag in wanted[1:]:
        other = tags.alias()
        conditions.append(select(other.c.tag).where(other.c.memory == which, other.c.tag == tag).exists())
    if (since := _time(filters, "since")) is not None:
        conditions.append(table.c.created >= since)
    if (until := _time(filters, "until")) is not None:
        conditions.append(table.c.created < until)
    if after is not None:
        created, last = _parse_cursor(after)
        conditions.append(tuple_(table.c.created, which) < tuple_(literal(created, Moment), literal(last)))
    more = list(_conditions(filters))
    query = select(which)
    if more and wanted:
        # The id alone would suffice. With all three columns, SQLite uses the index of the filter.
        same = (memories.c.owner == table.c.owner, memories.c.created == table.c.created, memories.c.id == which)
        query = query.join(memories, and_(*same))
    return query.where(*conditions, *more).order_by(table.c.created.desc(), which.desc())


def _rarest_first(connection: Connection, owner: str, wanted: list[str]) -> list[str]:
    """Sort tags by the number of their memories, counted up to `COUNTED`."""

    def count(tag: str) -> int:
        some = select(tags.c.tag).where(tags.c.owner == owner, tags.c.tag == tag).limit(COUNTED).subquery()
        return connection.scalar(select(func.count()).select_from(some)) or 0

    return sorted(wanted, key=count) if len(wanted) > 1 else wanted


def _conditions(filters: Filters) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions on names and checkpoints."""
    for filter in ("checkpoint", "name"):
        value = filters.get(filter)
        require(f"the filter {filter}", value, value is None or str(value).isprintable(), "printable")
    if (checkpoint := filters.get("checkpoint")) is not None:
        columns = memories.c
        yield (columns.checkpoint if _FINGERPRINT.fullmatch(checkpoint) else columns.model) == checkpoint
    if (name := filters.get("name")) is not None:
        if name.endswith("*"):
            # Unlike LIKE, this is a range of the index.
            yield and_(memories.c.name >= name[:-1], memories.c.name < name[:-1] + chr(0x10FFFF))
        else:
            yield memories.c.name == name


def _time(filters: Filters, which: Literal["since", "until"]) -> datetime | None:
    """Return a filter's time in UTC."""
    given = filters.get(which)
    try:
        return None if given is None else utc(given)
    except OverflowError as error:  # a time in year 1 or 9999 may be outside these years in UTC
        raise GradmemError(f"the filter {which} must be a time from year 1 to 9999 in UTC") from error


def labels(tags: str | Iterable[str]) -> list[str]:
    """Return tags sorted and without duplicates. A string is split at its commas."""
    given = (tags.split(",") if tags else []) if isinstance(tags, str) else tags
    found = sorted({tag.strip() for tag in given})
    require("the number of tags", len(found), len(found) <= TAGS, f"at most {TAGS}")
    for tag in found:
        valid = 0 < len(tag) <= 100 and tag.isprintable() and "," not in tag
        require("a tag", tag, valid, "printable, up to 100 characters, without commas")
    return found


def _parse_cursor(cursor: str) -> tuple[datetime, str]:
    created, _, last = cursor.partition("_")
    try:
        if not last.isprintable():
            raise ValueError(last)
        return utc(datetime.strptime(created, CURSOR)), last
    except ValueError as error:
        raise GradmemError(f"{cursor!a} is not a cursor: use that of the last memory of the previous page") from error
