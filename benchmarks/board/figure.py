"""Draw the figure of the board with rows of other programs, which measured the same questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gradmem.evaluation.board_figure import board_figure


def main() -> None:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("rows", type=Path, nargs="+", help="rows of `gradmem board --json`, then those of others")
    command.add_argument("-o", "--output", type=Path, default=Path("board.png"), help="the figure")
    options = command.parse_args()
    rows = [row for file in options.rows for row in json.loads(file.read_text(encoding="utf-8"))]
    asked = {(row["data"], row["seed"], row["questions"]) for row in rows}
    if len(asked) > 1:
        command.error(f"these rows are of different questions: {sorted(asked)}")
    first = rows[0]
    about = f"{first['questions']} questions on {first['contexts']} texts, {first['data']}, seed {first['seed']}"
    file = board_figure(rows, options.output, f"{first['model']}: {about}")
    print(f"saved {file}")


if __name__ == "__main__":
    main()
