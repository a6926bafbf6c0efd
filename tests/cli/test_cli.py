"""The command line: every command, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import gradmem
from gradmem import GradmemError, Memory, MemoryModel, Written
from gradmem.cli.console import progress_bar
from gradmem.cli.evaluation import Ints
from gradmem.cli.main import COMMANDS, main
from gradmem.store import Store

load = lru_cache(gradmem.load)

PAIRS = "a7:Qz\nk2:9f\nzz:aa\n"


@pytest.fixture(scope="module")
def place(tiny: MemoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a text, and a memory of it."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_pretrained(folder / "checkpoint")
    (folder / "pairs.txt").write_text(PAIRS)
    assert main(["write", f"{folder}/checkpoint", f"{folder}/pairs.txt", "-o", f"{folder}/m.safetensors"]) == 0
    return folder


def test_ask_arguments_stdin_and_python_agree(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    assert main(["ask", f"{place}/m.safetensors", "a7", "zz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("a7\n\nzz\n"))
    assert main(["ask", f"{place}/m.safetensors"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"query": "a7", "answer": lines[0]}, {"query": "zz", "answer": lines[1]}]


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{place}/m.safetensors", "--json"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert receipt["context_tokens"] == 22
    assert main(["inspect", f"{place}/m.safetensors"]) == 0
    without = capsys.readouterr().out
    assert "Qz" not in without
    assert main(["inspect", f"{place}/m.safetensors", "--context", f"{place}/pairs.txt"]) == 0
    assert "!a7:Qz!!k2:9f!!zz:aa!|" in capsys.readouterr().out


def test_inspect_refuses_another_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text(PAIRS.replace("Qz", "Qy"))
    assert main(["inspect", f"{place}/m.safetensors", "--context", f"{tmp_path}/other.txt"]) == 2
    assert "is not the text" in capsys.readouterr().err


def test_eval(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pairs", "2,3", "--steps", "0,2", "--samples", "4", "--seed", "9", "--json", f"{tmp_path}/e.json"]
    assert main(["eval", f"{place}/checkpoint", *arguments]) == 0
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [(row["pairs"], row["steps"]) for row in rows] == [(2, 0), (2, 2), (3, 0), (3, 2)]
    assert {(row["samples"], row["seed"]) for row in rows} == {(4, 9)}
    shown = capsys.readouterr().out
    assert shown.count("control: unwritten") == shown.count("control: swapped") == 2


def test_figure(place: Path, tmp_path: Path) -> None:
    assert (
        main(["eval", f"{place}/checkpoint", "--steps", "0..2", "--samples", "2", "--figure", f"{tmp_path}/f.png"]) == 0
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_demo_with_own_pairs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pairs", f"{place}/pairs.txt", "--output", f"{tmp_path}/out", "--samples", "2"]
    assert main(["demo", "--english", "null", f"--checkpoint={place}/checkpoint", *options]) == 0
    shown = capsys.readouterr().out
    for key, value in (line.split(":") for line in PAIRS.split()):
        assert key in shown
        assert value in shown
    assert (tmp_path / "out" / "steps.png").exists()
    story, measured = shown.index("a story"), shown.index("control: unwritten")
    assert story < measured, "answers come first"
    told = shown[story:measured]
    assert told.count("Where is") == told.count("✓") == 4


def test_demo_measures_only_when_asked_to(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pairs", f"{place}/pairs.txt", "--output", f"{tmp_path}/out", "--story", "null"]
    assert main(["demo", "--english", "null", f"--checkpoint={place}/checkpoint", *options]) == 0
    assert "control" not in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["memory.safetensors"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "kv-32" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "eval", "write", "ask", "inspect", "demo"])
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "default: " in capsys.readouterr().out


def test_train_help_shows_the_values_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "kv-32", "--help"])
    assert "'pairs': 32" in " ".join(capsys.readouterr().out.split()).replace('"', "'")


BAD = {
    "unknown command": (["remember"], "invalid choice"),
    "no command": ([], "COMMAND|subcommand"),
    "unknown recipe": (["train", "kv-33"], "did you mean 'kv-32'"),
    "unknown option": (["train", "kv-32", "--sed", "1"], "--sed"),
    "unknown method": (["train", "kv-32", "--method.name", "gradmen", "--output", "{t}/r"], "did you mean 'gradmem'"),
    "unknown method option": (["train", "kv-32", "--method.n_men", "3", "--output", "{t}/r"], "'n_mem'"),
    "bad method option": (["train", "kv-32", "--method.n_mem", "0", "--output", "{t}/r"], "n_mem must be at least 1"),
    "unknown task": (
        ["train", "kv-32", "--task.name", "kw", "--output", "{t}/r"],
        "known: babi, document, kv, qa, raw_text, squad, text",
    ),
    "bad value": (["train", "kv-32", "--precision", "int4"], "int4"),
    "bad stage": (["train", "kv-32", "--stages", "[{{max_steps: 0, write_steps: [1]}}]"], "max_steps"),
    "unknown checkpoint": (["eval", "kv-31"], "unknown checkpoint"),
    "not a checkpoint": (["eval", "{t}"], "no checkpoint"),
    "damaged checkpoint": (["eval", "{t}/broken"], "damaged"),
    "negative steps": (["eval", "{p}/checkpoint", "--steps", "-1"], "at least 0"),
    "steps in words": (["eval", "{p}/checkpoint", "--steps", "five"], "five"),
    "too many pairs": (["eval", "{p}/checkpoint", "--pairs", "200", "--samples", "2"], "limit"),
    "negative pairs": (["eval", "{p}/checkpoint", "--pairs", "-4", "--samples", "2"], "pairs must be"),
    "one sample": (["eval", "{p}/checkpoint", "--samples", "1"], "at least 2"),
    "no device": (["eval", "{p}/checkpoint", "--device", "gpu"], "device"),
    "no training device": (["train", "kv-32", "--device", "tpu", "--output", "{t}/r"], "no device 'tpu'"),
    "two figures": (["eval", "{p}/checkpoint", "--pairs", "2,3", "--figure", "{t}/f.png"], "one number of pairs"),
    "json to nowhere": (["eval", "{p}/checkpoint", "--samples", "2", "--json", "{p}/pairs.txt/e.json"], "cannot write"),
    "missing text": (["write", "{p}/checkpoint", "{t}/none.txt"], "cannot read"),
    "text is a folder": (["write", "{p}/checkpoint", "{t}"], "cannot read"),
    "empty text": (["write", "{p}/checkpoint", "{t}/empty.txt"], "empty"),
    "binary text": (["write", "{p}/checkpoint", "{t}/binary.txt"], "UTF-8"),
    "bad pairs": (["write", "{p}/checkpoint", "{t}/words.txt"], "line 2"),
    "negative write steps": (["write", "{p}/checkpoint", "{p}/pairs.txt", "--steps", "-1"], "at least 0"),
    "steps and until": (["write", "{p}/checkpoint", "{p}/pairs.txt", "--steps", "1", "--until", "1"], "not both"),
    "unwritable output": (["write", "{p}/checkpoint", "{p}/pairs.txt", "-o", "{p}/pairs.txt/m"], "cannot write"),
    "output is a folder": (["write", "{p}/checkpoint", "{p}/pairs.txt", "-o", "{t}"], "cannot write"),
    "missing memory": (["ask", "{t}/none", "a7"], "no memory file"),
    "memory is a folder": (["ask", "{t}", "a7"], "damaged or no memory file"),
    "memory is text": (["inspect", "{p}/pairs.txt"], "damaged or no memory file"),
    "query without format": (["ask", "{p}/m.safetensors", "hello"], "is no query: ask for a key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "words.txt").write_text("a7:Qz\nonce upon a time\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((place / "checkpoint" / "config.json").read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    before = sorted(os.listdir(tmp_path))
    arguments, message = BAD[case]
    assert main([argument.format(p=place, t=tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("gradmem: error: ")
    import re

    assert re.search(message, line), line
    assert sorted(os.listdir(tmp_path)) == before


def test_directories_are_made(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured or written for minutes is not lost to a directory that is not there yet."""
    figure, rows, memory = (tmp_path / f"new/{name}" for name in ("a/e.png", "b/e.json", "c/m"))
    checkpoint, text = str(place / "checkpoint"), str(place / "pairs.txt")
    assert main(["eval", checkpoint, "--samples", "2", "--figure", str(figure), "--json", str(rows)]) == 0
    assert main(["write", checkpoint, text, "-o", str(memory)]) == 0
    assert all(path.stat().st_size for path in (figure, rows, memory))


