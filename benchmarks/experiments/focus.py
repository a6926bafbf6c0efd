"""What an agent reads with and without Focus, and what it can still ask of what it pruned.

A scripted agent searches logs of growing length (`benchmarks.experiments.log_search`). Its learnings are perfect, so
this measures the bookkeeping, not the judgement of a model.

With `--details`, the messages of one focus of short searches are written into a memory, which is asked for two details
that stand in no learnings. Besides: a memory that is the whole key-value cache (full_context), the memory of the next
search (swapped), and one of a text that says nothing (unwritten).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial

import torch

import gradmem
from benchmarks.common import Row, machine, measure, parser, report
from benchmarks.experiments.log_search import CALLS, READ_LOG, SYSTEM, Hop, ScriptedAgent, Search
from gradmem.agents.focus import Focus
from gradmem.agents.pruned import Message, PrunedMessages, transcript

PAGES = (1, 3, 5, 8, 12)
"""Most pages that the agent reads of each log, by search."""
EMPTY = "Nothing is said here."
"""A text that says nothing."""
NUDGE = 15
ANSWER = 16
"""Most tokens of an answer about a detail."""
TOKENS, CHANGE = "tokens read", "change, %"


class Texts(PrunedMessages):
    """Holds the pruned messages as texts: to count tokens, no memory need be written.

    Parameters
    ----------
    count : callable
        Number of tokens of a text.
    """

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self.texts: list[str] = []

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return self._count(text)

    def keep(self, messages: Sequence[Message]) -> None:
        """Hold messages."""
        self.texts.append(transcript(messages))


def run(search: Search, pruned: Texts, focuses: bool) -> Row:
    """Let the agent search, and say what its model has read: messages and definitions of tools."""
    begin = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": search.question}]
    agent = ScriptedAgent(focuses)
    focus = Focus(begin, pruned, nudge_after=NUDGE if focuses else CALLS)
    tools = [READ_LOG, *(focus.tools if focuses else [])]
    while True:
        reply = agent.reply(focus.messages)
        for call in focus.add(reply):
            page = search.read(**json.loads(call["function"]["arguments"]))
            focus.add({"role": "tool", "tool_call_id": call["id"], "content": page})
        if not reply.get("tool_calls"):
            break
    defined = pruned.count(json.dumps(tools))
    read = [reading.kept + defined for reading in focus.readings]
    right = reply["content"] == search.answer
    return {
        "focus": "yes" if focuses else "no",
        "calls": len(read),
        TOKENS: sum(read),
        "peak": max(read),
        "right": right,
    }


def both(pages: int, seed: int, count: Callable[[str], int]) -> list[Row]:
    """Search without and with Focus."""
    search = Search.draw(seed, pages)
    rows = [run(search, Texts(count), focuses) for focuses in (False, True)]
    return _compared([{"logs": len(search.logs), "pages": pages} | row for row in rows])


def total(rows: Sequence[Row]) -> list[Row]:
    """Add up the rows without Focus, and those with it; the peak is the highest one."""
    found = []
    for focus in ("no", "yes"):
        own = [row for row in rows if row["focus"] == focus]
        sums = {name: sum(row[name] for row in own) for name in ("logs", "calls", TOKENS, "right")}
        found.append(own[0] | sums | {"pages": None, "peak": max(row["peak"] for row in own)})
    return _compared(found)


def _compared(rows: list[Row]) -> list[Row]:
    without, focused = rows
    change = round(100 * (focused[TOKENS] / without[TOKENS] - 1), 1)
    return [without | {CHANGE: None}, focused | {CHANGE: change}]


def details(checkpoint: str, budget: float, count: Callable[[str], int], seeds: Sequence[int]) -> list[Row]:
    """Ask memories of the first focus of short searches for details that are in no learnings."""
    hops, texts = [], []
    for seed in seeds:
        search, pruned = Search.draw(seed, pages=1), Texts(count)
        run(search, pruned, focuses=True)
        hops.append(search.hops[0])
        texts.append(pruned.texts[0])
    compact = gradmem.load(checkpoint, {"name": "compact", "budget": budget})
    memories = measure("Writing", [partial(compact.write, text) for text in texts])
    whole = gradmem.load(checkpoint, {"name": "full_context"})
    asked = {
        f"memory: {budget:.0%} of the cache": memories,
        "whole cache": [whole.write(text) for text in texts],
        "swapped: memory of the next search": [*memories[1:], memories[0]],
        "unwritten": [whole.write(EMPTY)] * len(texts),
    }
    return [{"answered from": name, **_answered(own, hops)} for name, own in asked.items()]


def _answered(memories: Sequence[gradmem.BoundMemory], hops: Sequence[Hop]) -> Row:
    """Count the answers that have the detail in them."""
    found = []
    for memory, hop in zip(memories, hops, strict=True):
        questions, wanted = zip(*hop.details, strict=True)
        found += [
            right in answer
            for answer, right in zip(memory.ask([*questions], max_new_tokens=ANSWER), wanted, strict=True)
        ]
    return {"details": len(found), "right": sum(found)}


def main() -> None:
    """Command line."""
    command = parser(__doc__, repeats=None)
    command.add_argument("--model", default="smollm2", help="language model whose tokens are counted, and that answers")
    command.add_argument("--details", type=int, default=0, metavar="N", help="searches whose pruned messages are asked")
    command.add_argument("--budget", type=float, default=0.2, help="part of the cache that a memory keeps")
    command.add_argument("--seed", type=int, default=0, help="seed of the first search")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    task = gradmem.load(options.model).task

    def count(text: str) -> int:
        return len(task.encode(text))

    pairs = [both(pages, options.seed + number, count) for number, pages in enumerate(PAGES)]
    rows = [row for pair in pairs for row in pair]
    rows += total(rows)
    report("What an agent reads", rows, where, None)
    result: Row = {"machine": where, "searches": rows}
    if options.details:
        seeds = range(options.seed, options.seed + options.details)
        result["details"] = details(options.model, options.budget, count, seeds)
        report("Details that were pruned and are in no learnings", result["details"], where, None)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
