"""The tool `memory`: the documented messages of Anthropic's memory tool, and answers from the present text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradmem
from gradmem.store import Store

pytest.importorskip("mcp")
from mcp import Client

from .calling import call, refused, text_of

NOTES, OTHER = "/memories/notes.md", "/memories/plans/plan.md"
QUESTION = "Who signed?"
Talk = Callable[..., Any]


def test_messages_are_the_documented_ones(talk: Talk) -> None:
    async def say(client: Client) -> None:
        async def told(command: str, **arguments: Any) -> str:
            return await text_of(client, "memory", command=command, **arguments)

        listing = (
            "Here're the files and directories up to 2 levels deep in {}, excluding hidden items and node_modules:"
        )
        assert await told("view", path="/memories") == listing.format("/memories") + "\n0B\t/memories"
        created = "File created successfully at: "
        assert await told("create", path=NOTES, file_text="Ann\nBob\nAnn\n") == created + NOTES
        assert await told("create", path=OTHER, file_text="x" * 1536) == created + OTHER
        for hidden in ("/memories/.secret/x", "/memories/plans/node_modules/x", "/memories/plans/a/b/c"):
            await told("create", path=hidden, file_text="1234")
        assert (await told("view", path="/memories/")).splitlines()[1:] == [
            "1.5K\t/memories",
            "12B\t/memories/notes.md",
            "1.5K\t/memories/plans/",
            "4B\t/memories/plans/a/",
            "1.5K\t/memories/plans/plan.md",
        ]
        head = f"Here's the content of {NOTES} with line numbers:\n"
        assert await told("view", path=NOTES) == head + "     1\tAnn\n     2\tBob\n     3\tAnn\n     4\t"
        assert await told("view", path=NOTES, view_range=[2, 3]) == head + "     2\tBob\n     3\tAnn"
        assert await told("view", path=NOTES, view_range=[3, -1]) == head + "     3\tAnn\n     4\t"
        assert await told("str_replace", path=NOTES, old_str="Bob", new_str="Eve") == (
            "The memory file has been edited. Here is the snippet showing the change (with line numbers):\n"
            "     1\tAnn\n     2\tEve\n     3\tAnn\n     4\t"
        )
        assert (
            await told("insert", path=NOTES, insert_line=1, insert_text="Zoe\n") == f"The file {NOTES} has been edited."
        )
        assert (await told("view", path=NOTES)).endswith("     1\tAnn\n     2\tZoe\n     3\tEve\n     4\tAnn\n     5\t")
        renamed = "Successfully renamed /memories/plans to /memories/old/plans"
        assert await told("rename", old_path="/memories/plans", new_path="/memories/old/plans") == renamed
        assert "x" * 1536 in await told("view", path="/memories/old/plans/plan.md")
        assert await told("delete", path="/memories/old") == "Successfully deleted /memories/old"
        assert (await told("view", path="/memories")).splitlines()[2:] == [f"16B\t{NOTES}"]

    talk(say)


def test_errors_are_the_documented_ones(talk: Talk) -> None:
    missing = "/memories/missing"

    async def say(client: Client) -> None:
        await text_of(client, "memory", command="create", path=NOTES, file_text="Ann\nBob\nAnn\n")
        await text_of(client, "memory", command="create", path=OTHER, file_text="Plan")
        absent = f"The path {missing} does not exist"
        for arguments, message in (
            ({"command": "view", "path": missing}, f"{absent}. Please provide a valid path."),
            ({"command": "create", "path": NOTES, "file_text": ""}, f"Error: File {NOTES} already exists"),
            (
                {"command": "create", "path": "/memories/plans", "file_text": ""},
                "Error: File /memories/plans already exists",
            ),
            (
                {"command": "create", "path": NOTES + "/x", "file_text": ""},
                f"Error: {NOTES} is a file, not a directory",
            ),
            (
                {"command": "str_replace", "path": missing, "old_str": "a", "new_str": "b"},
                f"Error: {absent}. Please provide a valid path.",
            ),
            (
                {"command": "str_replace", "path": NOTES, "old_str": "Zoe", "new_str": "b"},
                f"No replacement was performed, old_str `Zoe` did not appear verbatim in {NOTES}.",
            ),
            (
                {"command": "str_replace", "path": NOTES, "old_str": "Ann", "new_str": "b"},
                "No replacement was performed. Multiple occurrences of old_str `Ann` in lines: 1, 3. Please ensure it "
                "is unique",
            ),
            ({"command": "insert", "path": missing, "insert_line": 0, "insert_text": "a"}, f"Error: {absent}"),
            (
                {"command": "insert", "path": NOTES, "insert_line": 4, "insert_text": "a"},
                "Error: Invalid `insert_line` parameter: 4. It should be within the range of lines of the file: [0, 3]",
            ),
            ({"command": "delete", "path": missing}, f"Error: {absent}"),
            ({"command": "delete", "path": "/memories"}, "Error: Cannot delete the /memories directory itself"),
            ({"command": "rename", "old_path": missing, "new_path": "/memories/x"}, f"Error: {absent}"),
            (
                {"command": "rename", "old_path": OTHER, "new_path": NOTES},
                f"Error: The destination {NOTES} already exists",
            ),
            (
                {"command": "rename", "old_path": "/memories/plans", "new_path": "/memories/plans/x"},
                "Error: /memories/plans cannot be moved into itself",
            ),
            ({"command": "create", "path": "/memories/x"}, "Error: `create` needs `file_text`"),
        ):
            assert await refused(client, "memory", **arguments) == message

    talk(say)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "memories/x",
        "/memoriesx",
        "/memories/../etc",
        "/memories/a/../../x",
        "/memories/./x",
        "/memories//x",
        "",
    ],
)
def test_paths_outside_are_refused(talk: Talk, path: str) -> None:
    async def say(client: Client) -> None:
        for arguments in (
            {"command": "view", "path": path},
            {"command": "create", "path": path, "file_text": "x"},
            {"command": "delete", "path": path},
            {"command": "rename", "old_path": path, "new_path": "/memories/x"},
            {"command": "rename", "old_path": "/memories/x", "new_path": path},
        ):
            told = await refused(client, "memory", **arguments)
            assert "must start with /memories" in told or "would escape" in told

    talk(say)


def test_answers_come_from_the_present_text(talk: Talk, place: Path, language_model: str) -> None:
    model = gradmem.load(language_model)
    first, second, plan = "Ann signed the paper.\n", "Bob signed the paper.\n", "Tea at noon.\n"
    steps: list[float] = []

    async def progress(done: float, _: float | None, __: str | None) -> None:
        steps.append(done)

    async def say(client: Client) -> None:
        async def asked(path: str) -> str:
            steps.clear()
            result = await client.call_tool("ask", {"memory": path, "question": QUESTION}, progress_callback=progress)
            assert not result.is_error, result.content
            assert steps == list(range(1, len(steps) + 1))
            return result.structured_content["answer"]

        async def names() -> list[str]:
            return [one["name"] for one in (await call(client, "list"))["memories"]]

        await text_of(client, "memory", command="create", path=NOTES, file_text=first)
        await text_of(client, "memory", command="create", path="/memories/empty", file_text="")
        assert await asked(NOTES) == model.write(first).ask(QUESTION)
        assert steps
        assert await asked("/memories") == model.write(first).ask(QUESTION)
        assert not steps  # it is written already
        await text_of(client, "memory", command="str_replace", path=NOTES, old_str="Ann", new_str="Bob")
        assert await names() == []  # the memory of the former text is gone
        assert await asked(NOTES) == model.write(second).ask(QUESTION)
        await text_of(client, "memory", command="create", path=OTHER, file_text=plan)
        assert await asked("/memories/") == model.join([model.write(second), model.write(plan)]).ask(QUESTION)
        await text_of(client, "memory", command="rename", old_path=NOTES, new_path="/memories/z.md")
        assert await asked("/memories/z.md") == model.write(second).ask(QUESTION)
        assert not steps
        assert sorted(await names()) == [OTHER, "/memories/z.md"]
        for tool, more in (("append", {"text": plan}), ("replace", {"text": plan}), ("forget", {})):
            assert "is a file: change it with" in await refused(client, tool, memory="/memories/z.md", **more)
        await text_of(client, "memory", command="delete", path="/memories/z.md")
        assert await names() == [OTHER]
        assert "there is no text at" in await refused(client, "ask", memory="/memories/empty", question=QUESTION)
        assert "there is no file at" in await refused(client, "ask", memory="/memories/z.md", question=QUESTION)

    talk(say)
    with Store(place) as store:
        assert store.open(OTHER, checkpoint=language_model).ask(QUESTION) == model.write(plan).ask(QUESTION)
