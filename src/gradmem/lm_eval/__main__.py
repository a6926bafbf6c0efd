"""The command `lm_eval` with the model `gradmem`."""

from __future__ import annotations

import sys

from ..errors import GradmemError


def main() -> int:
    """Run the command line of lm-evaluation-harness. Return 2 after a one-line error message of this package."""
    try:
        from .model import cli_evaluate  # this registers the model

        cli_evaluate()
    except GradmemError as error:
        sys.stderr.write(f"gradmem: error: {error}\n")
        return 2
    return 0


sys.exit(main())
