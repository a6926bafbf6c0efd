"""The KV task against brute-force parsing of its own text, and exact match against plain loops."""

from __future__ import annotations

import random as python_random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from gradmem.batch import Batch, Tokens
from gradmem.errors import GradmemError
from gradmem.tasks.kv import CHARACTERS, KV, distinct
from gradmem.training.step import exact_match

OPTIONS = [
    {"pairs": 4},
    {"pairs": 32, "queries": 3},
    {"pairs": 1, "queries": 1},
    {"pairs": 6, "key_length": 1, "value_length": 3},
    {"pairs": 5, "key_length": 3, "value_length": 1, "alphabet": 4, "queries": 2},
    {"pairs": 8, "noise": 0.25, "queries": 1},
    {"pairs": 8, "noise": 0.5},
    {"pairs": 5, "noise": 0.75, "alphabet": 40},
]


def letters(task: KV) -> list[str]:
    """The letters that the tokenizer knows, in the order of their ids."""
    vocabulary = task.tokenizer.get_vocab()
    return [token for token in sorted(vocabulary, key=vocabulary.get) if token not in {"[PAD]", "[UNK]", *"|!:?"}]


def texts(task: KV, ids: torch.Tensor) -> list[str]:
    """Rows of ids as text, by looking every id up."""
    names = {i: token for token, i in task.tokenizer.get_vocab().items()}
    return ["".join(names[i] for i in row) for row in ids.tolist()]


def pattern(task: KV) -> str:
    return f"!([^|!:?]{{{task.key_length}}}):([^|!:?]{{{task.value_length}}})!"


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.context.ids, other.context.ids),
            (one.context.mask, other.context.mask),
            (one.queries.ids, other.queries.ids),
            (one.labels, other.labels),
        )
    )


# --- What a batch holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_format_and_answers(options: dict) -> None:
    task = KV(**options)
    batch = task.batch("train", 100, 40)
    contexts, queries = texts(task, batch.context.ids), texts(task, batch.queries.ids)
    allowed = set(letters(task)[: options.get("alphabet", 62)])
    asked = options.get("queries") or task.pairs
    assert len(contexts) == 40
    assert batch.context.mask.all()
    assert batch.queries.mask.all()
    assert batch.rows.tolist() == [row for row in range(40) for _ in range(asked)]
    begin = len("?!") + task.key_length + len(":")
    assert batch.labels[:, :begin].eq(-100).all()
    assert torch.equal(batch.labels[:, begin:], batch.queries.ids[:, begin:])
    for row, context in enumerate(contexts):
        pairs = re.findall(pattern(task), context)
        noise = re.sub(pattern(task), "", context)
        assert noise.endswith("|")
        if not task.noise:
            assert noise == "|", "nothing but pairs and a closing mark"
        answers = dict(pairs)
        assert len(pairs) == len(answers) == task.pairs, "keys are unique"
        assert set("".join(answers) + "".join(answers.values()) + noise[:-1]) <= allowed
        mine = [queries[i] for i in range(len(queries)) if batch.rows[i] == row]
        found = [re.fullmatch(rf"\?!(.{{{task.key_length}}}):(.*)!\|", query).groups() for query in mine]
        assert len({key for key, _ in found}) == asked, "no key is asked twice"
        assert all(answers[key] == value for key, value in found)


def test_the_exact_format() -> None:
    """METHOD.md, by hand: two pairs make 15 tokens, a query 9 of which 4 are the target `vv!|`."""
    task = KV(pairs=2)
    batch = task.batch("valid", 0, 1)
    (context,) = texts(task, batch.context.ids)
    marks = re.sub(r"[a-zA-Z0-9]", ".", context)
    assert marks == "!..:..!!..:..!|"
    assert [re.sub(r"[a-zA-Z0-9]", ".", query) for query in texts(task, batch.queries.ids)] == ["?!..:..!|"] * 2
    first, second = re.findall(pattern(task), context)
    assert texts(task, batch.queries.ids) == [f"?!{key}:{value}!|" for key, value in (first, second)]
    assert batch.labels[:, :5].eq(-100).all()
    assert torch.equal(batch.labels[:, 5:], batch.queries.ids[:, 5:])
    scored = task.scored(batch.labels)
    assert scored.tolist() == [[False] * 5 + [True, True, False, False]] * 2
    assert task.answer_length == 4
    assert (task.pad_id, task.end_id) == (0, task.tokenizer.convert_tokens_to_ids("|"))


