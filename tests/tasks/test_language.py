"""SQuAD, text compression, pretrained tokenizers, the cache, and how evaluation walks over language tasks."""

from __future__ import annotations

import json
import re
import shutil
import string
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.tasks.test_babi import SMALL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gradmem
from gradmem import GradmemError, MemoryModel
from gradmem.batch import Batch, Tokens
from gradmem.cli.main import main
from gradmem.data import split_indices
from gradmem.evaluation import evaluate
from gradmem.pretrained import pretrained_tokenizer
from gradmem.tasks.babi import Babi
from gradmem.tasks.base import Task
from gradmem.tasks.kv import KV
from gradmem.tasks.raw_text import RawText
from gradmem.tasks.squad import PROMPT, Squad
from gradmem.tasks.text import Text
from helpers import DATA, needs

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
METHOD = {"name": "gradmem", "n_mem": 2, "write_steps": 1, "write_head": "random"}
END = "<|endoftext|>"
ROWS = [
    ("The quick fox ran.", "Who ran?", ["The quick fox", "fox"]),
    ("A red hen sat there.", "What sat?", ["hen"]),
    ("The quick fox ran.", "What did it do?", ["ran"]),
    ("One more paragraph, with more words in it.", "What is it?", ["One more paragraph"]),
]


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tokenizer as GPT-2's is, but of single bytes: its one special token begins, ends and pads."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, END])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def paragraphs(tmp_path: Path) -> str:
    """A directory with the same questions in both splits, as JSON lines and as JSON of the official form."""
    lines = [json.dumps({"context": c, "question": q, "answers": a}) for c, q, a in ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    by_context: dict[str, list] = {}
    for context, question, answers in ROWS:
        texts = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
        by_context.setdefault(context, []).append({"question": question, "answers": texts, "id": "x"})
    qas = [{"context": context, "qas": qas} for context, qas in by_context.items()]
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": qas}]}, indent=1))
    return str(tmp_path)


@pytest.fixture
def books(tmp_path: Path) -> str:
    """A directory with texts of 47 and 100 bytes for training, and 35 for test."""
    for folder, sizes in {"train": [47, 100], "test": [35]}.items():
        (tmp_path / folder).mkdir()
        for i, size in enumerate(sizes):
            text = "".join(string.ascii_letters[(i + j * 7) % 52] for j in range(size))
            (tmp_path / folder / f"{i}.txt").write_text(text)
    return str(tmp_path)


def text_model(task: dict) -> MemoryModel:
    torch.manual_seed(0)
    model = MemoryModel.from_spec(task, BACKBONE, METHOD)
    model.method.eval()
    return model


# --- SQuAD -------------------------------------------------------------------------------------------------


def queries(task: Squad, batch: Batch) -> list[tuple[str, str, str]]:
    """Context, prompt and target of each query as text."""
    found = []
    for row, ids, mask, labels in zip(batch.rows, batch.queries.ids, batch.queries.mask, batch.labels, strict=True):
        context = batch.context.ids[row][batch.context.mask[row]]
        parts = context, ids[mask & (labels == -100)], labels[labels != -100]
        found.append(tuple(task.tokenizer.decode(part) for part in parts))
    return found


def test_both_forms_of_file_give_the_same_samples(paragraphs: str, bytes_tokenizer: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    assert [task.size(split) for split in ("train", "valid", "test")] == [2, 1, 3]
    whole = task.batch("test", 0, 3)
    contexts = list(dict.fromkeys(row[0] for row in ROWS))
    shuffled = [contexts[i] for i in split_indices("test", 0, 3, 3, 0, shuffled=True)]
    wanted = sorted(ROWS, key=lambda row: shuffled.index(row[0]))
    assert queries(task, whole) == [(c, PROMPT.format(q), f" {a[0]}{END}") for c, q, a in wanted]
    assert whole.references == [a for _, _, a in wanted]
    assert whole.rows.tolist() == [shuffled.index(context) for context, _, _ in wanted]
    train = queries(task, task.batch("train", 0, 2)) + queries(task, task.batch("valid", 0, 1))
    assert sorted(train) == sorted(queries(task, whole))


def test_end_tokens_keep_their_loss_and_pads_have_none(paragraphs: str, bytes_tokenizer: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    assert task.pad_id != task.end_id
    batch = task.batch("test", 0, 3)
    assert not batch.queries.mask.all()
    assert torch.equal(batch.queries.mask, batch.queries.ids != task.pad_id)
    assert ((batch.labels == task.end_id).sum(1) == 1).all()
    assert (batch.labels[~batch.queries.mask] == -100).all()


def test_short_squad_and_cuts_are_counted(paragraphs: str, bytes_tokenizer: str) -> None:
    short = Squad(bytes_tokenizer, paragraphs, max_words=5)
    assert short.size("test") == 2
    assert short.notes("test") == ["1 of 3 test contexts are left out: they have more than 5 words"]
    cut = Squad(bytes_tokenizer, paragraphs, max_context=18, answer_length=12)
    assert int(cut.batch("test", 0, 3).context.lengths.max()) == 18
    assert cut.notes("test") == [
        "the end of 2 of 3 test contexts is left out, to keep to 18 tokens; 0 of 4 questions have no answer in what is "
        "left",
        "2 of 4 test targets are longer than 12 tokens and are asked, but cannot be answered whole",
    ]
    assert len(cut.batch("test", 0, 3).rows) == 4
    assert sum("left out" in note for note in cut.notes("train")) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.jsonl",
            '{"context": "a", "question": "b", "answers": ["c"]}\n{oops\n',
            "train.jsonl line 2 is not JSON",
        ),
        ("train.jsonl", '{"context": "a", "question": "b"}\n', "train.jsonl line 1 is no question.*answers"),
        ("train.jsonl", '{"context": "a", "question": "b", "answers": []}\n', "line 1 is no question.*empty"),
        ("train.jsonl", "[1]\n", "line 1 is no question"),
        ("train.json", '{"data":\n [,]}', "train.json line 2 is not JSON"),
        ("train.json", "{}", "needs a list `data`"),
        ("train.json", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "not in the format of SQuAD"),
    ],
)
def test_malformed_files_are_named(name: str, text: str, message: str, bytes_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GradmemError, match=message):
        Squad(bytes_tokenizer, str(tmp_path)).size("train")


