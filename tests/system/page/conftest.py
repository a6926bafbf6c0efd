"""`gradmem serve`, and a browser that goes to its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from served import Server

if TYPE_CHECKING:  # playwright may be absent; whoever imports `browsing` is skipped then
    from browsing import Windows
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on loopback, for all tests of the page."""
    server = Server(tmp_path_factory.mktemp("page"), "kv-16", "babi", "--max-body", "20000")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without its sandbox, which containers do not allow; the page is our own.

    One for each module: while Playwright runs, its event loop does, and no other test could start one.
    """
    from browsing import PROGRAM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def windows(browser: Browser) -> Iterator[Windows]:
    """Windows, in which nothing may go wrong."""
    from browsing import Windows

    windows = Windows(browser)
    yield windows
    for context in windows.contexts:
        context.close()
    assert windows.wrong == []


@pytest.fixture
def page(server: Server, windows: Windows) -> Iterator[Page]:
    """The page, which must ask nobody but its server."""
    yield (page := windows.open(server.url))
    page.close()
    elsewhere = [url for url in windows.requests if not url.startswith((server.url, f"blob:{server.url}"))]
    assert windows.requests
    assert elsewhere == []
