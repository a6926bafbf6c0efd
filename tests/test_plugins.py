"""What a recipe may import: what is installed or given explicitly, and never what happens to lie in the directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradmem
from gradmem import GradmemError, methods
from gradmem.methods import Method
from gradmem.plugins import find

MODULE = """
from pathlib import Path
from gradmem.methods.mean_pool import MeanPool
Path(__file__).with_name("ran").touch()
class Mine(MeanPool):
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module in it, searched by Python as `python -m` and an interactive session do."""
    (tmp_path / "lying").mkdir()
    (tmp_path / "lying" / "here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend("")
    yield tmp_path
    for name in ("lying.here", "lying"):
        sys.modules.pop(name, None)


def sought(**how: bool) -> type:
    return find(Method, methods.__name__, "method", "lying.here", **how)


@pytest.mark.parametrize("searched", ["", ".", "whole"])
def test_a_module_of_the_current_directory_is_not_run(
    here: Path, searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path[0] = str(here) if searched == "whole" else searched
    path = sys.path[:]
    for given in ("", os.pathsep, f"{here / 'other'}{os.pathsep}"):  # an empty entry stands for the current directory
        monkeypatch.setenv("PYTHONPATH", given)
        with pytest.raises(GradmemError, match=r"cannot import the method 'lying\.here'.*or name its directory"):
            sought()
    assert not (here / "lying" / "ran").exists()
    assert sys.path == path


@pytest.mark.parametrize("how", ["PYTHONPATH", "installed", "imported"])
def test_a_module_that_was_given_is_taken(here: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", f"/nowhere{os.pathsep}.")
    elif how == "installed":
        monkeypatch.syspath_prepend(str(here))
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")
    else:
        __import__("lying.here")
    assert sought().__name__ == "Mine"
    assert sought(trusted=False).__name__ == "Mine"  # imported by now


def test_a_name_in_a_file_imports_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    with pytest.raises(GradmemError, match="import that module first"):
        sought(trusted=False)
    assert not (here / "lying" / "ran").exists()


NO_NAMES = [None, 5, ["a.b"], {}, "", ".", "..", ".evil", "a..b", "os.", "a.b c", "../evil", "a.\x1b[31m"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("trusted", [True, False])
def test_what_is_no_name_is_refused(name: object, trusted: bool) -> None:
    with pytest.raises(GradmemError, match="method"):
        find(Method, methods.__name__, "method", name, trusted=trusted)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["raise RuntimeError('mine')", "def", "import lying.none"])
def test_a_module_that_fails_is_one_line(here: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    (here / "lying" / "here.py").write_text(text)
    with pytest.raises(GradmemError, match=r"cannot import the method 'lying\.here'"):
        sought()


def test_the_command_imports_nothing_of_the_current_directory(here: Path) -> None:
    text = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    for name in ("torch", "rich", "yaml", "jsonargparse"):
        (here / f"{name}.py").write_text(text)
    given = {**os.environ, "PYTHONPATH": str(Path(gradmem.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "gradmem", "list"], capture_output=True, text=True, env=given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kv-32" in done.stdout
    assert not (here / "ran").exists()
