"""Run the blocks of a page of the documentation, one after the other, in one directory.

- `console` blocks hold commands (`$ ...`) with what they print; `...` stands for anything.
- `python` blocks share their names. An expression with a comment must have that value: `1 + 1  # 2`.
- A block with a title is a file: `title="mine.yaml"`.
- `<!-- slow -->` before a block: only `make test-system` runs it. `<!-- not run: WHY -->`: nothing does.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gradmem.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "howto").glob("*.md"))]
"""Pages whose blocks are run: README, Start, Concepts and How-to."""
BLOCK = re.compile(r'(?:<!-- (slow|not run: [^>]+) -->\n)?```(\w*)(?: title="([^"]+)")?\n(.*?)```', re.S)
PROGRESS = re.compile(r"^[a-z ]+: [\d,]+ of [\d,]+.*\n?", re.M)
"""How far a command is, which it says on standard error after ten seconds: so on a slow machine only."""
CODE = {"console", "python"}
SHOWN = {"yaml", "toml", "text"}
"""Languages of blocks that are files or only shown."""


@dataclass(frozen=True)
class Block:
    """A block of a page, with the line where it begins."""

    mark: str
    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(m[1] or "", m[2], m[3] or "", m[4], text[: m.start(4)].count("\n") + 1) for m in BLOCK.finditer(text)]


def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a directory of its own, with a terminal of one width and keys of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("GRADMEM_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    monkeypatch.syspath_prepend(str(tmp_path))


class Runner:
    """Runs the blocks of one page in the current directory.

    Parameters
    ----------
    page : Path
    slow : bool
        Run slow blocks too.
    """

    def __init__(self, page: Path, slow: bool) -> None:
        self.page, self.slow = page, slow
        self.names: dict[str, Any] = {}
        self.servers: list[subprocess.Popen[str]] = []

    def run(self) -> int:
        """Run the page and return the number of blocks that were run.

        Raises
        ------
        AssertionError
            When a block prints, or is, something else than it says.
        """
        done = 0
        try:
            for block in blocks(self.page):
                assert block.language in CODE | SHOWN or block.mark, f"{self.page}:{block.line}: no language"
                if block.title:
                    Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.title).write_text(block.text, encoding="utf-8")
                elif block.language in CODE and (not block.mark or (self.slow and block.mark == "slow")):
                    (self._console if block.language == "console" else self._python)(block)
                    done += 1
        finally:
            for server in self.servers:
                server.terminate()
                server.wait(60)
        return done

    def _console(self, block: Block) -> None:
        for command, wanted in commands(block.text):
            code, printed = self._command(command)
            where = f"{self.page}:{block.line}: {command}"
            assert code == (2 if wanted.startswith("gradmem: error") else 0), f"{where}\nended with {code}:\n{printed}"
            assert alike(wanted, printed), f"{where}\nprinted\n{printed}\nand not\n{wanted}"

    def _command(self, command: str) -> tuple[int, str]:
        """Exit code and output of a command; those of gradmem run in this process, which has imported everything."""
        words = shlex.split(command)
        if words[0] == "export":
            name, value = words[1].split("=", 1)
            os.environ[name] = value.replace("$PWD", os.getcwd()) + os.pathsep + os.environ.get(name, "")
            sys.path.insert(0, os.getcwd())
            return 0, ""
        if words[0] == "make":
            return _shell(f"make --dry-run -C {ROOT} {shlex.join(words[1:])} >/dev/null")
        if words == ["gradmem", "serve"]:
            return self._serve()
        if words[0] == "gradmem" and words[1] != "write-corpus" and not {"|", ">", "<"} & set(words):  # Ray stays out
            return _gradmem(words[1:])
        return _shell(command.replace("gradmem ", f"{sys.executable} -m gradmem "))

    def _serve(self) -> tuple[int, str]:
        server = subprocess.Popen([sys.executable, "-m", "gradmem", "serve"], stdout=subprocess.PIPE, text=True)
        self.servers.append(server)
        assert server.stdout
        return 0, server.stdout.readline()

    def _python(self, block: Block) -> None:
        comments = comments_of(block.text)
        for statement in ast.parse(block.text).body:
            where = f"{self.page}:{block.line + statement.lineno - 1}"
            wanted = comments.get(statement.end_lineno or 0)
            if isinstance(statement, ast.Expr) and wanted is not None:
                value = eval(compile(ast.Expression(statement.value), where, "eval"), self.names)
                assert alike(wanted, repr(value)), f"{where}: is {value!r} and not {wanted}"
            else:
                exec(compile(ast.Module([statement], []), where, "exec"), self.names)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Commands of a console block with what they should print."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        lines = part.replace("\\\n", " ").split("\n", 1)
        yield lines[0], lines[1]


def comments_of(code: str) -> dict[int, str]:
    """Comments of Python code by line."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {one.start[0]: one.string.lstrip("# ") for one in tokens if one.type == tokenize.COMMENT}


def alike(wanted: str, printed: str) -> bool:
    """Whether an output is what a page says, where `...` stands for anything and blanks count once."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(wanted.strip() + "\n", printed.strip() + "\n", options)


def _gradmem(arguments: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    quiet = mock.patch("gradmem.cli.console.PROGRESS_SECONDS", math.inf)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), quiet:
        code = main(arguments)
    return code, printed.getvalue()


def _shell(command: str) -> tuple[int, str]:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    return done.returncode, done.stdout + PROGRESS.sub("", done.stderr)
