"""Queries that list memories. With one filter, each reads one range of one index."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal, TypedDict

from sqlalchemy import ColumnElement, Connection, Select, and_, func, literal, select, text, tuple_
from sqlalchemy.exc import OperationalError

from ..errors import GradmemError, require
from .database import Moment, memories, tags, utc
from .entries import CURSOR

TAGS = 100
"""Most tags of a memory, and of a filter."""
FEW = 20_000
"""Most memories of a filter that may all be looked at: the filters are counted up to this number."""
SECONDS = 10.0
"""Most seconds of a query for a page. Only several filters that many memories match, but few match together, take more
than a fraction of one."""
STEPS = 10_000
"""How many steps SQLite takes before it looks at the clock again."""
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


def matching(connection: Connection, owner: str, filters: Filters, after: str | None = None) -> Select[Any]:
    """Build the query for the ids of an owner's memories that match all filters.

    They come in the order of an index, so that a page reads no more than it shows: by name if the filter is the
    beginning of a name, otherwise the newest first. Rows of tags hold owner and time too, for the same reason. Of
    several filters, the other ones are looked up for each memory that one lets through: for those of a filter that few
    memories match if there is one, otherwise for as many as it takes to fill the page.

    Parameters
    ----------
    connection : Connection
        Used to look for a filter that few memories match.
    owner : str
    filters : Filters
    after : str, optional
        `Entry.cursor` of the last memory of the previous page.
    """
    wanted, named = labels(filters.get("tags", ())), dict(_conditions(filters))
    by_name = (filters.get("name") or "").endswith("*")
    few, rarest = _rarest(connection, owner, wanted, named)
    through_tags = bool(wanted) and not by_name and (few is None or rarest is not None)
    table, which = (tags, tags.c.memory) if through_tags else (memories, memories.c.id)
    conditions = [table.c.owner == owner]
    if through_tags:
        first = rarest or wanted[0]
        wanted.remove(first)
        conditions.append(tags.c.tag == first)
    elif few is not None:
        conditions.append(which.in_(few))
    # What is looked up for each memory is counted: PostgreSQL would join, and plan that as if almost nothing matched.
    if wanted:
        other = tags.alias()
        has = select(func.count()).where(other.c.memory == which, other.c.tag.in_(wanted)).scalar_subquery()
        conditions.append(has == len(wanted))
    if (since := _time(filters, "since")) is not None:
        conditions.append(table.c.created >= since)
    if (until := _time(filters, "until")) is not None:
        conditions.append(table.c.created < until)
    if after is not None:
        created, last, name = _parse_cursor(after)
        if by_name:
            require("the cursor", after, bool(name), "that of a memory with a name")
            named["name"] = _begins(filters["name"] or "", name)
        else:
            conditions.append(tuple_(table.c.created, which) < tuple_(literal(created, Moment), literal(last)))
    if named and through_tags:
        # The id alone would suffice. With all three columns, the index of the filter is used.
        same = (memories.c.owner == table.c.owner, memories.c.created == table.c.created, memories.c.id == which)
        conditions.append(select(func.count()).where(*same, *named.values()).scalar_subquery() == 1)
    elif named:
        conditions += named.values()
    order = [memories.c.name] if by_name else [table.c.created.desc(), which.desc()]
    return select(which).where(*conditions).order_by(*order)


@contextmanager
def bounded(connection: Connection) -> Iterator[None]:
    """Stop the queries of the block that take too long. They are those of a transaction that reads.

    Raises
    ------
    GradmemError
        If one did.
    """
    raw: Any = None
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL statement_timeout = {1000 * SECONDS:.0f}"))
    else:
        raw, until = connection.connection.driver_connection, time.monotonic() + SECONDS
        raw.set_progress_handler(lambda: time.monotonic() > until, STEPS)
    try:
        yield
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != "57014" and str(error.orig) != "interrupted":
            raise
        raise GradmemError(
            f"looking for memories that match all filters took more than {SECONDS:g} s: many match each, and few match "
            "all; narrow them down by since and until, or give such memories a tag of their own"
        ) from error
    finally:
        if raw is not None:
            raw.set_progress_handler(None, 0)


def _rarest(
    connection: Connection, owner: str, wanted: list[str], named: dict[str, ColumnElement[bool]]
) -> tuple[Select[Any] | None, str | None]:
    """Find out which of several filters the fewest memories match, counted up to `FEW`.

    Returns
    -------
    few : Select or None
        The ids of these memories. None if they are more.
    tag : str or None
        The filter, if it is a tag.
    """
    ranges: list[tuple[str | None, Select[Any], Any]] = []
    for tag in wanted:
        ranges.append((tag, select(tags.c.memory).where(tags.c.owner == owner, tags.c.tag == tag), tags.c.created))
    for filter, condition in named.items():
        order = memories.c.name if filter == "name" else memories.c.created
        ranges.append((None, select(memories.c.id).where(memories.c.owner == owner, condition), order))
    if len(ranges) < 2:
        return None, None

    def count(one: tuple[str | None, Select[Any], Any]) -> int:
        _, query, order = one  # in the order of the index, or PostgreSQL might read the table instead
        return connection.scalar(select(func.count()).select_from(query.order_by(order).limit(FEW + 1).subquery())) or 0

    counted = [(count(one), one) for one in ranges]
    number, (rarest, few, _) = min(counted, key=lambda pair: pair[0])
    return (few, rarest) if number <= FEW else (None, None)


def _begins(beginning: str, after: str = "") -> ColumnElement[bool]:
    """Condition: the name begins as the filter says, and comes after another name.

    Unlike LIKE, this is a range of the index. Of two lower bounds SQLite would use only the first.
    """
    first, name = beginning[:-1], memories.c.name
    return and_(name > after if after >= first and after else name >= first, name < first + chr(0x10FFFF))


def _conditions(filters: Filters) -> Iterator[tuple[str, ColumnElement[bool]]]:
    """Yield the filters of names and checkpoints, and their conditions."""
    for filter in ("checkpoint", "name"):
        value = filters.get(filter)
        require(f"the filter {filter}", value, value is None or str(value).isprintable(), "printable")
    if (checkpoint := filters.get("checkpoint")) is not None:
        columns = memories.c
        yield "checkpoint", (columns.checkpoint if _FINGERPRINT.fullmatch(checkpoint) else columns.model) == checkpoint
    if (name := filters.get("name")) is not None:
        if name.endswith("*"):
            yield "name", _begins(name)
        else:
            yield "name", memories.c.name == name


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


def _parse_cursor(cursor: str) -> tuple[datetime, str, str]:
    created, last, name = (*cursor.split("_", 2), "", "")[:3]
    try:
        if not (last + name).isprintable():
            raise ValueError(cursor)
        return utc(datetime.strptime(created, CURSOR)), last, name
    except ValueError as error:
        raise GradmemError(f"{cursor!a} is not a cursor: use that of the last memory of the previous page") from error
