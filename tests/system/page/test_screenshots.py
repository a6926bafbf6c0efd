"""The page as the documentation shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from browsing import TEXT, Windows, ask, forget, write
from playwright.sync_api import Page, expect
from served import Server

from gradmem import Client


def test_screenshots(server: Server, windows: Windows, screenshots: Path) -> None:
    """The page as the documentation shows it; `--screenshots docs/howto` renews the pictures there."""
    client = Client(server.url)
    for entry in client.list(limit=1000):
        client.delete(entry.id)
    client.write(TEXT, "kv-16", name="three pairs")

    def shown(**options: Any) -> Page:
        page = windows.open("about:blank", **options)
        page.add_init_script("Math.random = () => 0.5")  # always the same example
        page.goto(server.url)
        return page

    phone = shown(viewport={"width": 360, "height": 740}, device_scale_factor=2, color_scheme="dark")
    write(phone, checkpoint="babi", name="a story")
    phone.locator("#watch").evaluate("(one) => one.scrollIntoView()")
    phone.screenshot(path=screenshots / "page-phone.png")
    desk = shown(viewport={"width": 1120, "height": 800}, color_scheme="light")
    write(desk, name="sixteen pairs")
    desk.set_viewport_size({"width": 1120, "height": desk.evaluate("document.documentElement.scrollHeight")})
    desk.evaluate("scrollTo(0, 0)")
    desk.screenshot(path=screenshots / "page-write.png")
    desk.set_viewport_size({"width": 1120, "height": 1000})
    forget(desk)
    expect(desk.locator("#vectors")).to_be_visible()
    ask(desk, "ZZ")
    desk.locator(".chip").first.click()
    expect(desk.locator("#answers li")).to_have_count(2)
    desk.get_by_role("button", name="Check the answers").click()
    expect(desk.locator(".truth")).to_have_count(1)
    desk.screenshot(path=screenshots / "page-ask.png")
    for name in ("page-write", "page-ask", "page-phone"):
        assert 10_000 < (screenshots / f"{name}.png").stat().st_size < 200_000
