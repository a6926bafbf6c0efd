"""Whether more tokens only add to a decoded text, so that it can be shown while it is generated."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of a single byte, which is decoded together with the bytes after it."""
_ONE_BY_ONE = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")


def only_grows(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding concatenates the texts of tokens and changes none. False for unknown decoders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    return backend.decoder is None or _one_by_one(json.loads(backend.decoder.__getstate__()))


def without_last_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Remove single bytes at the end, which may be incomplete characters."""
    end = len(ids)
    while end and _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(ids[end - 1]))):
        end -= 1
    return ids[:end]


def _one_by_one(decoder: dict[str, Any]) -> bool:
    kind = decoder["type"]
    if kind == "Sequence":
        return all(map(_one_by_one, decoder["decoders"]))
    if kind == "Replace":
        return len(decoder["pattern"].get("String", "  ")) == 1
    if kind == "Strip":
        return decoder["stop"] == 0
    return kind in _ONE_BY_ONE