def official_scores(guess: str, truths: list[str]) -> tuple[float, float]:
    """Exact match and F1 as the evaluation script of SQuAD v1.1 defines them."""

    def normal(text: str) -> list[str]:
        plain = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", plain).split()

    def f1(truth: str) -> float:
        one, other = normal(guess), normal(truth)
        shared = sum((Counter(one) & Counter(other)).values())
        return 2 * shared / (len(one) + len(other)) if shared else 0.0

    return float(any(normal(guess) == normal(t) for t in truths)), max(map(f1, truths))


def test_scores_are_those_of_squad(bytes_tokenizer: str, paragraphs: str) -> None:
    task = Squad(bytes_tokenizer, paragraphs)
    batch = task.batch("test", 0, 3)
    guess_by_answer = {"The quick fox": " The  quick fox", "ran": "ran ran", "hen": " the red hen!"}
    guesses = [guess_by_answer.get(answers[0], " what") for answers in batch.references]
    generated = [[*task.encode(guess), task.end_id, *task.encode(" more")] for guess in guesses]
    scores = task.judge_generated(generated, batch)
    wanted = [official_scores(g, a) for g, a in zip(guesses, batch.references, strict=True)]
    assert scores["exact_match"].tolist() == [match for match, _ in wanted]
    assert scores["f1"].tolist() == pytest.approx([f1 for _, f1 in wanted])
    assert {0.0, 1.0} == {match for match, _ in wanted}
    assert any(0 < f1 < 1 for _, f1 in wanted)


