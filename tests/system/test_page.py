"""The page of `gradmem serve` in a real headless Chromium."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import Server

from gradmem import Client, Memory, load
from gradmem.serving.keys import Keys

pytest.importorskip("playwright", reason="no playwright here: pip install 'gradmem[dev]'")
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: install the package `chromium`")
TEXT = "a7:Qz\nk2:9f\nzz:aa"
LOST = 0.6931471805599453
expect.set_options(timeout=20_000)

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on loopback, for all tests."""
    server = Server(tmp_path_factory.mktemp("page"), "kv-16", "babi", "--max-body", "20000")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without its sandbox, which containers do not allow; the page is our own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


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


@pytest.fixture
def windows(browser: Browser) -> Iterator[Windows]:
    """Windows, in which nothing may go wrong."""
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


# Writing and asking


def test_a_text_is_written_watched_forgotten_and_asked(page: Page) -> None:
    text = write(page)
    pairs = dict(line.split(":") for line in text.splitlines())
    receipts = [load("kv-16").write(text, steps).records[0] for steps in range(6)]
    expect(page.locator("#watch-chart circle")).to_have_count(6)
    tokens = page.locator("#heat .token")
    assert "".join(tokens.all_text_contents()) == load("kv-16").task.context_text(text)
    slider = page.get_by_label("Write steps")
    for steps in (5, 3, 0):
        slider.fill(str(steps))
        receipt = receipts[steps]
        expect(page.locator("#at-loss")).to_have_text(f"{receipt.loss_after:.2f}")
        kept = page.locator("#heat .token[data-level=kept]").evaluate_all(
            "all => all.map((one) => [...one.parentElement.children].indexOf(one))"
        )
        assert kept == [i for i, loss in enumerate(receipt.token_losses) if loss <= LOST]
        expect(page.locator("#at-kept")).to_have_text(f"{len(kept)} of {len(receipt.token_losses)}")
    assert len(receipts[5].lost) < len(receipts[3].lost) < len(receipts[0].lost)
    expect(page.get_by_role("button", name="Write with 0 steps instead")).to_be_visible()
    slider.fill("5")
    expect(page.get_by_role("button", name="instead")).to_be_hidden()
    assert all(line in said(page) for line in text.splitlines())

    forget(page)
    left = said(page)
    assert [line for line in text.splitlines() if line in left] == []
    expect(page.locator("#write")).to_be_hidden()
    expect(page.get_by_label("Ask the memory")).to_be_focused()
    expect(page.locator("#instead")).not_to_be_empty()
    tokens_bytes = numbers(page.locator("#instead").text_content())
    assert page.locator("#remains").text_content() == "4,096 bytes remain of 113 tokens"
    assert tokens_bytes == [463, 113]  # kB, and times as much: 462,848 bytes by Backbone.cache_bytes
    for key in list(pairs)[:2]:
        page.get_by_role("button", name=key, exact=True).click()
        item = page.locator(f"#answers li[data-query='{key}']")
        expect(item.locator(".answer")).to_have_text(pairs[key])
        expect(item.locator(".written")).to_contain_text("%")
    stranger = next(f"Z{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" if f"Z{letter}" not in pairs)
    expect(ask(page, stranger).locator(".answer")).to_have_text("not in this memory")
    page.get_by_role("button", name="Check the answers").click()
    expect(page.locator(".truth.right")).to_have_count(2)


