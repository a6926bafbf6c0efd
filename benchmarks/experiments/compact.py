"""How much of a key-value cache a frozen language model needs to answer: entries that are kept, then fitted.

A text stands in the user's turn of a chat model. Its cache is cut to a fraction of its entries, and the model answers
questions from what is left. The measure is fidelity to the model with the whole cache, on real questions, along its own
greedy answers: KL divergence in nats per token, and how often the likeliest token is the same. Without the text (0 %)
and with the whole cache (100 %) are the ends of the scale.

Nothing looks at the real questions before they are asked. Reference queries, by which entries are kept and fitted, are
those of the model answering stock questions and repeating the text.

- `head`: every key-value head of every layer keeps as many entries, those of most attention.
- `shared`: one budget for all heads of all layers. An entry counts by its mean squared attention times the squared
  length of what its value adds to the layer's output.
- `fitted`: keys and values of the `shared` entries after Adam steps, one head at a time, towards the attention outputs
  of the whole cache (attention matching, arXiv 2602.16284). No step passes through the model.

Positions stay those of the text; queries begin after its end.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gradmem
from benchmarks.common import Row, machine, parser, report
from gradmem.backbone import Backbone
from gradmem.pretrained import pretrained_tokenizer

INSTRUCTION = "Read the text, then answer the question with a few words from it.\n\nText: "
STOCK = [
    "Who is mentioned in the text?",
    "What is the text about?",
    "Where does it take place?",
    "When did it happen?",
    "How many are there?",
    "Why did it happen?",
    "What happened first?",
    "What happened last?",
    "Which names are mentioned?",
    "Which numbers are mentioned?",
    "What was the result?",
    "Who did what?",
]
"""Questions that can be asked of any text."""
ANSWER, STOCK_ANSWER = 20, 24
"""Most tokens of an answer to a real question, and to a stock question."""
STEPS, RATE, QUERIES = 100, 0.02, 200
"""Adam steps of a head, their rate relative to the size of keys and values, and reference queries of a step."""


@dataclass(frozen=True)
class Entries:
    """Keys and values, shapes (layers, key-value heads, entries, width); `kept` says which of them count."""

    keys: Tensor
    values: Tensor
    kept: Tensor


@dataclass(frozen=True)
class References:
    """Queries of each key-value head, shape (layers, key-value heads, query heads each, queries, width), and what they
    find outside of the text: the log of the attention mass and the attention output."""

    queries: Tensor
    mass: Tensor
    output: Tensor


class Reader:
    """A chat model that reads questions after entries of a cache, and notes its queries where it is told to."""

    NAME = "benchmark_compact"

    def __init__(self, name: str) -> None:
        self.model = Backbone.from_pretrained(name).model.eval().requires_grad_(False)
        self.tokenizer = pretrained_tokenizer(name)
        self.hidden: Tensor | None = None
        self.noted: list[tuple[Tensor, Tensor, Tensor]] | None = None
        ALL_ATTENTION_FUNCTIONS.register(self.NAME, self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.NAME, sdpa_mask)
        self.model.config._attn_implementation = self.NAME
        config = self.model.config
        self.heads, self.width = config.num_key_value_heads, self.model.model.layers[0].self_attn.head_dim
        each = config.num_attention_heads // self.heads
        outputs = torch.stack([layer.self_attn.o_proj.weight for layer in self.model.model.layers])
        outputs = outputs.unflatten(2, (self.heads, each, self.width))
        self.metric = torch.einsum("lohrd,lohre->lhrde", outputs, outputs)
        """What an error of a head's output weighs in the output of its layer."""

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> Any:
        if self.noted is not None:
            self.noted.append((query[0], key[0], value[0]))
        if self.hidden is not None:
            shape = (1, query.shape[1], query.shape[2], key.shape[2])
            seen = (
                torch.ones(shape[2:], dtype=torch.bool).tril(shape[3] - shape[2])[None, None] if mask is None else mask
            )
            seen = seen.expand(len(query), *shape[1:]).clone()
            own = self.hidden[module.layer_idx].repeat_interleave(query.shape[1] // self.heads, 0)
            seen[..., : own.shape[1]] &= ~own[None, :, None]
            mask = seen
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    def turn(self, text: str, question: str) -> tuple[list[int], list[int]]:
        """Token ids of the user's turn up to the end of the text, and from there to where the answer begins."""
        content = f"{INSTRUCTION}{text}\n\n\0Question: {question}"
        said = [{"role": "user", "content": content}]
        before, after = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).split("\0")
        return tuple(self.tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))

    def read(self, text: str) -> Entries:
        """The whole cache of a text."""
        cache = self.model(torch.tensor([self.turn(text, "")[0]]), use_cache=True).past_key_values
        keys, values = (torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values"))
        return Entries(keys, values, torch.ones(keys.shape[:3], dtype=torch.bool))

    @contextmanager
    def after(self, entries: Entries, rows: int) -> Iterator[DynamicCache]:
        """A cache of the entries for so many rows, of which those that do not count are hidden."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(entries.keys, entries.values, strict=True)):
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        self.hidden = None if bool(entries.kept.all()) else ~entries.kept
        try:
            yield cache
        finally:
            self.hidden = None

    def logits(self, entries: Entries, questions: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
        """Log-probabilities at the tokens of each answer."""
        found = []
        for question, answer in zip(questions, answers, strict=True):
            with self.after(entries, 1) as cache:
                ids = torch.tensor([question + answer])
                logits = self.model(ids, past_key_values=cache).logits[0, len(question) - 1 : -1]
            found.append(logits.log_softmax(-1))
        return found

    def answers(self, entries: Entries, questions: list[list[int]], most: int) -> list[list[int]]:
        """Greedy answers, each up to its end token or `most` tokens."""
        end, found = self.tokenizer.eos_token_id, []
        for question in questions:
            ids, answer = torch.tensor([question]), list[int]()
            with self.after(entries, 1) as cache:
                while len(answer) < most and end not in answer:
                    answer.append(int(self.model(ids, past_key_values=cache).logits[0, -1].argmax()))
                    ids = torch.tensor([answer[-1:]])
            found.append(answer)
        return found

    def references(self, whole: Entries, text: str) -> References:
        """Queries of the model that answers the stock questions, and of the model that repeats the text."""
        stock = [self.turn("", question)[1] for question in STOCK]
        sequences = [q + a for q, a in zip(stock, self.answers(whole, stock, STOCK_ANSWER), strict=True)]
        sequences.append(
            self.turn("", "Repeat the text.")[1] + self.tokenizer(text, add_special_tokens=False).input_ids
        )
        parts = []
        for ids in sequences:
            self.noted = []
            with self.after(whole, 1) as cache:
                self.model(torch.tensor([ids]), past_key_values=cache)
            queries, keys, values = (torch.stack(tensors) for tensors in zip(*self.noted, strict=True))
            self.noted = None
            queries = queries.unflatten(1, (self.heads, -1))
            keys, values = (tensor[:, :, whole.keys.shape[2] :] for tensor in (keys, values))
            scores = torch.einsum("lhrnd,lhmd->lhrnm", queries, keys) * self.width**-0.5
            scores = scores.masked_fill(~torch.ones(len(ids), len(ids), dtype=torch.bool).tril(), -torch.inf)
            output = torch.einsum("lhrnm,lhmd->lhrnd", scores.softmax(-1), values)
            parts.append(References(queries, scores.logsumexp(-1), output))
        return References(
            torch.cat([part.queries for part in parts], 3),
            torch.cat([part.mass for part in parts], 3),
            torch.cat([part.output for part in parts], 3),
        )


def attention(queries: Tensor, mass: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the entries of a head, shape (..., queries, entries), and to all that is outside of the text."""
    scores = torch.einsum("...rnd,...md->...rnm", queries, keys) * queries.shape[-1] ** -0.5
    total = torch.logaddexp(scores.logsumexp(-1), mass)
    return (scores - total[..., None]).exp(), (mass - total).exp()


def keep_by_head(seen: Tensor, entries: int) -> Tensor:
    """The entries of most attention of each head: bool, shape (layers, key-value heads, entries)."""
    scores = seen.mean((2, 3))
    scores[..., 0] = torch.inf  # where heads that look for nothing look
    return torch.zeros(scores.shape, dtype=torch.bool).scatter(2, scores.topk(entries).indices, True)


def keep_shared(seen: Tensor, whole: Entries, metric: Tensor, entries: int) -> Tensor:
    """The entries that count most over all heads, `entries` for each head on average."""
    added = torch.einsum("lhmd,lhrde,lhme->lhrm", whole.values, metric, whole.values)
    scores = (seen.square().mean(3) * added).sum(2)
    scores[..., 0] = torch.inf
    chosen = scores.flatten().topk(entries * scores.shape[0] * scores.shape[1]).indices
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, chosen, True).view(scores.shape)


