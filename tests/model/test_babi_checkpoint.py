"""The packaged bAbI checkpoint: it answers, and abstains."""

from __future__ import annotations

import pytest

import gradmem
from babi_solver import OFFICIAL
from gradmem import GradmemError
from gradmem.evaluation import evaluate
from helpers import needs


def test_the_packaged_checkpoint_answers_what_people_type() -> None:
    memory = gradmem.load("babi").write(
        "Mary went to the garden. JOHN moved to the office!\nmary travelled to the kitchen"
    )
    assert memory.ask(["Where is Mary?", "where is john"]) == ["kitchen", "office"]
    with pytest.raises(GradmemError, match="tower"):
        memory.ask("Where is the tower?")


def test_the_packaged_checkpoint_abstains() -> None:
    """From people and things that the story does not name, and hardly ever from what it tells."""
    memory = gradmem.load("babi").write(
        "Mary went to the garden. John moved to the office. Mary travelled to the kitchen."
    )
    sure = memory.answer(["Where is Mary?", "Where is John?"])
    assert [(one.text, one.abstained) for one in sure] == [("kitchen", False), ("office", False)]
    strange = ["Where is Jeff?", "Where is Sandra?", "Where is Antoine?", "Where is the milk?", "Who gave the milk?"]
    strange += [
        "What did Fred give to Jeff?",
        "Where was the apple before the kitchen?",
        "What is north of the kitchen?",
    ]
    assert all(one.abstained for one in memory.answer(strange))
    assert (memory.receipts[0].answers, memory.receipts[0].at_risk) == ([0.0, 0.0], [])
    # Where it answers wrong, it does not know either: what was dropped stays when its holder goes on.
    moved = "Mary went to the garden. Mary grabbed the milk. Mary dropped the milk. Mary went to the kitchen."
    where, milk, apple = (
        gradmem.load("babi").write(moved).answer(["Where is Mary?", "Where is the milk?", "Where is the apple?"])
    )
    assert (where.text, where.abstained) == ("kitchen", False)
    assert milk.text == "garden" or milk.abstained
    assert apple.abstained


@needs("babi_v1.1_en")
@pytest.mark.parametrize(("name", "least"), [("qa1", 0.9), ("qa4", 0.7)])
def test_the_packaged_checkpoint_answers_official_stories(name: str, least: float) -> None:
    (result,) = evaluate(gradmem.load("babi"), samples=60, task={"data": str(OFFICIAL), "tasks": name})
    assert result.exact_match >= least
    assert max(result.unwritten, result.swapped) < 0.5
