"""Text that is safe to print: names, paths and messages may have characters that control a terminal."""

from __future__ import annotations

import re
from typing import TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, marks that change the direction of text, and lone surrogates."""


def visible(text: str) -> str:
    """Replace each character that would control a terminal by a visible sign, one column wide."""
    return _CONTROL.sub(_sign, text)


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 32 else "\N{REPLACEMENT CHARACTER}"  # ESC becomes the sign for ESC


def shown_on(stream: TextIO, text: str) -> str:
    """Return the text as it is for a file or a program, and as `visible` for a terminal."""
    return visible(text) if stream.isatty() else text
