"""Save the language model of a checkpoint or GGUF file alone, so that other programs load it as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

import gradmem


def main() -> None:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("model", help="as for `gradmem board`")
    command.add_argument("directory", type=Path, help="where to save it")
    options = command.parse_args()
    try:
        model = gradmem.load(options.model, {"name": "full_context"})
    except gradmem.GradmemError as error:
        command.error(str(error))
    model.method.backbone.model.save_pretrained(options.directory)
    model.task.tokenizer.save_pretrained(options.directory)


if __name__ == "__main__":
    main()
