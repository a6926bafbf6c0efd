"""Study."""

from typing import Any


def study(entries: Any, text: Any, backbone: Any, prefix: Any) -> Any:
    return entries
