"""Longer texts for the board: neighbouring sections of one tale, joined.

`python -m benchmarks.board.join QA/fairytaleqa/fairytaleqa-val.jsonl long.jsonl --words 700`, then
`gradmem board MODEL --data long.jsonl --max_words 1000 --questions 8`. Sections are lines whose `id` is alike before
its `#`. Questions come in turn, one of each section, so that the first ones ask all parts of the text.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

Section = dict[str, Any]


def joined(sections: list[Section], words: int) -> list[Section]:
    """Join the sections of one tale to texts of at least so many words; what is left at the end is left out."""
    found: list[Section] = []
    part: list[Section] = []
    for section in sections:
        part.append(section)
        if sum(len(one["context"].split()) for one in part) >= words:
            turns = zip_longest(*(one["qas"] for one in part))
            asked = [one for one in chain.from_iterable(turns) if one]
            found.append({"id": part[0]["id"], "context": "\n\n".join(one["context"] for one in part), "qas": asked})
            part = []
    return found


def main() -> None:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("sections", type=Path, help="JSON lines with `id`, `context` and `qas`")
    command.add_argument("out", type=Path, help="where to save the joined texts")
    command.add_argument("--words", type=int, default=700, help="least words of a text")
    options = command.parse_args()
    rows = [json.loads(line) for line in options.sections.read_text(encoding="utf-8").splitlines()]
    tales = (list(tale) for _, tale in groupby(rows, key=lambda row: row["id"].split("#")[0]))
    texts = [text for tale in tales for text in joined(tale, options.words)]
    options.out.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} texts of {options.words} words and more: {options.out}")


if __name__ == "__main__":
    main()
