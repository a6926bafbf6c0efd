"""Types of options with a few named choices. The command line reads them without loading PyTorch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "float16", "int8"]
"""Precision of the numbers in a memory file."""
Split = Literal["train", "valid", "test"]
"""Part of a data set."""
