"""A headless Chromium, and what tests of the page do in it; where there is none, they are skipped."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

pytest.importorskip("playwright", reason="no playwright here: pip install 'gradmem[dev]'")
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if PROGRAM is None:
    pytest.skip("no Chromium here: install the package `chromium`", allow_module_level=True)
TEXT = "a7:Qz\nk2:9f\nzz:aa"
LOST = 0.6931471805599453
"""Nats beyond which a token counts as lost: ln 2."""
expect.set_options(timeout=20_000)


class Windows:
    """Browsers of their own that go to the page; what goes wrong in them is noted.

    Attributes
    ----------
    requests, wrong : list of str
        Addresses that were asked, and what the console says of errors, but for answers with a status from 400 on.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.requests: list[str] = []
        self.wrong: list[str] = []
        self.contexts: list[BrowserContext] = []

    def open(self, url: str, context: BrowserContext | None = None, **options: Any) -> Page:
        """A new tab, by default of a new browser without animations."""
        if context is None:
            context = self.browser.new_context(**{"reduced_motion": "reduce", **options})
            self.contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", self._heard)
        page.goto(url)
        return page

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.wrong.append(message.text)


def choose(page: Page, checkpoint: str) -> None:
    """Choose a checkpoint and wait until it is described."""
    expect(page.locator("#about")).to_contain_text("Task")
    page.get_by_label("Checkpoint").select_option(checkpoint)
    expect(page.locator("#about")).to_contain_text(f"Task {checkpoint.partition('-')[0]}")


def write(page: Page, text: str | None = None, checkpoint: str = "kv-16", name: str = "") -> str:
    """Write a text, or an example of the checkpoint, and return it."""
    choose(page, checkpoint)
    box = page.get_by_label("Text", exact=True)
    if text is None:
        page.get_by_role("button", name="Try an example").click()
        expect(box).not_to_have_value("")
    else:
        box.fill(text)
    page.get_by_label("Name (optional)").fill(name)
    text = box.input_value()
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-status")).to_contain_text("Written in")
    return text


def forget(page: Page) -> None:
    """Forget the text and wait for the memory."""
    page.get_by_role("button", name="Forget the text and ask").click()
    expect(page.locator("#remains")).to_contain_text("remain")


def ask(page: Page, query: str) -> Locator:
    """Ask, and return the answer's item."""
    page.get_by_label("Ask the memory").fill(query)
    page.get_by_role("button", name="Ask", exact=True).click()
    item = page.locator("#answers li").first
    expect(item.locator(".asked")).to_have_text(query)
    return item


def said(page: Page) -> str:
    """All that the page holds: its elements with their attributes, and what stands in its fields."""
    fields = page.locator("input, textarea").evaluate_all("all => all.map((one) => one.value)")
    return "\n".join([page.content(), *fields])


def numbers(text: str | None) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text or "")]
