"""Focus: what leaves a conversation, what stays, and that the rest is always one that OpenAI's API accepts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import gradmem
from chat_models import save_model
from gradmem import GradmemError
from gradmem.agents.focus import Focus
from gradmem.agents.pruned import Message, PrunedMessages, transcript
from gradmem.store import Store

SYSTEM: Message = {"role": "system", "content": "You search logs."}
TASK: Message = {"role": "user", "content": "Who did it?"}


class Kept(PrunedMessages):
    """Keeps messages as they are, counts words, and answers every question with the number of messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.refuses = False

    def count(self, text: str) -> int:
        return len(text.split())

    def keep(self, messages: Sequence[Message]) -> None:
        if self.refuses:
            raise GradmemError("the quota is full")
        self.messages += messages

    def ask(self, question: str) -> str:
        return f"{len(self.messages)} messages"


NUMBERS = iter(range(10**9))


def call(name: str, **arguments: Any) -> Message:
    return {
        "id": f"call-{next(NUMBERS)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


def reply(*calls: Message, content: str | None = None) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(of: Message, content: str = "ten lines of a log") -> Message:
    return {"role": "tool", "tool_call_id": of["id"], "content": content}


def start(objective: str = "find the host") -> Message:
    return call("start_focus", objective=objective)


def complete(learnings: str = "it is heron-4") -> Message:
    return call("complete_focus", learnings=learnings)


def grep(pattern: str = "error") -> Message:
    return call("grep", pattern=pattern)


def answered(focus: Focus, *calls: Message) -> None:
    """Add a reply with these calls, and a result of each that is left to the caller."""
    for one in focus.add(reply(*calls)):
        focus.add(result(one))


def assert_accepted(messages: list[Message]) -> None:
    """What the API demands: results stand right behind the message with their calls, one for each."""
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in waiting
            waiting.remove(message["tool_call_id"])
        else:
            assert not waiting
            waiting = {one["id"] for one in message.get("tool_calls") or []}
    assert not waiting


def test_what_was_read_leaves_and_the_learnings_stay() -> None:
    kept = Kept()
    focus = Focus([SYSTEM, TASK], kept)
    answered(focus, grep("before"))
    before = list(focus.messages)
    answered(focus, start("find the host"))
    answered(focus, grep("inside"), grep("too"))
    raw = list(focus.messages)
    answered(focus, complete("it is heron-4"))
    assert focus.messages[1:] == before[1:]
    system = focus.messages[0]["content"]
    assert system.startswith("You search logs.\n\n# Knowledge\n")
    assert system.endswith("## find the host\nit is heron-4")
    assert kept.messages[:-1] == raw[len(before) :]
    assert kept.messages[-1]["tool_calls"][0]["function"]["name"] == "complete_focus"
    answered(focus, start("find the user"))
    answered(focus, grep())
    answered(focus, complete("it is ann"))
    assert focus.messages[0]["content"] == f"{system}\n\n## find the user\nit is ann"
    assert focus.messages[1:] == before[1:]


def test_between_the_calls_nothing_changes() -> None:
    focus = Focus([SYSTEM, TASK], Kept())
    sent = [SYSTEM, TASK]
    for calls in ([start()], [grep()], [grep(), grep()]):
        sent.append(reply(*calls))
        for one in focus.add(sent[-1]):
            sent.append(result(one))
            focus.add(sent[-1])
        if calls[0]["function"]["name"] == "start_focus":
            sent.append(focus.messages[-1])
    assert focus.messages == sent
    assert not focus.knowledge


@pytest.mark.parametrize("order", [0, 1])
def test_results_that_were_not_read_yet_stay(order: int) -> None:
    kept = Kept()
    focus = Focus([SYSTEM, TASK], kept)
    answered(focus, start())
    answered(focus, grep("old"))
    calls = [grep("new"), complete()]
    last = reply(*(calls if order else calls[::-1]))
    (left,) = focus.add(last)
    focus.add(result(left, "news"))
    assert focus.messages[2] == last
    assert "news" in [one["content"] for one in focus.messages]
    assert last not in kept.messages
    assert_accepted(focus.messages)


def test_a_focus_may_start_where_another_ends() -> None:
    kept = Kept()
    focus = Focus([SYSTEM, TASK], kept)
    answered(focus, start("one"))
    answered(focus, grep())
    answered(focus, complete("first"), start("two"))
    assert_accepted(focus.messages)
    answered(focus, grep())
    answered(focus, complete("second"))
    assert focus.messages[1:] == [TASK]
    assert focus.knowledge.endswith("## one\nfirst\n\n## two\nsecond")


def test_any_agent_leaves_a_conversation_that_the_api_accepts() -> None:
    for seed in range(60):
        draw, kept = random.Random(seed), Kept()
        focus, sent = Focus([SYSTEM, TASK], kept, nudge_after=3), 0
        for _ in range(25):
            if draw.random() < 0.1:
                focus.add({"role": "user", "content": "Go on."})
            kinds = [start, complete, grep, grep, lambda: call("ask_pruned", question="What?")]
            calls = [draw.choice(kinds)() for _ in range(draw.randint(0, 3))]
            left = focus.add(reply(*calls, content="Hm."))
            draw.shuffle(left)
            for one in left:
                focus.add(result(one, f"result {sent}"))
                sent += 1
            assert_accepted(focus.messages)
        contents = [one["content"] for one in [*focus.messages, *kept.messages] if one["role"] == "tool"]
        assert sorted(one for one in contents if one.startswith("result")) == sorted(f"result {i}" for i in range(sent))
        asked = [one["id"] for message in kept.messages for one in message.get("tool_calls") or []]
        assert {one["tool_call_id"] for one in kept.messages if one["role"] == "tool"} <= set(asked)


def test_the_agent_is_told_what_is_wrong() -> None:
    kept = Kept()
    focus = Focus([TASK], kept)

    def told(*calls: Message) -> str:
        focus.add(reply(*calls))
        return str(focus.messages[-1]["content"])

    assert "no focus is open" in told(complete())
    assert told(start("one")) == "Focus started."
    assert "is open already (one)" in told(start())
    assert "give `learnings` as a text" in told(call("complete_focus", summary="?"))
    assert "give `learnings` as a text" in told(call("complete_focus", learnings=" "))
    broken = complete()
    broken["function"]["arguments"] = "{"
    assert "no JSON" in told(broken)
    kept.refuses = True
    before = list(focus.messages)
    assert told(complete()) == "Error: the quota is full"
    assert focus.messages[: len(before)] == before
    kept.refuses = False
    answered(focus, complete("done"))
    assert focus.messages[:2] == [{"role": "system", "content": focus.knowledge}, TASK]
    assert len(focus.messages) == 4  # and the call that had no focus to complete
    focus = Focus([TASK], kept)
    assert "nothing to prune" in told(start(), complete())


def test_a_conversation_in_another_order_is_refused() -> None:
    focus = Focus([TASK], Kept())
    with pytest.raises(GradmemError, match="no tool call 'x' waits"):
        focus.add({"role": "tool", "tool_call_id": "x", "content": ""})
    (left,) = focus.add(reply(grep()))
    with pytest.raises(GradmemError, match="add the results of these tool calls first"):
        focus.add(reply(grep()))
    with pytest.raises(GradmemError, match="must be a dictionary with a role"):
        focus.add(object())  # type: ignore[arg-type]
    focus.add(result(left))
    with pytest.raises(GradmemError, match="must have an id"):
        focus.add(reply({"type": "function"}))
    with pytest.raises(GradmemError, match="nudge_after must be at least 1"):
        Focus([], Kept(), nudge_after=0)


def test_reminders() -> None:
    focus = Focus([TASK], Kept(), nudge_after=2)

    def reminders() -> list[str]:
        return [one["content"] for one in focus.messages if one["role"] == "user" and one != TASK]

    answered(focus, grep())
    assert not reminders()
    answered(focus, grep(), grep())
    assert reminders() == [
        "Reminder: 3 tool calls since you last compressed the conversation. "
        "Call `start_focus` before you go on, and `complete_focus` when you know more."
    ]
    answered(focus, start())
    answered(focus, grep())
    answered(focus, grep())
    assert "5 tool calls" in reminders()[-1]
    assert "call `complete_focus` now" in reminders()[-1]
    answered(focus, complete())
    answered(focus, grep())
    assert len(reminders()) == 1


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_parts_keeps_them(role: str) -> None:
    parts = [{"type": "text", "text": "You search logs."}]
    focus = Focus([{"role": role, "content": parts}, TASK], Kept())
    answered(focus, start())
    answered(focus, grep())
    answered(focus, complete())
    assert focus.messages[0]["content"] == [*parts, {"type": "text", "text": f"\n\n{focus.knowledge}"}]
    assert focus.messages[0]["role"] == role


def test_tokens_of_each_call() -> None:
    focus = Focus([SYSTEM, TASK], Kept())
    sizes = []

    def words(messages: list[Message]) -> int:
        return sum(len(transcript([one]).split()) for one in messages)

    for calls in ([grep()], [start()], [grep()], [complete("it is heron-4")], [grep()]):
        sizes.append(words(focus.messages))
        answered(focus, *calls)
    assert [one.kept for one in focus.readings] == sizes
    assert [one.pruned > 0 for one in focus.readings] == [False] * 4 + [True]
    last = focus.readings[-1]
    assert last.knowledge == len(focus.knowledge.split())
    assert last.pruned == words(focus.pruned.messages)


def test_a_transcript_names_the_tools() -> None:
    one = call("grep", pattern="x")
    said = transcript([TASK, reply(one, content="I look."), result(one, "a line")])
    assert said == 'user: Who did it?\nassistant: I look.\ncall of grep: {"pattern": "x"}\nresult of grep: a line'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> gradmem.MemoryModel:
    folder = save_model(tmp_path_factory.mktemp("lm"), positions=2048)
    return gradmem.load(folder, {"name": "compact", "writers": "select", "budget": 0.9})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.db") as opened:
        yield opened


def test_what_was_pruned_can_be_asked(model: gradmem.MemoryModel, store: Store) -> None:
    pruned = PrunedMessages(store, model)
    focus = Focus([SYSTEM, TASK], pruned)
    answered(focus, call("ask_pruned", question="Which host?"))
    assert focus.messages[-1]["content"] == "Error: nothing was pruned yet"
    for log in ("host a9", "host b7"):
        answered(focus, start(log))
        (left,) = focus.add(reply(grep()))
        focus.add(result(left, log))
        answered(focus, complete())
    assert [entry.tags for entry in store.list()] == [("focus",)] * 2
    answered(focus, call("ask_pruned", question="Which host?"))
    memories = [store.open(entry.id, checkpoint=model.name) for entry in pruned.entries]
    assert focus.messages[-1]["content"] == model.join(memories).ask("Which host?")


def test_a_method_that_does_not_answer_is_refused(store: Store) -> None:
    with pytest.raises(GradmemError, match="with the method compact"):
        PrunedMessages(store, gradmem.load("kv-16"))