def test_evaluation_generates_what_asking_gives(bytes_tokenizer: str, tmp_path: Path) -> None:
    """The references are what the untrained model happens to say, the same in part, or something else."""
    task = {"name": "squad", "tokenizer": bytes_tokenizer, "data": str(tmp_path), "answer_length": 9}
    model = text_model(task)
    said = [model.write(context, 1).ask(question) for context, question, _ in ROWS]
    truths = [[f"the {said[0]}"], ["something else"], ["nothing", said[2]], [f"{said[3]} and more"]]
    lines = [json.dumps({"context": c, "question": q, "answers": t}) for (c, q, _), t in zip(ROWS, truths, strict=True)]
    (tmp_path / "dev.jsonl").write_text("\n".join(lines))
    (result,) = evaluate(model, [1])
    assert (result.samples, result.queries, result.source) == (3, 4, str(tmp_path))
    by_context: dict[str, list[tuple[float, float]]] = {}
    for (context, _, _), answer, truth in zip(ROWS, said, truths, strict=True):
        by_context.setdefault(context, []).append(official_scores(answer, truth))
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in by_context.values()]
    match, f1 = (sum(column) / len(means) for column in zip(*means, strict=True))
    assert (result.exact_match, result.metrics["f1"]) == pytest.approx((match, f1))
    assert 0 < match < f1 < 1
    assert {"f1", "unwritten_f1", "swapped_f1", "exact_match", "task"} <= set(result.to_dict())