def test_checkpoint_cannot_name_code_to_import(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    for file in (place / "checkpoint").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["method"]["name"] = "evil_package.module"
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package" / "module.py").write_text("raise SystemExit('executed')")
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(["eval", str(folder)]) == 2
    finally:
        sys.path.remove(str(tmp_path))
    assert "import that module first" in capsys.readouterr().err


def test_output_into_a_closed_pipe() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gradmem", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate()
    assert b"Traceback" not in error


def run(*arguments: str | bytes, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "gradmem", *arguments]
    return subprocess.run(line, input=given, capture_output=True, env={**os.environ, **environment})


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "en_US.ISO-8859-1"])
def test_standard_input_that_is_not_utf8(locale: str, place: Path, tmp_path: Path) -> None:
    """As from a file; in C and POSIX locales Python lets such bytes pass, as lone surrogates."""
    text = b"a7:Qz\ncaf\xe9 at ten\n"
    (tmp_path / "latin.txt").write_bytes(text)
    for file, name in (("-", "standard input"), (f"{tmp_path}/latin.txt", f"{tmp_path}/latin.txt")):
        done = run("write", f"{place}/checkpoint", file, "-o", f"{tmp_path}/m", given=text, LC_ALL=locale)
        assert done.returncode == 2
        wanted = f"gradmem: error: {name} is not UTF-8 text: invalid continuation byte at byte 9"
        assert done.stderr.decode().splitlines() == [wanted]
    assert not (tmp_path / "m").exists()


