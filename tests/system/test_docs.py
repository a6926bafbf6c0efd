"""Slow blocks of the documentation, and the site: pages that ask no other host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import PAGES, ROOT, Runner, blocks, own_directory

SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks(page))]


@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.stem)
def test_page_with_slow_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_directory(tmp_path, monkeypatch)
    monkeypatch.setenv("GRADMEM_STORE", str(tmp_path / "store.db"))
    assert Runner(page, slow=True).run()


def test_the_site_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={"NO_MKDOCS_2_WARNING": "1"})
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    loaded = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"|url\(["\']?https?://')
    found = {one for page in [*pages, *tmp_path.rglob("*.css")] for one in loaded.findall(page.read_text())}
    assert not found