def test_a_checkpoint_takes_its_tokenizer_along(bytes_tokenizer: str, paragraphs: str, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(bytes_tokenizer, tmp_path / "tokenizer")
    model = text_model({"name": "squad", "tokenizer": str(elsewhere), "data": paragraphs})
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(elsewhere)
    again = gradmem.load((tmp_path / "checkpoint").rename(tmp_path / "moved"))
    assert again.fingerprints == model.fingerprints
    assert str(tmp_path) not in (tmp_path / "moved" / "config.json").read_text()
    assert again.write("Some text.").ask("What?") == model.write("Some text.").ask("What?")
    assert evaluate(again, [0], task={"data": paragraphs})[0].samples == 3


def test_squad_without_data_says_so(bytes_tokenizer: str) -> None:
    with pytest.raises(GradmemError, match="needs `data`"):
        Squad(bytes_tokenizer).size("test")


# --- Text --------------------------------------------------------------------------------------------------


def test_chunks_are_the_files(books: str, bytes_tokenizer: str) -> None:
    task = Text(bytes_tokenizer, books, chunk=10)
    assert [task.size(split) for split in ("train", "valid", "test")] == [13, 1, 3]
    assert task.notes("train") == ["7 tokens at the ends of the training texts, too few for a chunk, are left out"]
    batch = task.batch("test", 0, 3)
    text = (Path(books) / "test" / "0.txt").read_text()
    starts = (10 * split_indices("test", 0, 3, 3, 0, shuffled=True)).tolist()
    assert task.tokenizer.batch_decode(batch.context.ids) == [text[start : start + 10] for start in starts]
    assert torch.equal(batch.labels[:, 1:], batch.context.ids)
    assert (batch.labels[:, 0] == -100).all()
    assert batch.queries.ids[0, :1].tolist() == task.encode_query("anything")


@pytest.mark.parametrize("own", [False, True])
def test_names_of_special_tokens_are_text(own: bool, bytes_tokenizer: str) -> None:
    """In contexts, queries, answers and statements, also where a text is nothing but such a name."""
    text, plain = Text(bytes_tokenizer if own else None, chunk=64), RawText(bytes_tokenizer)
    squad = Squad(bytes_tokenizer)
    for task in (text, plain, squad):
        names = task.tokenizer.all_special_tokens
        assert names
        for name in (*names, f"{names[0]} ", f"x{names[0]}", names[0] * 2):
            wanted = len(name.encode())
            assert len(task.encode(name)) == wanted
            assert not set(task.encode(name)) & set(task.tokenizer.all_special_ids)
            assert task.text(task.encode(name)) == name
            if task is not text:
                assert not set(task.encode_query(name)) & set(task.tokenizer.all_special_ids)
            assert not set(task.encode(task.statement("query", name))) & set(task.tokenizer.all_special_ids)
    begin = text.tokenizer.bos_token
    assert text.encode_query(begin) == text.encode_query("x") == [text.tokenizer.bos_token_id]
    assert text.target("x", begin) == ([text.tokenizer.bos_token_id], text.encode(begin))


@pytest.mark.parametrize("task", [KV(2), Babi("qa1")], ids=["kv", "babi"])
def test_names_of_special_tokens_are_refused_where_letters_are_few(task: Task) -> None:
    for name in task.tokenizer.all_special_tokens:
        if len(name) > 1:  # the end mark of pairs is part of the format
            unknown = {task.tokenizer.unk_token_id}
            assert set(task.encode(name)) & set(task.tokenizer.all_special_ids) == unknown


def test_near_loss_of_the_text_task_is_of_the_answer_alone() -> None:
    torch.manual_seed(0)
    model = MemoryModel.from_spec({"name": "text", "chunk": 16}, BACKBONE, METHOD)
    memory = model.write("the north road")
    answer = model.answer(memory, "whatever", max_new_tokens=14)
    ids = model.task.encode(answer.text)
    with torch.no_grad():
        losses = model.method.token_losses(memory, Tokens.from_lists([ids]))
    assert answer.near_loss == pytest.approx(float(losses.mean()), abs=1e-4)
    assert model.answer(memory, "[BEGIN]", max_new_tokens=14) == answer
    assert len(model.context_ids("[BEGIN]")) == 7


def test_the_first_samples_of_a_split_come_from_all_over_it() -> None:
    found = split_indices("test", 0, 1000, 1000, seed=1, shuffled=True).tolist()
    assert sorted(found) == list(range(1000))
    few = sorted(found[:100])
    assert max(b - a for a, b in zip([0, *few], [*few, 1000], strict=True)) < 80
    assert split_indices("test", 5, 3, 1000, seed=2, shuffled=True).tolist() == found[5:8]


def test_every_byte_is_a_token_where_no_tokenizer_is_named(tmp_path: Path) -> None:
    task, text = Text(), "Ünïcode \u201cquoted\u201d  two spaces\n\ttab [PAD] [END] 漢字"
    assert len(task.encode(text)) == len(text.encode())
    assert task.text(task.encode(text)) == text
    assert task.pad_id not in task.encode(text)
    model = text_model({"name": "text", "chunk": 8})
    model.save_pretrained(tmp_path)
    again = MemoryModel.from_pretrained(tmp_path)
    assert again.restore(again.write(text[:4], 1)) == model.restore(model.write(text[:4], 1))


def test_a_missing_option_is_named() -> None:
    with pytest.raises(GradmemError, match="squad task: missing a required argument: 'tokenizer'"):
        text_model({"name": "squad"})


def test_text_metrics_by_hand(books: str, bytes_tokenizer: str) -> None:
    task = Text(bytes_tokenizer, books, chunk=10)
    batch = task.batch("test", 0, 3)
    targets = batch.labels[:, 1:]
    logits = torch.randn(3, 10, len(task.tokenizer), generator=torch.Generator().manual_seed(0))
    logits[0].scatter_(1, targets[0][:, None], 20.0)
    logits[1, :4].scatter_(1, targets[1, :4, None], 20.0)
    found = task.judge(logits.flatten(0, 1), batch)
    assert found["exact_match"].tolist() == [True, False, False]
    assert found["token_accuracy"].tolist() == (logits.argmax(-1) == targets).double().mean(1).tolist()
    nats = [float(F.cross_entropy(logits[i], targets[i], reduction="sum")) for i in range(3)]
    assert found["bits"].tolist() == pytest.approx([n / 0.6931471805599453 for n in nats], rel=1e-5)
    generated = [targets[0].tolist(), targets[1, :5].tolist(), targets[2].roll(1).tolist()]
    assert task.judge_generated(generated, batch)["generated_accuracy"].tolist() == [1.0, 0.5, 0.0]


def test_exact_chunks_are_the_same_read_and_generated(books: str, bytes_tokenizer: str) -> None:
    """A model that always says the same letter, on chunks of which one is nothing else."""
    (Path(books) / "test" / "0.txt").write_text("eeeeabcdefgh")
    model = text_model({"name": "text", "tokenizer": bytes_tokenizer, "data": books, "chunk": 4})
    letter = model.task.encode("e")[0]
    with torch.no_grad():
        model.method.backbone.head.weight.zero_()
        model.method.backbone.model.get_input_embeddings().weight.copy_(
            torch.randn(len(model.task.tokenizer), 16, generator=torch.Generator().manual_seed(1))
        )
        model.method.backbone.model.base_model.norm.weight.zero_()
    batch = model.task.batch("test", 0, 3)
    scores = model.task.judge_generated([[letter] * 4] * 3, batch)
    shuffled = split_indices("test", 0, 3, 3, 0, shuffled=True)
    assert scores["generated_accuracy"].tolist() == [[1.0, 0.0, 0.25][i] for i in shuffled]
    (result,) = evaluate(model, [1])
    row = result.to_dict()
    # All logits are equal: every byte costs the same with a memory and without.
    assert row["bits"] == pytest.approx(4 * torch.log2(torch.tensor(float(len(model.task.tokenizer)))).item())
    assert row["bits_per_vector"] == pytest.approx(0)
    assert result.exact_match == 0


def test_bits_per_vector(books: str, bytes_tokenizer: str) -> None:
    model = text_model({"name": "text", "tokenizer": bytes_tokenizer, "data": books, "chunk": 5})
    before, after = evaluate(model, [0, 3])
    assert before.bits_per_vector == 0
    assert after.bits_per_vector == pytest.approx((before.metrics["bits"] - after.metrics["bits"]) / 2)
    assert after.to_dict()["unwritten_bits"] == before.metrics["bits"]


def test_text_needs_its_folders(bytes_tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match="folder test or valid"):
        Text(bytes_tokenizer, str(tmp_path)).size("test")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("short")
    with pytest.raises(GradmemError, match="no sample is left: 5 tokens"):
        Text(bytes_tokenizer, str(tmp_path), chunk=10).size("train")


# --- Tokenizers --------------------------------------------------------------------------------------------


@needs("gpt2_tokenizer")
def test_gpt2_pads_with_a_token_of_its_own() -> None:
    tokenizer = pretrained_tokenizer(str(DATA / "gpt2_tokenizer"))
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (50258, 50257, 50256)
    assert tokenizer.unk_token_id is None
    assert tokenizer("Hello there", add_special_tokens=False).input_ids == [15496, 612]


@needs("stories260K_hf")
def test_a_pretrained_backbone_grows_by_the_pad() -> None:
    place = str(DATA / "stories260K_hf")
    model = MemoryModel.from_spec({"name": "text", "tokenizer": place}, {"pretrained": place}, METHOD)
    assert model.task.pad_id == 512
    assert model.method.backbone.head.weight.shape[0] == 513
    assert model.write("Once upon a time").receipts[0].context_tokens == len(model.task.encode("Once upon a time"))


def test_pretrained_models_answer_as_before_but_for_the_pad(bytes_tokenizer: str, tmp_path: Path) -> None:
    fields = {**BACKBONE, "vocab_size": 257, "tie_word_embeddings": True}
    fields.pop("model_type")
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    task = {"name": "text", "tokenizer": bytes_tokenizer}
    ours = MemoryModel.from_spec(task, {"pretrained": str(tmp_path / "llama")}, METHOD).method.backbone.model.eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits[..., :257], theirs(ids).logits, atol=1e-5)


