"""The tool `memory`: Anthropic's memory tool over the store.

Its input and its messages are those of `memory_20250818`, so that a program can pass on what a model asks for as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations
from pydantic import Field

from ..errors import Conflict, GradmemError, Missing
from ..serving.validation import Line, Text
from ..store.text_files import TextFiles
from . import file_texts
from .workspace import Workspace

Command = Literal["view", "create", "str_replace", "insert", "delete", "rename"]
Path = Line | None
Range = Annotated[list[int], Field(min_length=2, max_length=2)]


class FileTool:
    """The tool.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    async def memory(
        self,
        command: Annotated[Command, Field(description="What to do.")],
        path: Annotated[Path, Field(description="File or directory, such as /memories/notes.md.")] = None,
        view_range: Annotated[Range | None, Field(description="`view`: first and last line; -1 is the end.")] = None,
        file_text: Annotated[Text | None, Field(description="`create`: text of the new file.")] = None,
        old_str: Annotated[Text | None, Field(description="`str_replace`: text that the file has once.")] = None,
        new_str: Annotated[Text, Field(description="`str_replace`: text to put in its place.")] = "",
        insert_line: Annotated[int | None, Field(description="`insert`: line to insert after; 0 is the top.")] = None,
        insert_text: Annotated[Text | None, Field(description="`insert`: text to insert.")] = None,
        old_path: Annotated[Path, Field(description="`rename`: present path.")] = None,
        new_path: Annotated[Path, Field(description="`rename`: new path.")] = None,
    ) -> str:
        """View, create, edit, delete and rename text files below /memories, which stay for later conversations.

        `ask` answers questions from a file, or from all files of a directory: give it the path as the memory.
        """
        given: dict[str, Any] = {
            "path": path,
            "view_range": view_range,
            "file_text": file_text,
            "old_str": old_str,
            "new_str": new_str,
            "insert_line": insert_line,
            "insert_text": insert_text,
            "old_path": old_path,
            "new_path": new_path,
        }
        action, needed, changes = COMMANDS[command]
        for name in needed:
            if given[name] is None:
                raise GradmemError(f"Error: `{command}` needs `{name}`")
            if name.endswith("path"):
                given[name] = file_texts.checked_path(given[name])
        use = self.workspace.store.change if changes else self.workspace.store.read
        return await use(lambda store: action(TextFiles(store), **given))


def view(files: TextFiles, path: str, view_range: list[int] | None, **_: Any) -> str:
    """Show a file, or list a directory."""
    sizes = files.sizes(path)
    if path in sizes:
        return file_texts.content(path, files.read(path)[0].text, view_range)
    if not sizes and path != file_texts.ROOT:
        raise GradmemError(f"The path {path} does not exist. Please provide a valid path.")
    return file_texts.listing(path, sizes)


def create(files: TextFiles, path: str, file_text: str, **_: Any) -> str:
    """Store a new file."""
    if path == file_texts.ROOT:
        raise GradmemError(f"Error: File {path} already exists")
    try:
        files.create(path, file_text)
    except Conflict as error:
        raise GradmemError(f"Error: {error}") from error
    return f"File created successfully at: {path}"


def str_replace(files: TextFiles, path: str, old_str: str, new_str: str, **_: Any) -> str:
    """Replace a string that a file has once."""
    line = 1

    def change(text: str) -> str:
        nonlocal line
        text, line = file_texts.replaced(path, text, old_str, new_str)
        return text

    try:
        text = files.edit(path, change)
    except Missing as error:
        raise GradmemError(f"Error: The path {path} does not exist. Please provide a valid path.") from error
    return file_texts.snippet(text, line)


def insert(files: TextFiles, path: str, insert_line: int, insert_text: str, **_: Any) -> str:
    """Insert text after a line of a file."""
    try:
        files.edit(path, lambda text: file_texts.inserted(text, insert_line, insert_text))
    except Missing as error:
        raise GradmemError(f"Error: The path {path} does not exist") from error
    return f"The file {path} has been edited."


def delete(files: TextFiles, path: str, **_: Any) -> str:
    """Delete a file, or a directory with all files in it."""
    if path == file_texts.ROOT:
        raise GradmemError(f"Error: Cannot delete the {path} directory itself")
    try:
        files.delete(path)
    except Missing as error:
        raise GradmemError(f"Error: The path {path} does not exist") from error
    return f"Successfully deleted {path}"


def rename(files: TextFiles, old_path: str, new_path: str, **_: Any) -> str:
    """Rename or move a file or a directory."""
    if old_path == file_texts.ROOT:
        raise GradmemError(f"Error: Cannot rename the {old_path} directory itself")
    if new_path == file_texts.ROOT:
        raise GradmemError(f"Error: The destination {new_path} already exists")
    try:
        files.rename(old_path, new_path)
    except Missing as error:
        raise GradmemError(f"Error: The path {old_path} does not exist") from error
    except Conflict as error:
        raise GradmemError(f"Error: {error}") from error
    return f"Successfully renamed {old_path} to {new_path}"


COMMANDS: dict[str, tuple[Callable[..., str], tuple[str, ...], bool]] = {
    "view": (view, ("path",), False),
    "create": (create, ("path", "file_text"), True),
    "str_replace": (str_replace, ("path", "old_str"), True),
    "insert": (insert, ("path", "insert_line", "insert_text"), True),
    "delete": (delete, ("path",), True),
    "rename": (rename, ("old_path", "new_path"), True),
}
"""For each command its function, the arguments that it needs, and whether it changes the store."""


def register(server: MCPServer, workspace: Workspace) -> None:
    """Add the tool to a server."""
    changes = ToolAnnotations(destructive_hint=True, open_world_hint=False)
    server.add_tool(FileTool(workspace).memory, annotations=changes, structured_output=False)
