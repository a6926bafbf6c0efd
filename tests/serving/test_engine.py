"""The engine answers as the model does alone, whatever else is asked, written, cancelled or broken beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import ALL, TEXT, build
from chat_models import save_model
from gradmem import GradmemError, Memory, MemoryModel, load
from gradmem.methods.base import Written
from gradmem.model import Answer
from gradmem.sampling import Sampling
from gradmem.serving import Busy, Closed, Engine
from gradmem.serving.prefix_cache import PrefixCache

TEXTS = ["a7:Qz", TEXT, "11:22\n33:44", "b1:c2\nd3:e4\nf5:g6\nh7:i8"]
QUERIES = ["a7", "k2", "zz", "11", "d3"]


def sizes(model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each generation from now on has."""
    found: list[int] = []
    generate = model.method.generate

    def counting(memory: Any, queries: list[list[int]], *rest: Any, **options: Any) -> list[list[int]]:
        found.append(len(queries))
        return generate(memory, queries, *rest, **options)

    monkeypatch.setattr(model.method, "generate", counting)
    return found


def ask_until_refused(engine: Engine, memory: Memory) -> None:
    """Ask until something other than a full queue refuses."""
    while True:
        with suppress(Busy):
            engine.ask(1, memory, "a7")


class Held:
    """An engine whose thread waits in the first step of a write until it is let go."""

    def __init__(self, model: MemoryModel, **options: Any) -> None:
        self.engine = Engine(model, **options)
        self.gate, inside = threading.Event(), threading.Event()

        def wait(*_: object) -> None:
            inside.set()
            self.gate.wait(60)

        self.written = self.engine.write("a7:Qz", steps=0, on_step=wait)
        inside.wait(60)


@pytest.fixture
def held(tiny: MemoryModel) -> Iterator[Held]:
    made = Held(tiny, max_queue=3, max_batch=2)
    yield made
    made.gate.set()
    made.engine.close()


@pytest.fixture
def memory(tiny: MemoryModel) -> Memory:
    return tiny.write(TEXT)


def test_an_engine_is_stuck_only_while_one_step_takes_too_long(held: Held) -> None:
    assert held.engine.stuck(0.0)
    assert not held.engine.stuck(600.0)
    held.gate.set()
    held.written.result(60)
    held.engine.close()
    assert not held.engine.stuck(0.0)