def test_standard_input_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from gradmem.cli.console import *; use_utf8(); print(ascii(read_stdin()))"
    for locale in ("C", "en_US.ISO-8859-1"):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONIOENCODING": "latin-1"}
        given = "é\r\n☃\n".encode()
        done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, env=environment)
        assert done.stdout.decode().strip() == ascii("é\r\n☃\n")


def test_closed_standard_input(place: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} -m gradmem write {place}/checkpoint - -o {tmp_path}/m <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_argument_that_is_not_utf8() -> None:
    for line in (["keys", "add", b"caf\xe9"], ["ask", b"caf\xe9.safetensors", "a7"], ["list", b"\xff"]):
        done = run(*line, LC_ALL="C")
        assert done.returncode == 2
        (told,) = done.stderr.decode().splitlines()
        assert f"argument {len(line) - ('a7' in line)} is not UTF-8 text" in told


def test_output_is_utf8_in_every_locale() -> None:
    done = run("keys", "add", "café ☃", LC_ALL="C.UTF-8", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "café ☃" in done.stderr.decode()


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("store", [False, True])
def test_an_interrupted_write_saves_what_there_is(
    signal_: signal.Signals,
    store: bool,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the store nothing: the next write of the same text would get it for the whole one."""
    monkeypatch.chdir(tmp_path)
    before, shown = signal.getsignal(signal_), []

    def loss(written: Written) -> str:
        shown.append(int(written.taken))
        if len(shown) == 4:
            signal.raise_signal(signal_)
        return ""

    monkeypatch.setattr("gradmem.cli.memory.write_loss", loss)
    line = ["write", f"{place}/checkpoint", f"{place}/pairs.txt", "--steps", "50"]
    assert main([*line, *(["--store", "--name", "n"] if store else [])]) == 130
    assert shown == [0, 1, 2, 3]
    said = capfd.readouterr()
    assert "saved memory.safetensors" in said.out
    assert "gradmem: interrupted: saved the memory after 3 write steps" in said.err
    assert gradmem.open("memory.safetensors").receipts[0].steps == 3
    assert signal.getsignal(signal_) is before
    with Store() as keeper:
        assert list(keeper.list()) == []


def test_a_second_interruption_stops_at_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def loss(written: Written) -> str:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a launcher may pass it on a second time
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr("gradmem.cli.memory.write_loss", loss)
    assert main(["write", f"{place}/checkpoint", f"{place}/pairs.txt"]) == 130
    assert not list(tmp_path.glob("*.safetensors"))


def test_any_command_that_is_interrupted_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradmem.cli.memory.checkpoint_names", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "gradmem: interrupted\n"


def test_a_write_loss_that_was_missed_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["write", f"{place}/checkpoint", f"{place}/pairs.txt", "-o", f"{tmp_path}/m", "--max-steps", "2", "--until"]
    assert main([*line, "1e-6"]) == 0
    loss = Memory.load(tmp_path / "m").receipts[0].loss_after
    assert f"missed --until 1e-06: write loss {loss:.4f} after 2 steps" in capsys.readouterr().out
    assert main([*line, "100"]) == 0
    assert "missed" not in capsys.readouterr().out


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmem.cli.console.PROGRESS_SECONDS", 0.0)
    assert list(progress_bar([7, 8], "writing", detail=lambda one: f"loss {one}")) == [7, 8]
    assert capsys.readouterr().err.splitlines() == ["writing: 1 of 2 loss 7", "writing: 2 of 2 loss 8"]
    monkeypatch.setattr("gradmem.cli.console.PROGRESS_SECONDS", 1e9)
    assert list(progress_bar([7, 8], "writing")) == [7, 8]
    assert capsys.readouterr().err == ""


DOCUMENTS = {
    "email": "From: Ann <ann@example.org>\nSubject: Door\n\nThe door code is 4711.\n",
    "CSV": "name,amount\nAnn,12.50\n",
    "Markdown": "# Notes\n\n- The door code is **4711**.\n",
    "German": "Die Tür öffnet um zehn.\n",
}


@pytest.mark.parametrize("checkpoint", ["kv-32", "babi"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_other_documents_are_told_where_to_go(checkpoint: str, kind: str) -> None:
    with pytest.raises(GradmemError, match=r"language model \(gradmem write smollm2 FILE\), which answers"):
        load(checkpoint).write(DOCUMENTS[kind])


def test_flags_come_from_the_signatures(capsys: pytest.CaptureFixture[str]) -> None:
    """Every boolean option is a flag with the help of its docstring, in every command."""
    from gradmem.cli.serving import KEYS
    from gradmem.cli.store import COMMANDS as STORE

    groups = {"store": STORE, "keys": KEYS}
    lines = {(name,): one for name, one in COMMANDS.items()}
    lines |= {(group, name): one for group, members in groups.items() for name, one in members.items()}
    flags = 0
    for line, function in lines.items():
        with pytest.raises(SystemExit):
            main([*line, "--help"])
        shown = capsys.readouterr().out
        for name, one in inspect.signature(function).parameters.items():
            if one.annotation == "bool":
                flags += 1
                assert f"[--{name}]" in shown, (line, name)
    assert flags >= 7


@pytest.mark.parametrize(
    ("text", "numbers"), [("0,1,5", [0, 1, 5]), ("0..3", [0, 1, 2, 3]), ("8", [8]), ("0..2,7", [0, 1, 2, 7])]
)
def test_ints(text: str, numbers: list[int]) -> None:
    assert Ints.parse(text) == numbers
