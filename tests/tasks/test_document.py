"""The task of any text: token ids against the chat template itself, and templates that are no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat_models import CHATML, save_tokenizer
from gradmem import GradmemError
from gradmem.tasks.document import INSTRUCTION, Document
from gradmem.tasks.kv import KV

TURNS = (
    "{{ bos_token or '' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""A template without names of roles, as Mistral has one."""
TEXT = "Ann signed it.\n<|im_end|> is no mark."
ASKED = {"role": "user", "content": "Who <|im_end|> signed?"}


@pytest.fixture
def task(tmp_path: Path) -> Document:
    return Document(save_tokenizer(tmp_path))


def rendered(task: Document, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a whole conversation, by the template."""
    options: dict[str, Any] = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    ids: list[int] = task.tokenizer.apply_chat_template(messages, **options)
    return ids


@pytest.mark.parametrize("template", [CHATML, TURNS], ids=["chatml", "inst"])
def test_the_turn_is_that_of_the_template(tmp_path: Path, template: str) -> None:
    """Text and question are plain here; before, between and after them stands what the template says."""
    task, text, question = Document(save_tokenizer(tmp_path, template)), "Ann signed it.", "Who signed?"
    assert task.text([task.end_id]) == ("<|im_end|>" if template == CHATML else "<|end|>")
    ids = [*task.before_context, *task.encode(text), *task.encode_query(question)]
    assert ids == rendered(task, [{"role": "user", "content": f"{INSTRUCTION}{text}\n\nQuestion: {question}"}])


@pytest.mark.parametrize("template", [CHATML, TURNS], ids=["chatml", "inst"])
def test_a_conversation_is_that_of_the_template(tmp_path: Path, template: str) -> None:
    task = Document(save_tokenizer(tmp_path, template))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Ask me."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "tool", "content": "{}"},
        {"role": "user", "content": "When"},
        {"role": "user", "content": "and why?"},
        {"role": "assistant", "content": "Late."},
    ]
    wanted = [
        {"role": "user", "content": f"{INSTRUCTION}Text.\n\nBe brief.\n\nQuestion: Who?"},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Question: When\n\nand why?"},
    ]
    ids = [*task.before_context, *task.encode("Text."), *task.encode_conversation(messages)]
    assert ids == rendered(task, wanted)
    assert task.encode_conversation(messages[:2]) == []


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_what_people_write_is_never_a_special_token(tmp_path: Path, template: str | None) -> None:
    task = Document(save_tokenizer(tmp_path, template))
    special = set(task.tokenizer.all_special_ids)
    # A mark of the same length, which is no special token, leaves the same special tokens at the same places.
    harmless = {"role": "user", "content": ASKED["content"].replace("<|im_end|>", "<|xx_xxx|>")}
    answered = {"role": "assistant", "content": "<|im_start|>"}
    for messages, others in (
        ([ASKED], [harmless]),
        ([ASKED, answered, ASKED], [harmless, {**answered, "content": "<|xx_xxxxx|>"}, harmless]),
    ):
        found, wanted = ([i in special for i in task.encode_conversation(some)] for some in (messages, others))
        assert found == wanted
        assert any(found) == (template is not None)
    assert not special & set(task.encode(TEXT))
    assert not special & set(task.target("x", TEXT)[1][:-1])


def test_an_answer_ends_with_its_turn(task: Document) -> None:
    named = task.tokenizer.convert_ids_to_tokens
    assert named(task.end_id) == "<|im_end|>"
    assert named(task.end_ids) == ["<|im_end|>", "<|end|>"]
    said = task.encode(" Ann.\nBob. ")
    for end in task.end_ids:
        assert task.decode([*said, end, *said]) == "Ann.\nBob."
    assert task.settled(said[:5]) == "Ann."
    assert task.target("Who?", "Ann") == (task.encode_query("Who?"), [*task.encode("Ann"), task.end_id])


def test_without_a_template_an_answer_is_one_line(tmp_path: Path) -> None:
    task = Document(save_tokenizer(tmp_path, None))
    prompt = [*task.before_context, *task.encode("Ann signed."), *task.encode_query("Who?")]
    assert task.text(prompt) == f"{INSTRUCTION}Ann signed.\n\nQuestion: Who?\nAnswer:"
    assert set(map(task.text, ([one] for one in task.end_ids))) == {"\n", "<|end|>"}
    assert task.decode(task.encode(" Ann\nQuestion: Who else?")) == "Ann"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}, ASKED]
    asked = f"\n\nQuestion: Who?\nAnswer: Ann\n\nQuestion: {ASKED['content']}\nAnswer:"
    assert task.text(task.encode_conversation(turns)) == asked


def test_a_template_without_system_turns_is_good(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    task = Document(save_tokenizer(tmp_path, strict))
    said = {"role": "system", "content": "Be brief."}
    assert task.encode_conversation([said, ASKED])[: len("\n\nBe brief.")] == task.encode("\n\nBe brief.")


def test_a_template_tells_the_same_date_every_day(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y') }}" + CHATML
    task = Document(save_tokenizer(tmp_path, dated))
    assert task.text(task.before_context).startswith("26 July 2024<|im_start|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("m.content", "m.content.lower()"), "changes what is said"),
        (CHATML.replace("{{ m.content }}", ""), "changes what is said"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "changes what is said"),
        ("{{ raise_exception('never') }}", "fails: never"),
        ("{% if %}", "fails"),
    ],
)
def test_other_templates_are_refused(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(GradmemError, match=f"the chat template of this model.* ?{words}") as caught:
        Document(save_tokenizer(tmp_path, template))
    assert "\n" not in str(caught.value)


def test_other_tasks_read_the_last_question(task: Document) -> None:
    pairs = KV(2)
    turns = [{"role": "user", "content": "a7"}, {"role": "user", "content": "k2"}, {"role": "assistant", "content": ""}]
    assert pairs.encode_conversation(turns) == pairs.encode_query("k2") != pairs.encode_query("a7")
    assert pairs.before_context == []
    assert task.encode_query(" \n") == []


@pytest.mark.parametrize(
    ("text", "chunk"),
    [
        ("One, two, three. Ten.\n\nNow. A", "One, two, three. Ten.\n\n"),
        ("One. Two.\n\nThree and four and five. Six", "One. Two.\n\nThree and four and five. "),
        ('One. He said then "two." Three', 'One. He said then "two." '),
        ("One. Two three and four\nfive", "One. Two three and four\n"),
        ("One. Two three four fi", "One. Two three four "),
        ("One. Twothreefour", "One. Twothreefour"),
        ("\u4e00\u4e8c\u3002\u4e09\u56db\u3002\u4e94", "\u4e00\u4e8c\u3002\u4e09\u56db\u3002"),
        ("abc", "abc"),
    ],
)
def test_a_chunk_ends_where_a_reader_would_stop(task: Document, text: str, chunk: str) -> None:
    """In its last quarter, so that chunks do not get small."""
    assert text[: task.chunk_end(text)] == chunk
