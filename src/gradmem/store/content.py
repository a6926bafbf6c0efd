"""The hash by which a store finds a memory that would be written again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..choices import Precision
from ..receipts import text_digest

if TYPE_CHECKING:
    from ..model import MemoryModel


def content_hash(
    model: MemoryModel,
    texts: Sequence[str],
    steps: int | None = None,
    until: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "float32",
    questions: Sequence[str] = (),
) -> str:
    """Hash the texts, the checkpoint and the options with which `Store.write` would write them."""
    # The fingerprint of the checkpoint covers the method and the options that it was trained with.
    settings = [model.overrides, model.most_steps(steps, until, max_steps), until, precision]
    content = [model.fingerprints["checkpoint"], [text_digest(text) for text in texts], *settings]
    content += [list(questions)] if questions else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
