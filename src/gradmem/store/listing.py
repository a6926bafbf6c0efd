"""What a listing shows, as a query that reads one range of one index."""

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
"""Most tags of one memory, and of one filter."""
COUNTED = 1000
"""A tag of so many memories is as good as any other to go through."""
_FINGERPRINT = re.compile("[0-9a-f]{64}")


class Filters(TypedDict, total=False):
    """What a listing shows; each filter narrows it further."""

    checkpoint: str | None
    """Name or fingerprint of the checkpoint that wrote the memory."""
    name: str | None
    """Name, or its beginning and a *."""
    tags: str | Sequence[str]
    """Tags that it must have, all of them; on the command line as a,b."""
    since: datetime | None
    """Date or time of the earliest creation, ISO 8601; UTC where it has no zone."""
    until: datetime | None
    """Date or time before which it was created."""


def matching(connection: Connection, owner: str, filters: Filters, after: str | None = None) -> Select[tuple[str]]:
    """Ids of an owner's memories that match all filters, the newest first.

    Tags carry owner and time themselves, so that each filter alone is a range of an index in the order of the listing.
    Of several tags the rarest is that range, and the others are looked up.

    Parameters
    ----------
    connection : Connection
        Counts the tags.
    owner : str
    filters : Filters
    after : str, optional
        `Entry.cursor` of the memory after which the listing goes on.
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
    about = list(_about(filters))
    query = select(which)
    if about and wanted:
        # The id alone would do; with all three, SQLite looks it up in the index of what is filtered.
        same = (memories.c.owner == table.c.owner, memories.c.created == table.c.created, memories.c.id == which)
        query = query.join(memories, and_(*same))
    return query.where(*conditions, *about).order_by(table.c.created.desc(), which.desc())


def _rarest_first(connection: Connection, owner: str, wanted: list[str]) -> list[str]:
    """Tags by the number of memories that have them, as far as it matters."""

    def count(tag: str) -> int:
        some = select(tags.c.tag).where(tags.c.owner == owner, tags.c.tag == tag).limit(COUNTED).subquery()
        return connection.scalar(select(func.count()).select_from(some)) or 0

    return sorted(wanted, key=count) if len(wanted) > 1 else wanted


def _about(filters: Filters) -> Iterator[ColumnElement[bool]]:
    """Conditions on the memories themselves."""
    for what in ("checkpoint", "name"):
        value = filters.get(what)
        require(f"the filter {what}", value, value is None or str(value).isprintable(), "printable")
    if (checkpoint := filters.get("checkpoint")) is not None:
        columns = memories.c
        yield (columns.checkpoint if _FINGERPRINT.fullmatch(checkpoint) else columns.model) == checkpoint
    if (name := filters.get("name")) is not None:
        if name.endswith("*"):
            # A range of the index, which LIKE is not.
            yield and_(memories.c.name >= name[:-1], memories.c.name < name[:-1] + chr(0x10FFFF))
        else:
            yield memories.c.name == name


def _time(filters: Filters, which: Literal["since", "until"]) -> datetime | None:
    """A time to compare with those of creation."""
    given = filters.get(which)
    try:
        return None if given is None else utc(given)
    except OverflowError as error:  # the first and the last day, seen from UTC
        raise GradmemError(f"the filter {which} must be a time from year 1 to 9999 in UTC") from error


def labels(tags: str | Iterable[str]) -> list[str]:
    """Tags, each once and in order; of a string, those between its commas."""
    given = (tags.split(",") if tags else []) if isinstance(tags, str) else tags
    found = sorted({tag.strip() for tag in given})
    require("the number of tags", len(found), len(found) <= TAGS, f"at most {TAGS}")
    for tag in found:
        good = 0 < len(tag) <= 100 and tag.isprintable() and "," not in tag
        require("a tag", tag, good, "printable, up to 100 characters, without commas")
    return found


def _parse_cursor(cursor: str) -> tuple[datetime, str]:
    created, _, last = cursor.partition("_")
    try:
        if not last.isprintable():
            raise ValueError(last)
        return utc(datetime.strptime(created, CURSOR)), last
    except ValueError as error:
        raise GradmemError(f"{cursor!a} is no cursor: take that of the last memory of the page before") from error