def fitted(whole: Entries, kept: Tensor, references: References, wanted: Tensor, metric: Tensor) -> Entries:
    """Fit the entries that are kept, so that the reference queries find what they find in the whole cache."""
    keys, values = whole.keys.clone(), whole.values.clone()
    generator = torch.Generator().manual_seed(0)
    for layer in range(len(keys)):
        for head in range(keys.shape[1]):
            at, one = kept[layer, head].nonzero()[:, 0], (layer, head)
            start = torch.stack([keys[layer, head, at], values[layer, head, at]])
            size = start.square().mean((1, 2), keepdim=True).sqrt()
            moved = torch.zeros_like(start, requires_grad=True)
            optimizer = torch.optim.Adam([moved], lr=RATE, betas=(0.9, 0.95))
            weight = metric[one] + 1e-4 * torch.eye(keys.shape[3]) * metric[one].diagonal(dim1=-2, dim2=-1).mean()
            root, first = torch.linalg.cholesky(weight), None
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = RATE * min(1, 2 * (1 - step / STEPS))
                some = torch.randperm(wanted.shape[3], generator=generator)[:QUERIES]
                key, value = start + moved * size
                seen, outside = attention(references.queries[one][:, some], references.mass[one][:, some], key)
                error = seen @ value + outside[..., None] * references.output[one][:, some] - wanted[one][:, some]
                loss = torch.einsum("rnd,rde->rne", error, root).square().mean()
                first = loss.detach() + 1e-12 if first is None else first
                optimizer.zero_grad()
                (loss / first).backward()
                optimizer.step()
            keys[layer, head, at], values[layer, head, at] = (start + moved * size).detach()
    return replace(whole, keys=keys, values=values, kept=kept)


