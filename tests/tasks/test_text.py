"""The text task: chunks of files, and the metrics of compression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gradmem import GradmemError, MemoryModel
from gradmem.batch import Tokens
from gradmem.data import split_indices
from gradmem.evaluation import evaluate
from gradmem.tasks.text import Text
from helpers import TINY_GRADMEM, TINY_LLAMA, text_model


def test_chunks_are_the_files(books: str, bytes_tokenizer: str) -> None:
    task = Text(bytes_tokenizer, books, chunk_size=10)
    assert [task.size(split) for split in ("train", "valid", "test")] == [13, 1, 3]
    assert task.notes("train") == ["7 tokens at the ends of the training texts, too few for a chunk, are left out"]
    batch = task.batch("test", 0, 3)
    text = (Path(books) / "test" / "0.txt").read_text()
    starts = (10 * split_indices("test", 0, 3, 3, 0, shuffled=True)).tolist()
    assert task.tokenizer.batch_decode(batch.context.ids) == [text[start : start + 10] for start in starts]
    assert torch.equal(batch.labels[:, 1:], batch.context.ids)
    assert (batch.labels[:, 0] == -100).all()
    with pytest.warns(UserWarning, match="recites a text and does not answer questions"):
        assert batch.queries.ids[0, :1].tolist() == task.encode_query("anything")


def test_near_loss_of_the_text_task_is_of_the_answer_alone() -> None:
    torch.manual_seed(0)
    model = MemoryModel.from_spec({"name": "text", "chunk_size": 16}, TINY_LLAMA, TINY_GRADMEM)
    memory = model.write("the north road")
    with pytest.warns(UserWarning, match="recites"):
        answer = memory.answer("whatever", max_new_tokens=14)
    ids = model.task.encode(answer.text)
    with torch.no_grad():
        asked = Tokens.from_lists([[*model.task.encode_query(""), *ids[:-1]]])
        losses = F.cross_entropy(model.method.read(memory, asked)[0, 1:], torch.tensor(ids))
    assert answer.near_loss == pytest.approx(float(losses), abs=1e-4)
    assert memory.answer("[BEGIN]", max_new_tokens=14) == answer
    assert len(model.encoder.context_ids("[BEGIN]")) == 7


@pytest.mark.parametrize("chunks", [[14], [8, 6]])
def test_a_text_is_read_back_by_the_query_that_training_asks(chunks: list[int]) -> None:
    """The reconstruction and the losses of the receipt, against READ token by token; each chunk has its own memory."""
    torch.manual_seed(0)
    model = MemoryModel.from_spec({"name": "text", "chunk_size": 16}, TINY_LLAMA, TINY_GRADMEM)
    if len(chunks) > 1:
        model.configure({"chunk_size": 8, "chunk_mode": "independent"})
    memory, text = model.write("the north road"), model.task.encode("the north road")
    found: list[int] = []
    losses: list[float] = []
    parts = model.method.split_chunks(memory)
    for row, length in enumerate(chunks):
        part = parts.select([row])
        begin, own = model.task.encode_query(""), list[int]()
        with torch.no_grad():
            for _ in range(length):
                own.append(int(model.method.read(part, Tokens.from_lists([[*begin, *own]]))[0, -1].argmax()))
            true = text[len(found) : len(found) + length]
            logits = model.method.read(part, Tokens.from_lists([[*begin, *true[:-1]]]))[0, 1:]
        losses += F.cross_entropy(logits, torch.tensor(true), reduction="none").tolist()
        found += own
    assert memory.reconstruct() == [found]
    assert memory.receipts[0].token_losses == pytest.approx(losses, abs=1e-3)


def test_every_byte_is_a_token_where_no_tokenizer_is_named(tmp_path: Path) -> None:
    task, text = Text(), "Ünïcode \u201cquoted\u201d  two spaces\n\ttab [PAD] [END] 漢字"
    assert len(task.encode(text)) == len(text.encode())
    assert task.text(task.encode(text)) == text
    assert task.pad_id not in task.encode(text)
    model = text_model({"name": "text", "chunk_size": 8})
    model.save_pretrained(tmp_path)
    again = MemoryModel.from_pretrained(tmp_path)
    assert again.write(text[:4], 1).restore() == model.write(text[:4], 1).restore()


def test_text_metrics_by_hand(books: str, bytes_tokenizer: str) -> None:
    task = Text(bytes_tokenizer, books, chunk_size=10)
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
    model = text_model({"name": "text", "tokenizer": bytes_tokenizer, "data": books, "chunk_size": 4})
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
    model = text_model({"name": "text", "tokenizer": bytes_tokenizer, "data": books, "chunk_size": 5})
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
        Text(bytes_tokenizer, str(tmp_path), chunk_size=10).size("train")
