"""Text of others as a terminal may show it: names, paths and messages may hold what a terminal obeys."""

from __future__ import annotations

import re
from typing import TextIO

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line end, marks that turn the direction of writing, and halves of characters."""


def visible(text: str) -> str:
    """The text with a sign, one column wide, in place of each character that a terminal would obey and not show."""
    return _OBEYED.sub(_sign, text)


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}"  # ESC becomes the one sign "ESC"


def shown_on(stream: TextIO, text: str) -> str:
    """What to print of a text: all of it as it is to a file or a program, and what is `visible` to a terminal."""
    return visible(text) if stream.isatty() else text