def fidelity(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """KL divergence in nats per token, and how often the likeliest token is the same."""
    one, other = torch.cat(list(wanted)), torch.cat(list(found))
    divergence = (one.exp() * (one - other)).sum(-1).mean()
    return float(divergence), float((one.argmax(-1) == other.argmax(-1)).double().mean())


def paragraphs(file: Path, words: Sequence[int], questions: int, seed: int) -> list[tuple[str, list[str]]]:
    """Texts of so many words with their first questions, in random order; JSON lines of one question or several."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["context"], []).extend(one["question"] for one in row.get("qas", [row]))
    fit = [(text, asked[:questions]) for text, asked in found.items() if words[0] <= len(text.split()) <= words[1]]
    random.Random(seed).shuffle(fit)
    return fit


def examine(reader: Reader, text: str, asked: list[str], fractions: list[float]) -> Iterator[tuple[str, float, Row]]:
    """Name, fraction and fidelity of every way of keeping entries of one text."""
    questions = [reader.turn("", question)[1] for question in asked]
    started = time.perf_counter()
    whole, nothing = reader.read(text), reader.read("")
    references = reader.references(whole, text)
    seen, outside = attention(references.queries, references.mass, whole.keys)
    wanted = torch.einsum("lhrnm,lhmd->lhrnd", seen, whole.values) + outside[..., None] * references.output
    took = time.perf_counter() - started
    answers = reader.answers(whole, questions, ANSWER)
    teacher = reader.logits(whole, questions, answers)

    def row(entries: Entries, seconds: float) -> Row:
        divergence, agreement = fidelity(teacher, reader.logits(entries, questions, answers))
        return {"kl": divergence, "agreement_pct": 100 * agreement, "seconds": seconds, "tokens": whole.keys.shape[2]}

    yield "no text", 0.0, row(nothing, 0.0)
    for fraction in fractions:
        entries = max(1, round(fraction * whole.keys.shape[2]))
        yield "head", fraction, row(replace(whole, kept=keep_by_head(seen, entries)), took)
        kept = keep_shared(seen, whole, reader.metric, entries)
        yield "shared", fraction, row(replace(whole, kept=kept), took)
        with torch.enable_grad():
            began = time.perf_counter()
            fit = fitted(whole, kept, references, wanted, reader.metric)
        yield "fitted", fraction, row(fit, took + time.perf_counter() - began)


@torch.no_grad()
def main() -> None:
    """Command line."""
    command: argparse.ArgumentParser = parser(__doc__, repeats=None)
    command.add_argument("data", type=Path, metavar="FILE", help="JSON lines of context and question, or of qas")
    command.add_argument("--model", default="smollm2-135m", help="chat model: directory, hub name or GGUF file")
    command.add_argument("--fractions", type=float, nargs="+", default=[0.2, 0.1, 0.05], help="of the entries, to keep")
    command.add_argument("--words", type=int, nargs=2, default=[90, 180], metavar="N", help="words of a text")
    command.add_argument("--questions", type=int, default=4, metavar="N", help="most questions of a text")
    command.add_argument("--samples", type=int, default=20, metavar="N", help="texts")
    command.add_argument("--seed", type=int, default=1, help="which texts")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(options.threads, "fp32")
    try:
        reader = Reader(options.model)
        texts = paragraphs(options.data, options.words, options.questions, options.seed)[: options.samples]
    except (gradmem.GradmemError, OSError, ValueError, LookupError) as error:
        command.error(str(error))
    found: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for text, asked in track(texts, "compact"):
        for name, fraction, row in examine(reader, text, asked, options.fractions):
            found[name, fraction].append(row)
    means = {key: {name: sum(row[name] for row in own) / len(own) for name in own[0]} for key, own in found.items()}
    ends = means["no text", 0.0]["kl"]
    rows = [
        {"kept": name, "fraction": fraction, "gap_closed_pct": 100 * (1 - row["kl"] / ends), **row}
        for (name, fraction), row in means.items()
    ]
    report(
        f"{options.model}, {len(texts)} texts of {options.data.name}, seed {options.seed}", rows, where, options.json
    )


if __name__ == "__main__":
    main()
