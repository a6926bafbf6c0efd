"""Every causal language model that transformers knows: right, or refused with one line; and the page that says which.

`GRADMEM_WRITE_TABLE=1` writes the page, docs/reference/models.md, from what the tests found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import transformers

from families import FAMILIES, NOT_TRIED, check, made
from gradmem import GradmemError
from gradmem.methods import GradMem

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
FOUND: dict[str, tuple[str, str]] = {}
"""Of each family: whether it is accepted, and a note."""
HEAD = """# Models that can serve as a backbone

A model is accepted when READ computes what the model itself computes in one pass over [memory; query; answer]: alone,
in a batch of other lengths, after joined prefixes, generated and streamed. This is tried on a few vectors whenever a
backbone is built. A model that computes something else is refused with one line.

- **One length at a time**: attention windows count positions, and some models count positions for themselves. Pads
  between memory and query would change their answers. Queries of one length are answered together, one length after
  the other.
- **Scaled or capped logits** are computed as the model computes them.
- With rotary angles that change with the length of the input (`dynamic`, `longrope`), inputs end where the angles
  would change.

`full_context` takes a `sliding_window` of a plain size: a context and its query then end where the window would hide
something. It refuses other windows, and `armt` refuses all.

The table is of transformers {version}. `GRADMEM_WRITE_TABLE=1 make test-system ARGS="-k families"` tries every family
with random weights and a small size, and writes this page. A family that is not tried is not refused for that: what
it computes decides.

{accepted} of {all} families are accepted.

| family (`model_type`) | accepted | |
|---|---|---|
"""


def note(method: GradMem) -> str:
    """What is particular about an accepted family."""
    backbone, notes = method.backbone, list[str]()
    if backbone.windows:
        notes.append(f"one length at a time (`{backbone.windows[0]}`)")
    elif not backbone.batches_uneven:
        notes.append("one length at a time (counts positions for itself)")
    head = backbone.head
    notes += [f"logits {what}" for what in ("scaled", "capped") if _does(head, what)]
    return ", ".join(notes)


def _does(head: object, what: str) -> bool:
    return getattr(head, "scale", 1) != 1 if what == "scaled" else getattr(head, "cap", None) is not None


def reason(error: GradmemError) -> str:
    """The message without what it says of every model."""
    text = re.sub(r"^'\S+' cannot serve as a backbone: ", "", str(error))
    text = re.sub(r"^this method reads through.* has layers", "it has layers", text).split(": take")[0]
    return text.replace("|", "\\|") if len(text) <= 110 else text[:107].rsplit(" ", 1)[0] + " ..."


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in NOT_TRIED])
def test_right_or_refused(kind: str) -> None:
    try:
        method = made(kind)
    except GradmemError as error:
        FOUND[kind] = "no", reason(error)
    else:
        check(method)
        FOUND[kind] = "yes", note(method)
    assert "\n" not in FOUND[kind][1]


def test_the_page_is_up_to_date() -> None:
    found = FOUND | {kind: ("not tried", why) for kind, why in NOT_TRIED.items()}
    if missing := set(FAMILIES) - set(found):
        pytest.skip(f"{len(missing)} families were not run, or failed")
    accepted = sum(answer == "yes" for answer, _ in found.values())
    head = HEAD.format(version=transformers.__version__, accepted=accepted, all=len(found))
    page = head + "".join(f"| `{kind}` | {found[kind][0]} | {found[kind][1]} |\n" for kind in sorted(found))
    if os.environ.get("GRADMEM_WRITE_TABLE"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.is_file(), "write it with GRADMEM_WRITE_TABLE=1"
    assert PAGE.read_text(encoding="utf-8") == page, "write it anew with GRADMEM_WRITE_TABLE=1"


def test_no_family_is_left_out_for_nothing() -> None:
    assert set(NOT_TRIED) <= set(FAMILIES)