@pytest.mark.parametrize("case", ALL, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_answers_are_those_of_the_model(case: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method; memories of different lengths, some asked several times, from several threads."""
    model = build(*case)
    memories = [model.write(text) for text in TEXTS]
    asked = [(i, query) for i in range(len(TEXTS)) for query in QUERIES]
    wanted = [memories[i].answer(query) for i, query in asked]
    # Of each memory another query: every sixth.
    assert [answer.text for answer in wanted[::6]] == [memories[i].ask(query) for i, query in asked[::6]]
    batches = sizes(model, monkeypatch)
    with Engine(model, max_batch=7, max_wait_ms=200) as engine, ThreadPoolExecutor(len(asked)) as clients:
        listeners = [None, lambda text: None]  # a batch that somebody listens to is generated under control
        ask = lambda i, query: engine.ask(i, memories[i], query, on_text=listeners[i % 2]).result()  # noqa: E731
        got = list(clients.map(lambda one: ask(*one), asked))
    assert max(batches) == 7
    assert sum(batches) == len(asked)
    for answer, alone in zip(got, wanted, strict=True):
        assert answer.text == alone.text
        for name in ("logprob", "lowest", "margin", "near_loss"):
            assert getattr(answer, name) == pytest.approx(getattr(alone, name), abs=1e-3)


def test_a_written_memory_is_that_of_the_model(tiny: MemoryModel) -> None:
    steps: list[tuple[int, int]] = []
    with Engine(tiny) as engine:
        memory = engine.write(TEXT, steps=3, on_step=lambda w, total: steps.append((int(w.taken), total))).result()
        assert engine.ask(1, memory, "a7").result().text == memory.ask("a7")
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]
    wanted = tiny.write(TEXT, steps=3)
    assert torch.equal(memory.tensors["memory"], wanted.tensors["memory"])
    assert memory.receipts == wanted.receipts


@pytest.mark.parametrize("case", ALL, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_texts_that_wait_are_written_together(case: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as alone; one that cannot be written, is cancelled or whose follower gives up stops no other."""
    model = build(*case)
    wanted = [model.write(text) for text in TEXTS]
    batches: list[int] = []
    write = model.write
    monkeypatch.setattr(
        model, "write", lambda t, **o: batches.append(1 if isinstance(t, str) else len(t)) or write(t, **o)
    )
    followed: list[list[Written]] = [[] for _ in TEXTS]
    held = Held(model)
    bad, leaving = held.engine.write("a7:Qz\n\u2603"), held.engine.write(TEXT, on_step=lambda *_: 1 / 0)
    cancelled = held.engine.write(TEXT)
    cancelled.cancel()
    good = [
        held.engine.write(text, on_step=lambda written, _, mine=mine: mine.append(written))
        for text, mine in zip(TEXTS, followed, strict=True)
    ]
    other = held.engine.write(TEXT, steps=1)
    held.gate.set()
    held.engine.close()
    assert batches == [1, len(TEXTS) + 1, 1]
    with pytest.raises(GradmemError, match="is no pair"):
        bad.result()
    with pytest.raises(ZeroDivisionError):
        leaving.result()
    assert other.result().receipts[0].steps <= 1
    for future, alone, mine in zip(good, wanted, followed, strict=True):
        memory = future.result()
        assert memory.receipts[0].context_sha256 == alone.receipts[0].context_sha256
        assert memory.receipts[0].losses == pytest.approx(alone.receipts[0].losses, abs=1e-4)
        for name, tensor in memory.tensors.items():
            assert torch.allclose(tensor, alone.tensors[name], atol=1e-4)
            assert torch.equal(tensor, mine[-1].memory.tensors[name])
        assert [len(written.taken) for written in mine] == [1] * len(mine)
        assert mine[-1].losses[:, 0].tolist() == pytest.approx(memory.receipts[0].losses[:-1], abs=1e-4)


@pytest.mark.parametrize("case", ALL, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_queries_are_answered_between_steps_of_a_write(case: tuple[str, int]) -> None:
    """Neither sees anything of the other."""
    model = build(*case)
    memory, alone = model.write(TEXT), model.write(TEXTS[3])
    asked: list[Future[Answer]] = []
    done: list[bool] = []

    def on_step(*_: object) -> None:
        done.extend(future.done() for future in asked[-1:])
        asked.append(engine.ask(1, memory, "a7"))

    with Engine(model) as engine:
        written = engine.write(TEXTS[3], on_step=on_step).result()
    assert all(done)
    assert len(done) >= model.method.write_steps
    assert {future.result().text for future in asked} == {memory.ask("a7")}
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in written.tensors.items())


def test_too_many_are_refused_at_once_and_the_others_answered(held: Held, memory: Memory) -> None:
    accepted = [held.engine.ask(1, memory, query) for query in QUERIES[:3]]
    with pytest.raises(Busy, match="3 requests are waiting") as refused:
        held.engine.ask(1, memory, "a7")
    assert refused.value.retry_after >= 0
    with pytest.raises(Busy):
        held.engine.write(TEXT)
    held.gate.set()
    assert [future.result().text for future in accepted] == memory.ask(QUERIES[:3])
    assert held.engine.ask(1, memory, "a7").result().text == memory.ask("a7")


def test_cancelled_and_late_queries_are_not_run(
    held: Held, memory: Memory, tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = sizes(tiny, monkeypatch)
    cancelled, late, good = (held.engine.ask(1, memory, "a7", timeout=timeout) for timeout in (None, 0.0, 60.0))
    assert cancelled.cancel()
    held.gate.set()
    with pytest.raises(TimeoutError, match="longer than its 0 s"):
        late.result()
    with pytest.raises(CancelledError):
        cancelled.result()
    good.result()
    assert batches == [1]


def test_a_cancelled_write_is_not_run(held: Held) -> None:
    steps: list[object] = []
    waiting = held.engine.write(TEXT, on_step=lambda *step: steps.append(step))
    assert waiting.cancel()
    held.gate.set()
    held.engine.close()
    assert len(held.written.result()) == 1
    assert not steps


def test_close_finishes_what_was_accepted(held: Held, memory: Memory) -> None:
    accepted = [held.engine.ask(1, memory, "a7"), held.engine.write(TEXT)]
    closing = threading.Thread(target=held.engine.close)
    closing.start()
    with pytest.raises(Closed):
        ask_until_refused(held.engine, memory)
    held.gate.set()
    closing.join(60)
    assert all(future.done() and future.exception() is None for future in accepted)


def test_what_is_wrong_with_one_request_is_not_the_others(held: Held, memory: Memory, other: MemoryModel) -> None:
    def broken(text: str) -> None:
        raise ValueError("no listener")

    good, bad, deaf = (
        held.engine.ask(1, memory, "a7"),
        held.engine.ask(1, memory, "too long"),
        held.engine.ask(1, memory, "zz", on_text=broken),
    )
    held.gate.set()
    with pytest.raises(GradmemError, match="is no query: ask for a key"):
        bad.result()
    with pytest.raises(ValueError, match="no listener"):
        deaf.result()
    assert good.result().text == memory.ask("a7")
    with pytest.raises(GradmemError, match="empty"):
        held.engine.write("").result()
    for refused in (other.write(TEXT), held.engine.model.write(TEXTS)):
        with pytest.raises(GradmemError, match="one memory, opened with its own model"):
            held.engine.ask(2, refused, "a7")


def test_streamed_text_grows_into_the_answer(held: Held, memory: Memory) -> None:
    shown: dict[str, list[str]] = {"a7": [], "zz": []}
    futures = {query: held.engine.ask(1, memory, query, on_text=texts.append) for query, texts in shown.items()}
    held.gate.set()
    for query, texts in shown.items():
        assert futures[query].result().text == texts[-1] == memory.ask(query)
        assert all(longer.startswith(text) and longer != text for text, longer in pairwise(texts))
    assert max(map(len, shown.values())) > 1


def test_prefixes_are_kept_within_the_budget(tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = [tiny.write(text) for text in TEXTS[:3]]
    one = tiny.method.prefix(memories[0]).nbytes
    # ApiKeys and values of 8 positions in 2 layers of width 16, and the last hidden state, 4 bytes each.
    assert one == 4 * (2 * 8 * 2 * 16 + 16)
    kept = PrefixCache(2 * one + 1)
    run: list[Memory] = []
    prefix = tiny.method.prefix
    monkeypatch.setattr(tiny.method, "prefix", lambda memory: run.append(memory) or prefix(memory))
    for i in (0, 1, 0, 2, 0, 1):  # 2 drops 1, which was asked before 0
        kept.get(i, memories[i])
        assert kept.nbytes <= kept.budget
    assert [next(i for i, m in enumerate(memories) if m is memory) for memory in run] == [0, 1, 2, 1]
    tight = PrefixCache(one - 1)
    tight.get(0, memories[0])
    assert tight.nbytes == 0


@pytest.mark.parametrize("option", ["max_batch", "max_wait_ms", "max_queue", "prefix_cache_bytes"])
def test_refused(option: str, tiny: MemoryModel) -> None:
    with pytest.raises(GradmemError, match=option):
        Engine(tiny, **{option: -1})


def test_what_is_no_text_harms_nobody_else(tiny: MemoryModel, memory: Memory) -> None:
    with Engine(tiny) as engine:
        for future in (engine.write(5), engine.write([None]), engine.ask(1, memory, None)):  # type: ignore[arg-type,list-item]
            assert future.exception(60) is not None
        assert engine.ask(1, memory, "a7").result(60).text == memory.ask("a7")


def test_a_listener_can_end_a_write(tiny: MemoryModel, memory: Memory) -> None:
    def enough(*_: object) -> None:
        raise KeyError("enough")

    with Engine(tiny) as engine:
        with pytest.raises(KeyError, match="enough"):
            engine.write(TEXT, on_step=enough).result()
        assert engine.ask(1, memory, "a7").result().text == memory.ask("a7")


def test_cancelled_requests_give_their_places_back(held: Held, memory: Memory) -> None:
    """At once, also while the engine's thread is busy with something else."""
    for _ in range(3):
        waiting = [held.engine.write(TEXT), held.engine.ask(1, memory, "zz"), held.engine.write(TEXT)]
        with pytest.raises(Busy):
            held.engine.ask(1, memory, "a7")
        assert all(future.cancel() for future in waiting)
    accepted = held.engine.ask(1, memory, "a7")
    held.gate.set()
    assert accepted.result().text == memory.ask("a7")


def test_close_gives_up_what_takes_too_long(held: Held, memory: Memory) -> None:
    long, asked = held.engine.write(TEXT, steps=10**6), held.engine.ask(1, memory, "a7")
    closing = threading.Thread(target=held.engine.close, args=(0.0,))
    closing.start()
    while not held.engine._past_deadline():
        threading.Event().wait(0.01)
    held.gate.set()
    closing.join(60)
    for future in (held.written, long, asked):
        with pytest.raises(Closed):
            future.result(60)


def talkative(place: Path) -> tuple[MemoryModel, Memory, Sampling]:
    """A model, a memory of it, and options with which it says "a" thirty times."""
    model = load(save_model(place), {"name": "cram", "n_mem": 2, "write_steps": 1})
    letter = model.task.encode("a")[0]
    return model, model.write("Ann."), Sampling(max_tokens=30, logit_bias={letter: 100.0})


def test_close_gives_up_an_answer_that_takes_too_long(tmp_path: Path) -> None:
    model, memory, options = talkative(tmp_path / "lm")
    engine = Engine(model)
    closing = threading.Thread(target=engine.close, args=(0.0,))

    def close(text: str) -> None:
        if text == "aaa":
            closing.start()
            while not engine._past_deadline():
                threading.Event().wait(0.01)

    with pytest.raises(Closed):
        engine.ask(1, memory, "Who?", sampling=options, on_text=close).result(60)
    closing.join(60)
    assert not closing.is_alive()


def test_an_answer_that_is_given_up_ends_at_its_next_token(tmp_path: Path) -> None:
    """And no other answer of its batch does."""
    model, memory, options = talkative(tmp_path / "lm")
    told: list[str] = []
    with Engine(model, max_wait_ms=1000, max_batch=2) as engine:

        def leave(text: str) -> None:
            told.append(text)
            if len(told) == 3:
                left.cancel()

        left = engine.ask(1, memory, "Who?", sampling=options, on_text=leave)
        kept = engine.ask(1, memory, "Who?", sampling=options)
        assert kept.result().text == "a" * 30
        assert left.result().answer_tokens == 4
    assert told == ["a", "aa", "aaa"]


def test_short_answers_do_not_wait_for_long_ones_that_came_first(held: Held, memory: Memory) -> None:
    done: list[str] = []
    for name, sampling in (("long", Sampling(max_tokens=8)), ("short", Sampling(max_tokens=2))):
        future = held.engine.ask(1, memory, "a7", sampling=sampling)
        future.add_done_callback(lambda _, name=name: done.append(name))  # type: ignore[misc]
    held.gate.set()
    held.engine.close()
    assert done == ["short", "long"]


def test_a_query_fits_behind_its_memory_or_is_refused(tmp_path: Path) -> None:
    """The prefix counts, which may be longer than usual; the others of the batch are answered."""
    model = load(save_model(tmp_path / "lm", positions=400), {"name": "compact", "budget": 0.5, "writers": "select"})
    short, long = model.write("Ann."), model.write("A" * 90)
    taken = [memory.prefix.end for memory in (short, long)]
    query = len(model.encoder.query_ids("Who?", {"max_new_tokens": 1}))
    room = Sampling(max_tokens=400 - query - taken[1] + 1)
    with Engine(model, max_wait_ms=1000, max_batch=2) as engine:
        fits = engine.ask(1, short, "Who?", sampling=room)
        with pytest.raises(GradmemError, match=f"the memory leaves room for {400 - taken[1]} tokens"):
            engine.ask(2, long, "Who?", sampling=room).result()
        assert fits.result().answer_tokens > 0
