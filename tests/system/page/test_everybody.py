"""The page is for everybody: by keyboard, by name, in any light and on any screen; and it runs only its own code."""

from __future__ import annotations

import re

import httpx2
import pytest
from browsing import TEXT, Windows, ask, forget, numbers, write
from playwright.sync_api import Locator, Page, expect
from served import Server

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!text.length || !element.checkVisibility() || element.closest("svg, noscript, .hidden, :disabled")) continue;
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    const colour = getComputedStyle(element).color;
    const [a, b] = [light(over(["white", ...layers])), light(over(["white", ...layers, colour]))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 120)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


def test_the_api_is_described(server: Server, windows: Windows) -> None:
    page = windows.open(f"{server.url}/docs")
    asking = page.locator(".card").filter(has_text="POST /v1/memories/{ref}/ask")
    expect(asking).to_contain_text("queries")
    expect(asking).to_contain_text("list of string")
    paths = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    expect(page.locator(".card")).to_have_count(sum(map(len, paths.values())))
    assert {url.partition("/docs")[0].rpartition("/")[0] or url for url in windows.requests} == {"http:/", server.url}


def test_all_of_it_works_by_keyboard(page: Page) -> None:
    def to(wanted: Locator) -> None:
        for _ in range(40):
            if wanted.evaluate("(one) => one === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no way to {wanted}")

    expect(page.locator("#about")).to_contain_text("Task")
    to(page.get_by_label("Checkpoint"))
    page.keyboard.type("kv-16")
    expect(page.locator("#about")).to_contain_text("Task kv")
    to(page.get_by_label("Text", exact=True))
    page.keyboard.insert_text(TEXT)
    to(page.get_by_label("Write steps"))
    page.keyboard.press("ArrowRight")
    to(page.get_by_role("button", name="Write", exact=True))
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Forget the text and ask")).to_be_focused()
    expect(page.locator("#write-status")).to_contain_text("Written in 6 steps")
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#heat")).to_be_focused()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#heat-detail")).to_contain_text("“Q”, token 5: from")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Ask the memory")).to_be_focused()
    page.keyboard.type("zz")
    page.keyboard.press("Enter")
    expect(page.locator("#answers .answer")).to_have_text("aa")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Delete")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Write a text into a memory")).to_be_focused()


def test_everything_has_a_name_and_a_visible_focus(page: Page) -> None:
    def check() -> None:
        found = page.locator("body").aria_snapshot()
        roles = "button|textbox|searchbox|combobox|slider|link|img|dialog|heading"
        nameless = [line for line in found.splitlines() if re.match(rf"\s*- ({roles})(?! \")", line)]
        assert nameless == []
        assert re.search(r"- main", found)
        assert re.search(r"- complementary", found)

    write(page, "j1:k2", name="named")
    check()
    page.get_by_role("button", name="Forget the text and ask").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    style = page.get_by_role("button", name="Forget the text and ask").evaluate(
        "(one) => getComputedStyle(one).outlineStyle"
    )
    assert style == "solid"
    forget(page)
    ask(page, "j1")
    check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_light_and_dark(server: Server, windows: Windows, scheme: str) -> None:
    """WCAG AA: 4.5 for all text, tokens from lost to kept, answers and errors among it."""
    page = windows.open(server.url, color_scheme=scheme)
    write(page)
    assert page.locator("#heat .token[data-level=kept]").count() > 20
    page.evaluate("document.getElementById('write-error').textContent = 'An error'")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [one for one in found if one[0] < 4.5] == []
    forget(page)
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#answers li")).to_have_count(16)
    page.get_by_role("button", name="Check the answers").click()
    expect(page.locator(".truth").first).to_be_visible()
    assert [one for one in page.evaluate(CONTRASTS) if one[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(numbers(background)) < 200) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 360, 800])
def test_nothing_is_wider_than_the_screen(server: Server, windows: Windows, width: int) -> None:
    page = windows.open(server.url, viewport={"width": width, "height": 740}, has_touch=True)

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    check()
    write(page, name="n" * 150 + str(width))
    check()
    forget(page)
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#answers li")).to_have_count(16)
    check()
    page.get_by_role("button", name="Memories").click()
    expect(page.locator("#memories")).to_be_in_viewport()
    page.get_by_role("button", name="Rename").click()
    check()
    page.get_by_role("button", name="Delete").click()
    check()


def test_what_a_text_or_a_name_says_is_never_markup(page: Page, windows: Windows, server: Server) -> None:
    evil = "<img src=x onerror=alert(1)>"
    write(page, "i1:j2", name=evil)
    forget(page)
    expect(page.get_by_role("heading", name=evil)).to_be_visible()
    page.get_by_label("Ask the memory").fill(evil)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#ask-error")).to_contain_text("onerror")
    page.reload()
    expect(page.get_by_role("link", name=evil)).to_be_visible()
    assert page.locator("img").count() == 1


def test_the_policy_lets_nothing_else_run(page: Page, windows: Windows) -> None:
    """What a browser refuses here shows that the policy stands, and that the fixture sees what is refused."""
    expect(page.locator("#about")).to_contain_text("Task")
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
      fetch("http://127.0.0.2:1/").catch(() => {});
    }""")
    assert page.evaluate("window.ran") is None
    expect(page.locator("#about")).to_contain_text("Task")
    page.wait_for_timeout(100)
    assert len([one for one in windows.wrong if "Content Security Policy" in one]) >= 2
    windows.wrong.clear()
    windows.requests[:] = [url for url in windows.requests if "127.0.0.2" not in url]