def test_unknown_tokenizer_is_named() -> None:
    with pytest.raises(GradmemError, match="cannot load the tokenizer '/no/such/place'"):
        pretrained_tokenizer("/no/such/place")


# --- Cache and hub -----------------------------------------------------------------------------------------


def test_a_damaged_cache_is_made_again(
    books: str, bytes_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "cache"))
    whole = Text(bytes_tokenizer, books, chunk=10).batch("test", 0, 3).context.ids
    (folder,) = (tmp_path / "cache").iterdir()
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-40]), Path.unlink):
        damage(folder / "context.npy")
        assert torch.equal(Text(bytes_tokenizer, books, chunk=10).batch("test", 0, 3).context.ids, whole)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_cache_place_follows_the_environment(
    books: str, bytes_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    Text(bytes_tokenizer, books, chunk=10).size("test")
    assert list((tmp_path / "xdg" / "gradmem").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(GradmemError, match="set GRADMEM_CACHE"):
        Text(bytes_tokenizer, books, chunk=9).size("test")


def test_orders() -> None:
    assert split_indices("test", 3, 4, 10, 0).tolist() == [3, 4, 5, 6]
    rounds = split_indices("train", 0, 30, 10, 0).reshape(3, 10)
    assert all(sorted(one) == list(range(10)) for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) == 3
    assert split_indices("train", 7, 9, 10, 0).tolist() == rounds.flatten()[7:16].tolist()
    assert split_indices("train", 0, 10, 10, 1).tolist() != rounds[0].tolist()


def test_data_sets_of_the_hub(bytes_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [{"context": c, "question": q, "answers": {"text": a, "answer_start": [0]}} for c, q, a in ROWS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = Squad(bytes_tokenizer, "someone/squad-of-a-test")
    assert task.size("test") == 3
    assert asked == [("someone/squad-of-a-test", None, "validation")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GradmemError, match="pip install datasets"):
        Squad(bytes_tokenizer, "someone/another").size("test")


# --- Evaluation --------------------------------------------------------------------------------------------


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A checkpoint and data of two bAbI tasks."""
    torch.manual_seed(0)
    MemoryModel.from_spec({"name": "babi", "tasks": "qa1"}, BACKBONE, METHOD).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "data").mkdir()
    for task in ("qa1", "qa7"):
        for split in ("train", "test"):
            text = SMALL * 2 if task == "qa7" else SMALL
            (tmp_path / "data" / f"{task}_x_{split}.txt").write_text(text)
    return tmp_path


def test_eval_measures_each_task_separately(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", f"{stories}/data", "--tasks", "qa1,qa7", "--steps", "0,1", "--json", f"{stories}/e.json"]
    assert main(["eval", f"{stories}/checkpoint", *options]) == 0
    rows = json.loads((stories / "e.json").read_text())
    assert [(row["task"], row["steps"], row["samples"], row["queries"]) for row in rows] == [
        ("qa1", 0, 3, 4),
        ("qa1", 1, 3, 4),
        ("qa7", 0, 6, 8),
        ("qa7", 1, 6, 8),
    ]
    assert {"exact_match", "ci95", "unwritten", "swapped", "source"} <= set(rows[0])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("control: unwritten") == shown.count("control: swapped") == 2
    assert "qa7: 6 of 6 test contexts occur word for word in the training files" in shown


def test_generated_contexts_are_labelled(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"{stories}/checkpoint", "--samples", "4", "--json", f"{stories}/e.json"]) == 0
    assert [row["source"] for row in json.loads((stories / "e.json").read_text())] == ["generated"]
    assert "(generated)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--taskz", "qa1"], "unknown babi task option 'taskz': did you mean 'tasks'"),
        (["--tasks", "qa99"], "unknown bAbI task 'qa99'"),
        (["--pairs", "4"], "unknown babi task option 'pairs'"),
        (["--data", "/no/such/place"], "no data at /no/such/place"),
        (["--tasks", "qa3", "--samples", "2"], "contexts have .* the limit of"),
    ],
)
def test_bad_task_options(stories: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shallow = json.loads((stories / "checkpoint" / "config.json").read_text())
    shallow["backbone"]["max_position_embeddings"] = 32
    (stories / "checkpoint" / "config.json").write_text(json.dumps(shallow))
    assert main(["eval", f"{stories}/checkpoint", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
