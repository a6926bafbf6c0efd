"""The notebooks of `examples/` run from top to bottom, and what they assert holds."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SECONDS = 300
"""After which a cell counts as stuck; a whole notebook takes less than 60 on an idle CPU."""
LARGEST = 300_000
"""Bytes of a notebook with its figures."""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the kernel's files out of the user's directories, off the network, and to one thread on a busy machine."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
        monkeypatch.setenv(name, value)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()


def test_all_are_listed() -> None:
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 4
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in table] == []


@each
def test_it_runs(path: Path) -> None:
    execute(nbformat.read(path, as_version=4), path.parent)


@each
def test_its_outputs_are_of_one_run(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # none is an error
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size <= LARGEST


@each
def test_it_asserts_something(path: Path) -> None:
    assert any("\nassert " in f"\n{cell.source}" for cell in nbformat.read(path, as_version=4).cells)


def test_a_wrong_claim_fails(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path)
