"""Models of llm for the memories of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llm", reason="llm is not installed: pip install llm")

import llm
import llm_gradmem

import gradmem
from chat_models import save_model
from gradmem.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    save_model(folder / "lm")
    language_model = gradmem.load(folder / "lm", {"name": "compact", "writers": "select", "budget": 0.9})
    with Store(folder / "store.db") as store:
        store.write(gradmem.load("kv-16"), "a7:Qz\nk2:9f", name="pairs")
        store.write(gradmem.load("kv-16"), "zz:aa")
        store.write(language_model, "Ann signed the report.", name="report")
    return folder


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, llm.Model]:
    monkeypatch.setenv("GRADMEM_STORE", str(folder / "store.db"))
    found = {}

    def register(model: llm.Model, aliases: Any = None) -> None:
        for name in (model.model_id, *(aliases or ())):
            found[name] = model

    llm_gradmem.register_models(register)
    return found


@pytest.fixture
def report(models: dict[str, llm.Model], folder: Path) -> Any:
    """Ask the language model's memory: `report(prompt, **options)` starts or goes on with a conversation."""
    return models["gradmem/report"], {"checkpoint": str(folder / "lm")}


def test_every_memory_is_a_model(models: dict[str, llm.Model], folder: Path) -> None:
    with Store(folder / "store.db") as store:
        names = [[entry.name, entry.id] for entry in store.list()]
    assert models.keys() == {f"gradmem/{one}" for pair in names for one in pair if one}
    unnamed = next(id for name, id in names if name is None)
    assert models["gradmem/pairs"].prompt("a7").text() == "Qz"
    assert models[f"gradmem/{unnamed}"].prompt("zz").text() == "aa"


def test_an_answer_is_that_of_the_memory(report: Any, folder: Path) -> None:
    model, options = report
    with Store(folder / "store.db") as store:
        memory = store.open("report", checkpoint=options["checkpoint"])
    asked = [f"Who signed {thing}?" for thing in ("it", "the report", "this", "that", "both", "these")]
    question, answer = max(zip(asked, memory.answer(asked), strict=True), key=lambda pair: pair[1].answer_tokens)
    assert answer.answer_tokens > 3  # or nothing is tested here
    assert "".join(model.prompt(question, **options)) == answer.text
    whole = model.prompt(question, stream=False, **options)
    assert list(whole) == [answer.text]
    assert whole.usage().output == whole.response_json["answer_tokens"] == answer.answer_tokens
    short = model.prompt(question, max_tokens=3, **options)
    assert short.text() == memory.ask(question, max_new_tokens=3)
    assert short.usage().output == 3
    assert model.prompt(question, **options).text() == answer.text  # a limit is of one answer only


def test_the_conversation_is_read(report: Any, folder: Path) -> None:
    model, options = report
    conversation = model.conversation()
    first = conversation.prompt("Who signed it?", system="Be short.", **options).text()
    second = conversation.prompt("And when?", **options)
    with Store(folder / "store.db") as store:
        memory = store.open("report", checkpoint=options["checkpoint"])
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who signed it?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And when?"},
    ]
    ids = memory.model.encoder.query_ids(turns)
    assert second.text() == memory.model.answer_ids(memory, memory.prefix, [0], [ids])[0].text
    assert second.usage().input == len(ids) > len(memory.model.encoder.query_ids("And when?"))


def test_errors_say_what_to_do(models: dict[str, llm.Model], report: Any, folder: Path) -> None:
    model, options = report
    gradmem.model.checkpoint_model.NAMED.clear()  # as in a process that has not loaded the model
    with pytest.raises(llm.ModelError, match="-o checkpoint"):
        model.prompt("Who?").text()
    with pytest.raises(llm.ModelError, match=r"no directory|unknown"):
        model.prompt("Who?", checkpoint="nothing-here").text()
    with pytest.raises(llm.ModelError, match="there is no question"):
        model.prompt("", **options).text()
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        model.prompt("Who?", max_tokens=0)
    with Store(folder / "store.db") as store:
        gone = store.write(gradmem.load("kv-16"), "b1:c2")
        store.delete(gone.id)
    with pytest.raises(llm.ModelError, match="no memory"):
        llm_gradmem.StoredMemory(gone).prompt("b1").text()


def test_without_a_store_there_are_no_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def register(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setenv("GRADMEM_STORE", str(tmp_path / "none.db"))
    llm_gradmem.register_models(register)
    assert capsys.readouterr().err == ""
    (tmp_path / "none.db").write_text("something else")
    llm_gradmem.register_models(register)
    assert capsys.readouterr().err.startswith("gradmem: ")
