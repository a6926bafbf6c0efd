"""`gradmem store`, and the store in `write` and `ask`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_models import save_model
from gradmem import Memory, MemoryModel, load
from gradmem.cli.main import main
from gradmem.receipts import text_digest
from gradmem.store import Store
from stored import made

PAIRS = "a7:Qz\nk2:9f\n"


@pytest.fixture
def place(tiny: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a checkpoint and a text."""
    tiny.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "pairs.txt").write_text(PAIRS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that works, and return what it prints."""
    capsys.readouterr()
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_write_ask_and_all_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write = ["write", "checkpoint", "pairs.txt", "--store", "--name", "notes", "--tags", "work,kv"]
    assert "stored notes" in run(capsys, *write)
    assert not (place / "memory.safetensors").exists()
    entry = Store().get("notes")
    assert entry.tags == ("kv", "work")
    assert entry.id in run(capsys, *write, "-o", "m.safetensors")
    assert (place / "m.safetensors").read_bytes() == Store().read("notes")
    asked = ["a7", "k2"]
    answers = run(capsys, "ask", "m.safetensors", *asked)
    assert run(capsys, "ask", "notes", *asked) == run(capsys, "ask", entry.id, *asked) == answers

    assert json.loads(run(capsys, "store", "ls", "--tags", "kv", "--json")) == [json.loads(json.dumps(entry.to_dict()))]
    assert "notes" in run(capsys, "store", "ls", "--since", "2020-01-01", "--name", "no*")
    assert "notes" not in run(capsys, "store", "ls", "--until", "2020-01-01")
    shown = json.loads(run(capsys, "store", "show", "notes", "--json"))
    assert [version["number"] for version in shown["versions"]] == [1]
    assert entry.id in run(capsys, "store", "show", "notes")
    run(capsys, "store", "export", "notes", "-o", "copy.safetensors")
    assert (place / "copy.safetensors").read_bytes() == Store().read("notes")

    run(capsys, "store", "rename", "notes", "new [name]")
    assert "new [name]" in run(capsys, "store", "ls")
    run(capsys, "store", "tag", "new [name]", "one")
    run(capsys, "store", "pin", "new [name]")
    assert main(["store", "rm", "new [name]"]) == 2
    assert "deleted 0" in run(capsys, "store", "rm", "--tags", "one")
    run(capsys, "store", "pin", "new [name]", "--off")
    run(capsys, "store", "rename", "new [name]")
    assert "deleted 1" in run(capsys, "store", "rm", entry.id)
    run(capsys, "store", "import", "m.safetensors", "copy.safetensors", "--tags", "back")
    (back,) = Store().list(tags="back")
    assert Memory.load("m.safetensors").receipts == Store().load(back.id).receipts


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with Store() as store:
        store.put(made(1, lost=(1,)), name="notes")
        store.update("notes", made(2, lost=(3,), tokens=8))
    found = json.loads(run(capsys, "store", "diff", "notes", "1", "2", "--json"))
    assert (found["lost"], found["regained"], found["added"]) == ([[0, 3]], [[0, 1]], 2)
    assert "1 at 3" in run(capsys, "store", "diff", "notes", "1", "2")
    assert "version 1" in run(capsys, "store", "rollback", "notes", "1")
    assert Store().get("notes").current.number == 1
    assert "current" in run(capsys, "store", "show", "notes")


def test_rm_deletes_all_that_is_named_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Store() as store:
        for seed in range(3):
            store.put(made(seed), name=f"m{seed}")
        store.pin("m2")
        assert main(["store", "rm", "m0", "m1", "m2"]) == main(["store", "rm", "m0", "none"]) == 2
        assert len(store.list()) == 3
        assert "deleted 2" in run(capsys, "store", "rm", "m0", "m1", "m0")
        assert [entry.name for entry in store.list()] == ["m2"]


def test_appending_is_refused_or_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that was never trained to append, and a receipt that does not say what nobody measured."""
    run(capsys, "write", "checkpoint", "pairs.txt", "--store", "--name", "notes")
    (place / "more.txt").write_text("b1:c2")
    assert main(["store", "append", "notes", "more.txt"]) == 2
    assert "was never trained to append" in capsys.readouterr().err
    assert Store().get("notes").current.number == 1
    told = run(capsys, "store", "append", "notes", "more.txt", "--may-forget")
    assert "none" not in told
    assert told.count("not measured") >= 3
    assert "measured" in run(capsys, "store", "show", "notes")
    found = json.loads(run(capsys, "store", "diff", "notes", "1", "2", "--json"))
    assert found["unmeasured"] == found["before"]["tokens"] > 0
    assert (found["lost"], found["regained"]) == ([], [])
    told = run(capsys, "store", "append", "notes", "more.txt", "--may-forget", "--before", "pairs.txt")
    assert json.loads(run(capsys, "store", "show", "notes", "--json"))["versions"][2]["unmeasured"] > 0  # "b1:c2", once
    run(capsys, "store", "export", "notes", "-o", "m.safetensors")
    assert "not measured since more was written" in run(capsys, "inspect", "m.safetensors")


def test_appending_to_a_compacted_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its chunks are read together, so more of them lose nothing; they are written with the options of the memory."""
    parts = ["Ann signed the paper.\n", "The code is 4711.\n"]
    for part in parts:
        (place / "part.txt").write_text(part)
        first = part is parts[0]
        line = ["write", save_model(place / "lm"), "part.txt", "--store", "--name", "paper", "--budget", "0.5"]
        run(capsys, *(line if first else ["store", "append", "paper", "part.txt", "--checkpoint", "lm"]))
    model = load("lm", {"budget": 0.5})
    found = model.bind(Store().load("paper"))
    assert [receipt.context_sha256 for receipt in found.receipts] == list(map(text_digest, parts))
    assert found.ask("Who signed?") == model.join([model.write(part) for part in parts]).ask("Who signed?")
    assert main(["store", "append", "paper", "part.txt", "--checkpoint", "lm", "--before", "part.txt"]) == 2
    assert "stays as it is" in capsys.readouterr().err


def test_listing_in_pages(capsys: pytest.CaptureFixture[str]) -> None:
    with Store() as store:
        for seed in range(5):
            store.put(made(seed), name=f"m{seed}")
    first = run(capsys, "store", "ls", "--limit", "3")
    cursor = first.split("--after ")[1].strip()
    rest = run(capsys, "store", "ls", "--limit", "3", "--after", cursor)
    assert [name in first for name in ("m4", "m3", "m2", "m1")] == [True, True, True, False]
    assert [name in rest for name in ("m2", "m1", "m0", "--after")] == [False, True, True, False]


BAD = {
    "no command": (["store"], "COMMAND|subcommand"),
    "no store yet": (["store", "ls"], "no store at .* `gradmem write --store` creates one"),
    "neither file nor kept": (["ask", "notes", "a7"], "no memory file at notes, and no store at"),
    "too long for a file": (["ask", "n" * 5000, "a7"], "no memory file"),
    "name without store": (["write", "checkpoint", "pairs.txt", "--name", "notes"], "need --store"),
    "unknown in a store": (["store", "show", "other"], "no memory 'other' in"),
    "ask what is not kept": (["ask", "other", "a7"], "no memory file at other, and no memory 'other' in"),
    "taken": (["write", "checkpoint", "pairs.txt", "--store", "--name", "notes"], "'notes' is taken"),
    "checkpoint is gone": (["ask", "notes", "a7"], "'model-c' wrote it, .*--checkpoint model-c"),
    "bad name": (["store", "rename", "notes", "a*"], "a name must be"),
    "bad date": (["store", "ls", "--since", "soon"], "soon"),
    "bad limit": (["store", "ls", "--limit", "0"], "limit must be"),
    "bad cursor": (["store", "ls", "--after", "x"], "not a cursor"),
    "bad version": (["store", "rollback", "notes", "9"], "no version 9"),
    "version in words": (["store", "diff", "notes", "one", "2"], "one"),
    "rm of nothing": (["store", "rm"], "name the memories to delete"),
    "rm of an empty filter": (["store", "rm", "--tags", ""], "name the memories to delete"),
    "rm of no tag": (["store", "rm", "--tags", ","], "a tag must be"),
    "rm of two kinds": (["store", "rm", "notes", "--tags", "a"], "name the memories to delete"),
    "export to nowhere": (["store", "export", "notes", "-o", "pairs.txt/m"], "cannot write"),
    "import of text": (["store", "import", "pairs.txt"], "damaged or no memory file"),
    "import of nothing": (["store", "import", "none"], "no memory file at none"),
    "import under one name": (["store", "import", "a", "b", "--name", "n"], "fits one memory file, not 2"),
}
EMPTY = ("no command", "no store yet", "neither file nor kept", "too long for a file", "name without store")


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    if case not in EMPTY:
        Store().put(made(1), name="notes")
    arguments, message = BAD[case]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("gradmem: error: ")
    assert re.search(message, line), line
    assert (place / "own").exists() == (case not in EMPTY)
    assert case in EMPTY or Store().get("notes")


def test_upkeep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "in the database" in run(capsys, "write", "checkpoint", "pairs.txt", "--store") + run(
        capsys, "store", "payloads"
    )
    assert f"{place}/objects" in run(capsys, "store", "payloads", "--url", "objects")
    assert f"file://{place}/objects" in run(capsys, "store", "payloads")
    assert "removed 0" in run(capsys, "store", "clean")
    assert "the newest one" in run(capsys, "store", "upgrade")
    assert main(["store", "payloads", "--url", "nothing://bucket"]) == 2
    assert "cannot write nothing://bucket/" in capsys.readouterr().err
