"""The measurement of Focus: its searches have one answer each, and an agent with bad notes does not find it."""

from __future__ import annotations

import re

import pytest
from benchmarks.experiments.focus import Texts, run
from benchmarks.experiments.log_search import ScriptedAgent, Search

from gradmem.agents.pruned import Message


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("seed", range(5))
def test_the_clues_lead_to_the_answer(seed: int) -> None:
    search = Search.draw(seed, pages=2)
    logs = "\n".join(line for lines in search.logs.values() for line in lines)
    request = re.findall(r"Request (\w+)", search.question)[0]
    while found := re.findall(rf"handed request {request} to \w+ as (\w+)", logs):
        (request,) = found
    (deploy,) = re.findall(rf"failed request {request} because of deploy (\w+)", logs)
    assert re.findall(rf"deploy {deploy} was rolled out by (.+)", logs) == [search.answer]


@pytest.mark.parametrize("seed", range(3))
def test_the_peak_is_lower_with_focus(seed: int) -> None:
    search, pruned = Search.draw(seed, pages=3), Texts(words)
    without, focused = run(search, Texts(words), focuses=False), run(search, pruned, focuses=True)
    assert without["right"]
    assert focused["right"]
    assert focused["peak"] < without["peak"]
    assert focused["calls"] == without["calls"] + 2 * len(search.logs)
    # Two details of each step of the way are in what was pruned, and in no learnings.
    for hop, text in zip(search.hops, pruned.texts, strict=False):
        for _, detail in hop.details:
            assert detail in text
            assert detail not in re.findall('"learnings": "(.*)"', text)[0]


class Careless(ScriptedAgent):
    """Writes down nothing of use."""

    def reply(self, messages: list[Message]) -> Message:
        reply = super().reply(messages)
        for call in reply.get("tool_calls", ()):
            if call["function"]["name"] == "complete_focus":
                call["function"]["arguments"] = '{"learnings": "I have seen it."}'
        return reply


def test_an_agent_without_notes_goes_round_in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.experiments.focus.ScriptedAgent", Careless)
    with pytest.raises(RuntimeError, match="round in circles"):
        run(Search.draw(0, pages=1), Texts(words), focuses=True)