@pytest.mark.parametrize("options", [{"pairs": 3}, {"pairs": 3, "noise": 0.5, "queries": 2}], ids=str)
def test_samples_are_a_pure_function_of_their_index(options: dict) -> None:
    """However the samples are cut into batches, and in whatever order they are asked for."""
    whole = KV(**options).batch("train", 250, 300, seed=7)
    task, asked = KV(**options), options.get("queries", 3)
    for start, size in ((500, 50), (250, 1), (255, 2), (251, 4), (257, 243), (250, 300)):
        part = task.batch("train", start, size, seed=7)
        rows = slice(start - 250, start - 250 + size)
        queries = slice(rows.start * asked, rows.stop * asked)
        wanted = Batch(whole.context[rows], whole.queries[queries], whole.labels[queries], part.rows)
        assert same(part, wanted)
    assert len(set(texts(task, whole.context.ids))) == 300, "no sample repeats"


def test_changing_a_batch_in_place_changes_no_later_one() -> None:
    task = KV(pairs=3)
    for _ in range(2):
        batch = task.batch("train", 0, 4)
        assert same(batch, KV(pairs=3).batch("train", 0, 4))
        batch.context.ids.zero_(), batch.queries.ids.zero_(), batch.labels.zero_()


def test_splits_and_seeds_have_nothing_in_common() -> None:
    task = KV(pairs=4)
    sets = [
        set(texts(task, task.batch(split, 0, 300, seed).context.ids))
        for split in ("train", "valid", "test")
        for seed in (0, 1)
    ]
    assert len(set.union(*sets)) == 6 * 300


@pytest.mark.parametrize("noise", [0.1, 0.25, 0.5, 0.75])
def test_noise_is_as_much_as_asked_and_everywhere(noise: float) -> None:
    task = KV(pairs=8, noise=noise, alphabet=20)
    gaps, characters = np.zeros(9), Counter()
    for context in texts(task, task.batch("test", 0, 256).context.ids):
        parts = re.split(pattern(task), context[:-1])[::3]
        count = sum(map(len, parts))
        assert abs(count / (len(context) - 1) - noise) < 0.5 / len(context)
        gaps += [len(part) for part in parts]
        characters.update("".join(parts))
    # Uniform over the gaps and over the alphabet, within five standard deviations.
    assert np.abs(gaps - gaps.mean()).max() < 5 * gaps.mean() ** 0.5
    assert set(characters) == set(letters(task)[:20])
    mean = sum(characters.values()) / 20
    assert max(abs(count - mean) for count in characters.values()) < 5 * mean**0.5


def test_keys_values_and_questions_are_uniform() -> None:
    """Counts of 62 characters, and of the place of the pair asked, within five standard deviations."""
    task = KV(pairs=10, queries=2)
    batch = task.batch("train", 0, 1024)
    keys, values, places = Counter(), Counter(), Counter()
    queries = texts(task, batch.queries.ids)
    for row, context in enumerate(texts(task, batch.context.ids)):
        pairs = re.findall(pattern(task), context)
        keys.update("".join(key for key, _ in pairs))
        values.update("".join(value for _, value in pairs))
        places.update([key for key, _ in pairs].index(query[2:4]) for query in queries[2 * row : 2 * row + 2])
    for counts, kinds in ((keys, 62), (values, 62), (places, 10)):
        mean = sum(counts.values()) / kinds
        assert len(counts) == kinds
        assert max(abs(count - mean) for count in counts.values()) < 5 * mean**0.5


def test_values_may_repeat() -> None:
    task = KV(pairs=8, alphabet=4)
    values = [[v for _, v in re.findall(pattern(task), c)] for c in texts(task, task.batch("train", 0, 20).context.ids)]
    assert any(len(set(row)) < len(row) for row in values)


