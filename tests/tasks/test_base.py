"""What all tasks share: special tokens are text, and missing options are named."""

from __future__ import annotations

import pytest

from gradmem import GradmemError
from gradmem.tasks.babi import Babi
from gradmem.tasks.base import Task
from gradmem.tasks.kv import KV
from gradmem.tasks.raw_text import RawText
from gradmem.tasks.squad import Squad
from gradmem.tasks.text import Text
from helpers import text_model


@pytest.mark.filterwarnings("ignore:this model recites")
@pytest.mark.parametrize("own", [False, True])
def test_names_of_special_tokens_are_text(own: bool, bytes_tokenizer: str) -> None:
    """In contexts, queries, answers and statements, also where a text is nothing but such a name."""
    text, plain = Text(bytes_tokenizer if own else None, chunk_size=64), RawText(bytes_tokenizer)
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


def test_a_missing_option_is_named() -> None:
    with pytest.raises(GradmemError, match="squad task: missing a required argument: 'tokenizer'"):
        text_model({"name": "squad"})