def test_steps_come_one_by_one(server: Server, windows: Windows) -> None:
    """With animations: the chart grows, and tokens change their level on the way."""
    page = windows.open(server.url, reduced_motion="no-preference")
    choose(page, "kv-16")
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => {
        const [points, kept] = ["#watch-chart circle", "#heat .token[data-level=kept]"]
          .map((one) => document.querySelectorAll(one).length);
        if (points && window.seen.at(-1)?.[0] !== points) window.seen.push([points, kept]);
      }).observe(document.getElementById("at-kept"), { childList: true });
    }""")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-status")).to_contain_text("Written in 5 steps")
    seen = page.evaluate("window.seen")
    assert [points for points, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0][1] < seen[-1][1]


def test_a_story_answers_where_everybody_is(page: Page) -> None:
    story = ("Sandra went to the kitchen.", "Mary journeyed to the office.", "Sandra moved to the hallway.")
    write(page, " ".join([*story, "Mary went to the garden."]), "babi")
    forget(page)
    assert [sentence for sentence in story if sentence in said(page)] == []
    expect(ask(page, "Where is Sandra?").locator(".answer")).to_have_text("hallway")
    expect(ask(page, "Where is Mary?").locator(".answer")).to_have_text("garden")
    expect(page.locator("#answers li")).to_have_count(2)


def test_another_number_of_steps_takes_the_name_over(page: Page, server: Server) -> None:
    write(page, "b1:c2", name="steps")
    first = Client(server.url).get("steps").id
    page.get_by_label("Write steps").fill("2")
    page.get_by_role("button", name="Write with 2 steps instead").click()
    expect(page.locator("#write-status")).to_contain_text("Written in 2 steps")
    expect(page.locator("#at-step")).to_have_text("2 of 2")
    found = Client(server.url).inspect("steps")
    assert found["records"][0]["steps"] == 2
    assert Client(server.url).get(first).name is None


def test_a_write_can_be_cancelled(page: Page, server: Server) -> None:
    """The server ends it then, and keeps nothing."""
    choose(page, "kv-16")
    long = "\n".join(f"{a}{b}:zz" for a in "abcdefg" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    page.get_by_label("Text", exact=True).fill(long)
    page.get_by_label("Name (optional)").fill("cancelled")
    page.get_by_label("Write steps").fill("10")
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#write-status")).to_contain_text("Cancelled")
    expect(page.get_by_label("Text", exact=True)).to_have_value(long)
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_visible()
    Client(server.url).write("a7:Qz", "kv-16", steps=0)  # its turn comes when the other has ended
    assert Client(server.url).list(name="cancelled") == []


# What goes wrong


@pytest.mark.parametrize(
    ("checkpoint", "text", "words"),
    [
        ("kv-16", "  ", "no text yet"),
        ("kv-16", "a7:Qz\nno pair", "line 2 'no pair' is no pair"),
        ("babi", "Zoe flew to the moon.", "does not know"),
        (
            "kv-16",
            "\n".join(f"{a}{b}:zz" for a in "abcdefghij" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"),
            "limit",
        ),
        ("babi", "Mary went to the garden. " * 1000, "the server takes 20,000 bytes"),
    ],
)
def test_an_error_keeps_the_text(page: Page, checkpoint: str, text: str, words: str) -> None:
    choose(page, checkpoint)
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-error")).to_contain_text(words)
    assert page.locator("#write-error").get_attribute("role") == "alert"
    expect(page.get_by_label("Text", exact=True)).to_have_value(text)
    expect(page.locator("#watch")).to_be_hidden()
    page.get_by_label("Text", exact=True).fill("a7:Qz" if checkpoint == "kv-16" else "Mary went to the garden.")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-status")).to_contain_text("Written in")
    expect(page.locator("#write-error")).to_have_text("")


def test_a_bad_question_is_told_and_kept(page: Page) -> None:
    write(page, TEXT)
    forget(page)
    page.get_by_label("Ask the memory").fill("what?")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#ask-error")).to_contain_text("no answer format")
    expect(page.get_by_label("Ask the memory")).to_have_value("what?")
    expect(ask(page, "k2").locator(".answer")).to_have_text("9f")
    expect(page.locator("#ask-error")).to_have_text("")


def test_a_name_that_is_taken_is_told(page: Page) -> None:
    write(page, "d1:e2", name="taken")
    page.get_by_label("Text", exact=True).fill("d1:e3")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-error")).to_contain_text("taken by another memory")
    expect(page.get_by_label("Text", exact=True)).to_have_value("d1:e3")


def test_a_server_that_has_ended_is_told(windows: Windows, tmp_path: Path) -> None:
    server = Server(tmp_path, "kv-16")
    page = windows.open(server.url)
    write(page, TEXT)
    server.process.kill()
    server.process.wait()
    page.get_by_label("Text", exact=True).fill("a7:Qy")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-error")).to_contain_text("does not answer")
    expect(page.get_by_label("Text", exact=True)).to_have_value("a7:Qy")
    windows.wrong.clear()


def test_a_key_is_asked_for_and_kept_for_the_tab(windows: Windows, tmp_path: Path) -> None:
    key = Keys(tmp_path / "keys.json").add("me")
    server = Server(tmp_path, "kv-16", "--host", "0.0.0.0")
    try:
        page = windows.open(server.url.replace("0.0.0.0", "127.0.0.1"))
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_role("button", name="Not now").click()
        expect(page.locator("#write-error")).to_contain_text("needs a key")
        page.get_by_role("button", name="Write", exact=True).click()
        for given in ("gm-wrong", key):
            expect(dialog).to_be_visible()
            dialog.get_by_label("Key").fill(given)
            dialog.get_by_role("button", name="Go on").click()
            if given != key:
                expect(dialog).to_contain_text("does not know this key")
        expect(dialog).to_be_hidden()
        write(page, TEXT, name="mine")
        page.reload()
        expect(page.get_by_role("link", name="mine")).to_be_visible()
        expect(dialog).to_be_hidden()
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    finally:
        server.stop()


# Memories


def test_a_reload_stays_with_the_memory(page: Page) -> None:
    write(page, name="reloaded")
    forget(page)
    chips = page.locator("#questions button").all_text_contents()
    page.reload()
    expect(page.get_by_role("heading", name="reloaded")).to_be_visible()
    expect(page.locator("#instead")).to_contain_text("KV-cache")
    assert page.locator("#questions button").all_text_contents() == chips
    page.go_back()
    expect(page.get_by_role("heading", name="Write a text into a memory")).to_be_visible()
    expect(page.get_by_label("Text", exact=True)).to_have_value("")
    page.go_forward()
    expect(page.get_by_role("heading", name="reloaded")).to_be_visible()


def test_the_receipt_is_the_memorys_own(page: Page, server: Server) -> None:
    write(page, f"{TEXT}\nrr:cc", name="receipt")
    forget(page)
    record = Client(server.url).inspect("receipt")["records"][0]
    expect(page.locator("#facts")).to_contain_text(f"{record['loss_before']:.2f} → {record['loss_after']:.2f} nats")
    expect(page.locator("#facts")).to_contain_text(record["context_sha256"][:12])
    levels = page.locator("#cells .token").evaluate_all("all => all.map((one) => one.dataset.level === 'kept')")
    assert levels == [loss <= LOST for loss in record["token_losses"]]
    assert page.locator("#cells").text_content() == ""
    expect(page.locator("#vectors")).to_be_visible()
    values = page.locator("#vectors").evaluate(
        "(one) => [one.width, one.height, new Set(one.getContext('2d').getImageData(0, 0, 128, 8).data).size > 20]"
    )
    assert values == [128, 8, True]


def test_a_late_picture_leaves_the_focus_where_it_is(page: Page, server: Server) -> None:
    held: list[Route] = []
    page.route("**/file", lambda route: held.append(route))
    write(page, "s1:w2", name="slow")
    with page.expect_request("**/file"):
        forget(page)
    page.get_by_role("button", name="Rename").click()
    expect(page.get_by_label("Name", exact=True)).to_be_focused()
    assert len(held) == 1
    held[0].continue_()
    expect(page.locator("#vectors")).to_be_visible()
    expect(page.get_by_label("Name", exact=True)).to_be_focused()


def test_rename_pin_and_delete(page: Page, server: Server) -> None:
    write(page, "e1:f2", name="old")
    forget(page)
    page.get_by_role("button", name="Rename").click()
    expect(page.get_by_label("Name", exact=True)).to_have_value("old")
    page.get_by_label("Name", exact=True).fill("new")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="new")).to_be_visible()
    expect(page.get_by_role("link", name="new")).to_be_visible()
    pin = page.get_by_role("button", name="Pin")
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "true")
    assert Client(server.url).get("new").pinned
    page.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog", name="Delete this memory?")
    dialog.get_by_role("button", name="Delete").click()
    expect(page.locator("#memory-error")).to_contain_text("pinned")
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Keep it").click()
    assert Client(server.url).get("new")
    page.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Write a text into a memory")).to_be_visible()
    expect(page.get_by_role("link", name="new")).to_have_count(0)
    assert Client(server.url).list(name="new") == []


def test_a_file_goes_out_and_in(page: Page, server: Server, tmp_path: Path) -> None:
    write(page, "f1:g2", name="file")
    forget(page)
    with page.expect_download() as found:
        page.get_by_role("button", name="Download").click()
    assert found.value.suggested_filename == "file.safetensors"
    data = Path(found.value.path()).read_bytes()
    assert data == Client(server.url).download("file")
    assert len(Memory.from_bytes(data)) == 1
    Client(server.url).delete("file")
    saved = tmp_path / "file.safetensors"
    saved.write_bytes(data)
    page.goto(server.url)
    page.get_by_label("Upload").set_input_files(saved)
    expect(page.get_by_role("heading", name="unnamed")).to_be_visible()
    expect(ask(page, "f1").locator(".answer")).to_have_text("g2")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data[:-3])
    page.get_by_label("Upload").set_input_files(damaged)
    expect(page.locator("#list-error")).to_contain_text("damaged")


@pytest.mark.parametrize(
    ("losses", "told"), [([math.inf], "no number → no number"), ([1e300, 1.0], "→ 1.00 nats")], ids=["none", "huge"]
)
def test_a_file_whose_numbers_mean_nothing_is_shown(page: Page, tmp_path: Path, losses: list[float], told: str) -> None:
    memory = load("kv-16").write("l1:m2")
    record = {"losses": losses, "token_losses": [math.inf, math.nan, 0.1], "context_tokens": 3}
    memory.records = [replace(memory.records[0], **record)]
    saved = memory.save(tmp_path / "odd.safetensors")
    page.get_by_label("Upload").set_input_files(saved)
    expect(page.locator("#facts")).to_contain_text(told)
    expect(page.locator("#cells .token[data-level=kept]")).to_have_count(1)
    expect(ask(page, "l1").locator(".answer")).to_have_text("m2")


def test_files_are_dropped_and_opened(page: Page, tmp_path: Path) -> None:
    choose(page, "kv-16")
    drop = """([name, text]) => {
      const data = new DataTransfer();
      data.items.add(new File([text], name));
      document.getElementById("text").dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, ["pairs.txt", TEXT])
    expect(page.get_by_label("Text", exact=True)).to_have_value(TEXT)
    page.evaluate(drop, ["memory.safetensors", "no memory"])
    expect(page.locator("#list-error")).to_contain_text("no memory file")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    page.get_by_label("Open a file").set_input_files(binary)
    expect(page.locator("#write-error")).to_contain_text("no text in UTF-8")
    large = tmp_path / "large.txt"
    large.write_text("a" * 20_001)
    page.get_by_label("Open a file").set_input_files(large)
    expect(page.locator("#write-error")).to_contain_text("the server takes 20,000 bytes")
    expect(page.get_by_label("Text", exact=True)).to_have_value(TEXT)