# --- distinct ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "below"), [(2, 4), (3, 5), (4, 4)])
def test_distinct_is_uniform(count: int, below: int) -> None:
    """Chi-square over all ordered choices, at a fixed seed; its mean is `kinds` and its deviation sqrt(2 kinds)."""
    rows = 24_000
    drawn = distinct(np.random.default_rng(0), rows, count, below)
    assert drawn.shape == (rows, count)
    counts = Counter(map(tuple, drawn.tolist()))
    assert all(len(set(row)) == count and min(row) >= 0 and max(row) < below for row in counts)
    kinds = int(np.prod(range(below - count + 1, below + 1)))
    assert len(counts) == kinds
    expected = rows / kinds
    assert sum((seen - expected) ** 2 / expected for seen in counts.values()) < kinds + 4 * (2 * kinds) ** 0.5


# --- Tokenizer --------------------------------------------------------------------------------------------


def test_tokenizer_round_trip() -> None:
    task = KV(pairs=1)
    known = letters(task)
    assert len(known) == len(set(known)) == 62
    assert all(len(letter) == 1 and letter.isalnum() for letter in known)
    assert known == list(CHARACTERS)
    assert len(task.tokenizer) == 62 + 6
    assert sorted(task.tokenizer.get_vocab().values()) == list(range(62 + 6))
    text = "".join(known) + "!a:b!!?||::?!!" + "".join(reversed(known))
    ids = task.tokenizer.encode(text)
    assert len(ids) == len(text), "one token a character, and nothing added"
    assert task.tokenizer.unk_token_id not in ids
    assert task.tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["a.b", "a b", "a\n\nb", "aЖb", "a😀é b"])
def test_unknown_characters_become_unk(text: str) -> None:
    tokenizer = KV(pairs=1).tokenizer
    a, *unknown, b = tokenizer.encode(text)
    assert unknown == [tokenizer.unk_token_id] * (len(text) - 2), "one for each character"
    assert tokenizer.convert_ids_to_tokens([a, b]) == ["a", "b"]


# --- Text -------------------------------------------------------------------------------------------------

EXACT = "!a7:Qz!!k2:9f!|"


@pytest.mark.parametrize(
    "text", [EXACT, f"  {EXACT}\n", "a7:Qz\nk2:9f", "\n  a7 : Qz  \n\n\tk2:9f\n", "a7:Qz\r\nk2:9f"]
)
def test_context_text(text: str) -> None:
    task = KV(pairs=2)
    assert task.context_text(text) == EXACT
    assert task.examples(text) == [("a7", "Qz"), ("k2", "9f")]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a7:Qz\nk2", ["line 2", "'k2'"]),
        ("a7Qz", ["line 1"]),
        ("a7:Qzz", ["line 1", "2 and 2"]),
        ("a:Qz", ["line 1"]),
        ("a7:Qz\n\na7:9f", ["line 3", "'a7'", "twice"]),
        ("a7:Q!", ["line 1"]),
        ("a.:Qz", ["line 1"]),
    ],
)
def test_context_text_errors(text: str, names: list[str]) -> None:
    for method in (KV(pairs=2).context_text, KV(pairs=2).examples):
        with pytest.raises(GradmemError) as error:
            method(text)
        assert all(name in str(error.value) for name in names)


def test_lengths_of_other_sizes() -> None:
    task = KV(pairs=2, key_length=3, value_length=1)
    assert task.context_text("abc:d") == "!abc:d!|"
    assert task.query_text("abc") == task.query_text("?!abc:") == "?!abc:"
    with pytest.raises(GradmemError, match="3 and 1"):
        task.context_text("ab:cd")


@pytest.mark.parametrize("text", ["a7", "?!a7:"])
def test_query_text(text: str) -> None:
    assert KV(pairs=2).query_text(text) == "?!a7:"


@pytest.mark.parametrize("text", ["", "a", "a77", "a!", "?!a:", "?!a77:", "a7:", "?!a7", " a7", "a."])
def test_query_text_errors(text: str) -> None:
    with pytest.raises(GradmemError, match="key of 2"):
        KV(pairs=2).query_text(text)


@pytest.mark.parametrize(("text", "answer"), [("Qz!|", "Qz"), ("Qz", "Qz"), ("!|", ""), ("Q!z|", "Qz")])
def test_answer_text(text: str, answer: str) -> None:
    assert KV(pairs=2).answer_text(text) == answer


