"""The page writes a text, forgets it and asks the memory; what goes wrong there keeps the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import LOST, TEXT, Windows, ask, choose, forget, numbers, said, write
from playwright.sync_api import Page, expect
from served import Server

from chat_models import save_model
from gradmem import Client, load
from gradmem.serving.api_keys import ApiKeys


def test_a_text_is_written_watched_forgotten_and_asked(page: Page) -> None:
    page.evaluate("Math.random = () => 0.5")  # always the same example: of some, three steps keep what five do
    text = write(page)
    pairs = dict(line.split(":") for line in text.splitlines())
    receipts = [load("kv-16").write(text, steps).receipts[0] for steps in range(6)]
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
    expect(page.locator("#text-size")).to_contain_text(f"The text had {len(text.encode())} bytes, less than the memory")
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
    assert found["receipts"][0]["steps"] == 2
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
        ("babi", "Mary went to the garden. " * 1000, "the server takes at most 20,000 bytes"),
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
    expect(page.locator("#ask-error")).to_contain_text("is no query: ask for a key")
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
    key = ApiKeys(tmp_path / "keys.json").add("me")
    server = Server(tmp_path, "kv-16", "--host", "0.0.0.0")
    try:
        page = windows.open(server.url.replace("0.0.0.0", "127.0.0.1"))
        dialog = page.get_by_role("dialog", name="This server needs a key")
        dialog.get_by_role("button", name="Not now").click()
        expect(page.locator("#write-error")).to_contain_text("needs a key")
        page.get_by_role("button", name="Write", exact=True).click()
        for given in ("gm-wrong", key):
            expect(dialog).to_be_visible()
            dialog.get_by_label("Key").fill(given)
            dialog.get_by_role("button", name="Continue").click()
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


def test_a_language_model_offers_a_paragraph_and_its_questions(tmp_path: Path, windows: Windows) -> None:
    """As the first choice; random weights answer nothing right, and the page says what the text said."""
    server = Server(tmp_path, save_model(tmp_path / "lm"), "kv-16")
    try:
        page = windows.open(server.url)
        expect(page.locator("#about")).to_contain_text("Task document")
        page.get_by_role("button", name="Try an example").click()
        expect(page.get_by_label("Text", exact=True)).not_to_have_value("")
        text = page.get_by_label("Text", exact=True).input_value()
        page.get_by_role("button", name="Write", exact=True).click()
        expect(page.locator("#write-status")).to_contain_text("Written in")
        forget(page)
        page.get_by_role("button", name="Ask all").click()
        expect(page.locator("#answers li")).to_have_count(3)
        page.get_by_role("button", name="Check the answers").click()
        expect(page.locator(".truth.wrong")).to_have_count(3)
        said = [told.removeprefix("✗ the text said ") for told in page.locator(".truth").all_text_contents()]
        assert all(answer in text for answer in said)
    finally:
        server.process.kill()
        server.process.wait()
