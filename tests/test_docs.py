"""The documentation says what is true: its blocks run, and what is generated is current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from documents import PAGES, ROOT, Runner, alike, own_directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_directory(tmp_path, monkeypatch)
    Runner(page, slow=False).run()


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("```console\n$ echo a b\na ...\n```\n", False),
        ("```console\n$ echo a\nb\n```\n", True),
        ("```console\n$ false\n```\n", True),
        ("```console\n$ gradmem ask none a\ngradmem: error: ...\n```\n", False),
        ("```python\nx = 1\nx + 1  # 2\n```\n", False),
        ("```python\n1 + 1  # 3\n```\n", True),
        ("```\nls\n```\n", True),
        ("<!-- slow -->\n```console\n$ false\n```\n", False),
    ],
)
def test_a_wrong_block_fails(text: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_directory(tmp_path, monkeypatch)
    page = tmp_path / "page.md"
    page.write_text(text)
    if fails:
        with pytest.raises(AssertionError):
            Runner(page, slow=False).run()
    else:
        Runner(page, slow=False).run()


def test_alike() -> None:
    assert alike("a ... c", "a  b\nc\n")
    assert not alike("a", "a b")


@pytest.mark.parametrize("name", ["cli.md", "recipe.md", "methods.md", "http.md"])
def test_what_is_generated_is_current(name: str) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    kept = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert kept == generate.PAGES[name](), "run `python docs/generate.py`"


def test_files_and_tests_that_documents_name_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert set(re.findall(r"`(test_\w+)`", text)) <= set(re.findall(r"def (test_\w+)", tests))
    files = set(re.findall(r"`((?:tests|docs|benchmarks|src)/[\w/]+\.\w+)", text))
    assert not {name for name in files - GONE if not (ROOT / name).exists()}


GONE = {"docs/results.md", "benchmarks/curvature.py"}
"""Files of earlier days that the lab book names."""


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("examples/*.md")]), ids=lambda page: page.stem)
def test_links_beside_the_site(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_lines_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]