def test_text_and_batches_agree() -> None:
    """The text of a sample is accepted as it is, its examples are its pairs, and their tokens its queries."""
    task = KV(pairs=4)
    batch = task.batch("test", 0, 5)
    queries = texts(task, batch.queries.ids)
    for row, context in enumerate(texts(task, batch.context.ids)):
        assert task.context_text(context) == context
        assert task.tokenizer.encode(context) == batch.context.ids[row].tolist()
        examples = task.examples(context)
        assert examples == re.findall(pattern(task), context)
        assert [f"{task.query_text(key)}{value}!|" for key, value in examples] == queries[4 * row : 4 * row + 4]


def test_text_of_noisy_samples() -> None:
    task = KV(pairs=4, noise=0.5)
    for context in texts(task, task.batch("test", 0, 5).context.ids):
        assert task.context_text(context) == context
        assert task.examples(context) == re.findall(pattern(task), context)


@pytest.mark.parametrize("name", ["query_text", "context_text"])
def test_text_of_unknown_letters_is_refused(name: str) -> None:
    with pytest.raises(GradmemError):
        getattr(KV(pairs=2), name)({"query_text": "Àé", "context_text": "Àé:ab"}[name])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"alphabet": 1}, "alphabet"),
        ({"alphabet": 63}, "alphabet"),
        ({"key_length": 0}, "key_length"),
        ({"value_length": 0}, "value_length"),
        ({"pairs": 0}, "pairs"),
        ({"pairs": 9, "alphabet": 4}, "pairs must be from 1 to 8"),
        ({"noise": 1.0}, "noise"),
        ({"noise": -0.1}, "noise"),
        ({"pairs": 4, "queries": 5}, "queries"),
        ({"pairs": 4, "queries": 0}, "queries"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict, names: str) -> None:
    with pytest.raises(GradmemError, match=names):
        KV(**options)


# --- Exact match ------------------------------------------------------------------------------------------


def test_exact_match_by_brute_force() -> None:
    generator = python_random.Random(0)
    seen = Counter()
    for _ in range(100):
        queries, length = generator.randint(1, 5), generator.randint(1, 6)
        labels = [[generator.choice([-100, 0, 1, 2]) for _ in range(length)] for _ in range(queries)]
        scored = [[label != -100 and generator.random() < 0.6 for label in row] for row in labels]
        predicted, wanted = [], []
        for row, flags in zip(labels, scored, strict=True):
            good = True
            for label, flag in zip(row, flags, strict=True):
                if label != -100:
                    guess = label if generator.random() < 0.7 else generator.randint(0, 2)
                    predicted.append(guess)
                    if flag and guess != label:
                        good = False
            wanted.append(good)
        got = exact_match(torch.tensor(predicted, dtype=torch.long), asking(torch.tensor(labels)), torch.tensor(scored))
        assert got.tolist() == wanted
        seen.update(wanted)
    assert min(seen[True], seen[False]) > 50


def asking(labels: torch.Tensor) -> Batch:
    """A batch of queries with these labels, one for each context."""
    tokens = Tokens(labels.clamp_min(0), torch.ones_like(labels, dtype=torch.bool))
    return Batch(tokens, tokens, labels, torch.arange(len(labels)))


@pytest.mark.parametrize(
    ("guess", "right"), [("Qz!|", True), ("Qz||", True), ("Qzaa", True), ("QZ!|", False), ("zz!|", False)]
)
def test_exact_match_ignores_the_marks(guess: str, right: bool) -> None:
    task = KV(pairs=2)
    labels = torch.tensor([[-100] * 5 + task.tokenizer.encode("Qz!|")])
    predicted = torch.tensor(task.tokenizer.encode(guess))
    assert exact_match(predicted, asking(labels), task.scored(labels)).tolist() == [right]


def test_an_example_is_a_test_context_in_lines() -> None:
    task = KV(pairs=4)
    text, pairs = task.example(7)
    assert task.encode(task.context_text(text)) == task.batch("test", 0, 1, 7).context.ids[0].tolist()
    assert text.splitlines() == [f"{key}:{value}" for key, value in pairs]
    assert text != task.example(8)[0]