def test_two_tabs_know_of_each_other(page: Page, server: Server, windows: Windows) -> None:
    write(page, "g1:h2", name="shared")
    forget(page)
    other = windows.open(page.url, page.context)
    expect(other.get_by_role("heading", name="shared")).to_be_visible()
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name", exact=True).fill("common")
    page.get_by_role("button", name="Save").click()
    expect(other.get_by_role("heading", name="common")).to_be_visible()
    expect(other.get_by_role("link", name="common")).to_be_visible()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(other.get_by_role("heading", name="This memory is gone")).to_be_visible()
    expect(other.get_by_role("link", name="common")).to_have_count(0)


def test_what_was_deleted_elsewhere_is_told_when_asked(page: Page, server: Server) -> None:
    """Renamed and deleted on the command line, say, of which a page that is looked at hears nothing."""
    write(page, "h1:i2", name="elsewhere")
    forget(page)
    Client(server.url).change("elsewhere", name="moved")
    page.evaluate("dispatchEvent(new Event('focus'))")
    expect(page.get_by_role("heading", name="moved")).to_be_visible()
    expect(page.get_by_role("link", name="moved")).to_be_visible()
    Client(server.url).delete("moved")
    page.get_by_label("Ask the memory").fill("h1")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("heading", name="This memory is gone")).to_be_focused()
    page.reload()
    expect(page.get_by_role("heading", name="This memory is gone")).to_be_visible()
    page.get_by_role("link", name="Write another one").click()
    expect(page.get_by_label("Text", exact=True)).to_be_visible()


def test_the_list_goes_on_and_is_searched(page: Page, server: Server) -> None:
    client = Client(server.url)
    for number in range(22):
        client.write(f"{number:02d}:aa", "kv-16", steps=0, name=f"many-{number:02d}")
    page.reload()
    page.get_by_label("Names that begin with").fill("many-")
    rows = page.locator("#list li")
    expect(rows).to_have_count(20)
    page.get_by_role("button", name="More").click()
    expect(rows).to_have_count(22)
    expect(page.get_by_role("button", name="More")).to_be_hidden()
    page.get_by_label("Names that begin with").fill("many-07")
    expect(rows).to_have_count(1)
    page.get_by_role("link", name="many-07").click()
    expect(page.get_by_role("heading", name="many-07")).to_be_visible()
    page.get_by_label("Names that begin with").fill("nothing")
    expect(page.get_by_text("No name begins so.")).to_be_visible()


# Everybody


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


# For the documentation


def test_screenshots(server: Server, windows: Windows, screenshots: Path) -> None:
    """The page as the documentation shows it; `--screenshots docs` renews the pictures there."""

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
