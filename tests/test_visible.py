"""What files, stores and people say stands on a terminal as text: it obeys none of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradmem import GradmemError, Memory
from gradmem.cli.main import main
from gradmem.errors import require, unknown
from gradmem.store import Store
from gradmem.visible import shown_on, visible
from stored import made

TITLE = "\x1b]0;mine\x07"
"""What sets the title of a terminal's window."""
ESCAPES = [TITLE, "\x9b31m", "\r", "\b", "\x7f", "\u202e", "\u2028", "\x00", "\udc80"]


def obeyed(text: str) -> list[str]:
    """Characters that are neither shown nor the end of a line."""
    return [one for one in text if not one.isprintable() and one != "\n"]


@pytest.mark.parametrize("escape", ESCAPES)
def test_what_a_terminal_would_obey_is_shown_as_signs(escape: str) -> None:
    assert not obeyed(visible(f"a{escape}b\n"))
    assert len(visible(escape)) == len(escape)
    assert not obeyed(str(GradmemError(f"no memory file at {escape}")))
    assert visible("Zoë: 東京\u3000👩\u200d🚀\tx\n") == "Zoë: 東京\u3000👩\u200d🚀\tx\n"


def test_a_message_repeats_only_so_much_of_what_was_given() -> None:
    long = "x" * 10**6
    with pytest.raises(GradmemError) as refused:
        require("a name", long, False, "short")
    for error in (refused.value, unknown("checkpoint", long, ["kv-16"]), GradmemError(long)):
        assert len(str(error)) <= 2000


def test_programs_are_given_the_text_as_it_is() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert shown_on(io.StringIO(), TITLE) == TITLE
    assert not obeyed(shown_on(Terminal(), TITLE))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_file(path: Path, tensor: str = "memory", **receipt: str) -> Path:
    """Write a memory file as anybody may make one."""
    memory = made(1)
    return Memory({tensor: memory.tensors["memory"]}, [replace(memory.receipts[0], **receipt)]).save(path)


def test_markup_and_escapes_in_files_and_names_are_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An end of markup that has no beginning ended in a traceback."""
    path = write_file(place / f"m[bold]{TITLE}".replace("/", ""), method="[/a]", model=":smile:[red]x[/red][/]")
    assert main(["inspect", str(path)]) == 0
    assert main(["store", "import", str(path), "--name", "[/x]", "--tags", "[/y]"]) == 0
    assert main(["store", "ls"]) == main(["store", "show", "[/x]"]) == 0
    assert main(["store", "export", "[/x]", "-o", f"out{TITLE}"]) == 0
    printed = capsys.readouterr()
    assert not obeyed(printed.out + printed.err)
    for text in ("m[bold]", "[/a], checkpoint ':smile:[red]x[/red][/]'", "[/x]", "[/y]"):
        assert text in printed.out


def test_names_that_a_file_cannot_have_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        write_file(place / "a", tensor=f"memory{TITLE}"),
        write_file(place / "b", tensor="m" * 10**6),
    ]
    for name, value in (("model", "m" * 10**6), ("checkpoint", "c" * 65), ("method", TITLE), ("model", "a\n")):
        with pytest.raises(ValueError, match=f"receipt's {name}"):
            replace(made(1).receipts[0], **{name: value})
        data = made(1).to_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        receipts = json.loads(header["__metadata__"]["records"])
        header["__metadata__"]["records"] = json.dumps([{**receipts[0], name: value}])
        written = json.dumps(header).encode()
        file = place / f"{name}{len(value)}"
        file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + int.from_bytes(data[:8], "little") :])
        files.append(file)
    for file in files:
        for command in (["inspect", str(file)], ["store", "import", str(file)]):
            assert main(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "damaged or no memory file" in line
            assert not obeyed(line)
            assert len(line) < 2100
    with Store() as store:
        assert not store.list()


@pytest.mark.parametrize(
    "arguments",
    [
        [f"{TITLE}"],
        ["inspect", f"none{TITLE}"],
        ["ask", f"none{TITLE}", "a7"],
        ["write", f"none{TITLE}", "none"],
        ["plan", "kv-16", "--task", f"{{name: {TITLE}}}"],
        ["plan", "recipe.yaml", "--help"],
    ],
)
def test_no_message_moves_the_cursor(arguments: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.yaml").write_text('extends: kv-16\nprecision: "\\e]0;mine\\a"\n')
    Store().close()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not obeyed(printed.out + printed.err)
