"""The page lists memories, shows receipts, and takes files out and in."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from browsing import LOST, TEXT, Windows, ask, choose, forget, write
from playwright.sync_api import Page, Route, expect
from served import Server

from gradmem import Client, Memory, load


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
    receipt = Client(server.url).inspect("receipt")["receipts"][0]
    expect(page.locator("#facts")).to_contain_text(f"{receipt['loss_before']:.2f} → {receipt['loss_after']:.2f} nats")
    expect(page.locator("#facts")).to_contain_text(receipt["context_sha256"][:12])
    levels = page.locator("#cells .token").evaluate_all("all => all.map((one) => one.dataset.level === 'kept')")
    assert levels == [loss <= LOST for loss in receipt["token_losses"]]
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
    ("losses", "told"),
    [([math.inf], "not a number → not a number"), ([1e300, 1.0], "→ 1.00 nats")],
    ids=["none", "huge"],
)
def test_a_file_whose_numbers_mean_nothing_is_shown(page: Page, tmp_path: Path, losses: list[float], told: str) -> None:
    memory = load("kv-16").write("l1:m2")
    receipt = {"losses": losses, "token_losses": [math.inf, math.nan, 0.1], "context_tokens": 3}
    memory.receipts = [replace(memory.receipts[0], **receipt)]
    saved = memory.save(tmp_path / "odd.safetensors")
    page.get_by_label("Upload").set_input_files(saved)
    expect(page.locator("#facts")).to_contain_text(told)
    expect(page.locator("#cells .token[data-level=kept]")).to_have_count(1)
    expect(ask(page, "l1").locator(".answer")).to_have_text("m2")


def test_the_receipt_says_how_close_answers_are(page: Page, tmp_path: Path) -> None:
    """Over the answer tokens of all rows; a row whose numbers mean nothing is left out."""
    memory = load("kv-16").write(["n1:o2", "p1:q2", "r1:s2"])
    same = {"questions": 4, "kl_start": 0.5, "agreement_unwritten": 0.5, "kl_unwritten": 2.5}
    found = [{"tokens": 90, "agreement": 0.9, "kl": 0.2}, {"tokens": 10, "agreement": 0.4, "kl": 1.2}, {"kl": math.nan}]
    memory.receipts = [
        replace(receipt, fidelity=same | own) for receipt, own in zip(memory.receipts, found, strict=True)
    ]
    page.get_by_label("Upload").set_input_files(memory.save(tmp_path / "close.safetensors"))
    expect(page.locator("#facts")).to_contain_text("85.0 % of 100 answer tokens, 50.0 % without the text")
    expect(page.locator("#facts")).to_contain_text("0.30 nats, 2.50 without the text")


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
    expect(page.locator("#write-error")).to_contain_text("not UTF-8 text")
    large = tmp_path / "large.txt"
    large.write_text("a" * 20_001)
    page.get_by_label("Open a file").set_input_files(large)
    expect(page.locator("#write-error")).to_contain_text("the server takes at most 20,000 bytes")
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
    expect(other.get_by_role("heading", name="This memory no longer exists")).to_be_visible()
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
    expect(page.get_by_role("heading", name="This memory no longer exists")).to_be_focused()
    page.reload()
    expect(page.get_by_role("heading", name="This memory no longer exists")).to_be_visible()
    page.get_by_role("link", name="Write a new memory").click()
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
    expect(page.get_by_text("No name begins with this.")).to_be_visible()
