"""Choices by name that signatures share, apart from what computes: the command line offers them without PyTorch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "float16", "int8"]
"""Precision of the numbers in a memory file."""
Split = Literal["train", "valid", "test"]
"""Part of a data set."""
