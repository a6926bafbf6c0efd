"""What the package holds besides code."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("gradmem"))) / "checkpoints"
"""Where the checkpoints in the package are."""


def checkpoint_names() -> list[str]:
    """Names of the checkpoints in the package."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").is_file())
