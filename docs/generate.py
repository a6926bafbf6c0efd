"""Write the pages of the reference that say what the code says: commands, recipe fields, HTTP API.

`python docs/generate.py` renews them; `tests/test_docs.py` fails while they are not current.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import tempfile
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

import docstring_parser

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py: do not edit. -->\n"
WIDTH = "80"
"""Columns of help texts: what a page shows without scrolling."""
Plain = dict[str, Any]


def commands() -> str:
    """Every command with what its `--help` says."""
    page = [
        "# Commands\n",
        NOTE,
        "What `--help` says on each command. Options may be written with hyphens too: `--max-steps` is `--max_steps`.",
        "Bad input gets one line and exit code 2, an interruption exit code 130. Text is UTF-8 in and out.\n",
        f"```text\n{help_of()}\n```\n",
    ]
    for name in subcommands(help_of()):
        page.append(f"## gradmem {name}\n\n```text\n{help_of(name)}\n```\n")
        if name in ("store", "keys"):
            page += [f"### gradmem {name} {one}\n\n```text\n{help_of(name, one)}\n```\n" for one in members(name)]
    return "\n".join(page)


def members(group: str) -> list[str]:
    """Commands of a group."""
    return subcommands(help_of(group))


def subcommands(text: str) -> list[str]:
    """Names that a help text lists as subcommands: four blanks before them."""
    return re.findall(r"^    ([\w-]+) ", text[text.index("Available subcommands") :], re.M)


def help_of(*command: str) -> str:
    """What a command prints with `--help`, without the fields of a recipe, which have a page of their own."""
    from gradmem.cli.main import main

    printed = io.StringIO()
    plain = mock.patch.dict(os.environ, COLUMNS=WIDTH, NO_COLOR="1")
    with plain, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    text = printed.getvalue().rstrip()
    if command in (("train",), ("plan",)):
        usage = rf"(usage: gradmem \[options\] {command[0]}) .*? recipe\n"
        text = re.sub(usage, r"\1 [OPTIONS] [--FIELD VALUE ...] recipe\n", text, count=1, flags=re.S)
        text = text[: text.index("\nA training run from beginning to end")].rstrip()
        text += "\n\nEach field of a recipe is an option too: see the page of recipe fields."
    return text


def fields_of(kind: type) -> str:
    """A table of the fields of a dataclass with attribute docstrings."""
    parts = [docstring_parser.parse_from_object(one).params for one in reversed(kind.__mro__[:-1])]
    texts = {one.arg_name: one.description or "" for params in parts for one in params}
    hints = get_type_hints(kind)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            default = f"`{field.default}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{field.default_factory()}`"
        else:
            default = "required"
        rows.append(
            f"| `{field.name}` | `{type_named(hints[field.name])}` | {default} | {one_line(texts[field.name])} |"
        )
    return "\n".join(rows)


def type_named(hint: Any) -> str:
    """A type as it is written in Python."""
    shown_as = hint.__name__ if type(hint) is type else re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", str(hint))
    return shown_as.replace("|", "\\|")


def recipes() -> str:
    """Fields of a recipe and of its stages."""
    from gradmem.training.recipe import Recipe, Stage

    return "\n".join(
        [
            "# Recipe fields\n",
            NOTE,
            "A recipe is a YAML file. Each field is an option of `gradmem train` and `gradmem plan` too:",
            "`--seed 1`, `--method.n_mem 16`. A recipe that begins with `extends: OTHER` takes from the other what it",
            "does not say itself. How to write one: [add a recipe](../howto/add-recipe.md).\n",
            fields_of(Recipe),
            "\n## Stages\n",
            "`stages` is a list. Each stage trains until `until_exact_match` or `max_steps`, whichever comes first.\n",
            fields_of(Stage),
            "",
        ]
    )


def methods() -> str:
    """Options of every method."""
    from gradmem import methods as package
    from gradmem.methods.base.options import Options

    page = [
        "# Method options\n",
        NOTE,
        "Options stand under `method` in a recipe, beside its `name`, and are options of `gradmem train` too:",
        "`--method.n_mem 16`. How to add a method: [how-to](../howto/add-method.md).\n",
    ]
    for file in pkgutil.iter_modules(package.__path__):
        if file.name == "base":
            continue
        members = list(vars(importlib.import_module(f"{package.__name__}.{file.name}")).values())
        own = [one for one in members if inspect.isclass(one) and one.__module__ == f"{package.__name__}.{file.name}"]
        (method,) = (one for one in own if issubclass(one, package.Method))
        found = [one for one in members if inspect.isclass(one) and issubclass(one, Options)]
        page += [f"## `{file.name}`\n", (method.__doc__ or "").splitlines()[0] + "\n"]
        page += [fields_of(max(found, key=lambda one: len(one.__mro__))) + "\n"] if found else []
    return "\n".join(page)


def http() -> str:
    """The HTTP API, from its OpenAPI document."""
    from gradmem.serving.app import create_app
    from gradmem.serving.http_errors import ERROR_RESPONSES
    from gradmem.store import Store

    with tempfile.TemporaryDirectory() as directory, Store(f"{directory}/store.db") as store:
        api = create_app(store).openapi()
    page = [
        "# HTTP API\n",
        NOTE,
        "A server describes itself too: `/openapi.json` is this document for machines, `/docs` a page of it. How to",
        "start one, keys, limits and the client: [serve memories](../howto/serve.md).\n",
        "Bodies are JSON and say so (`Content-Type: application/json`). Errors have one form,",
        '`{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`:\n',
        "| status | meaning |\n|---|---|",
        *(f"| {status} | {STATUSES[int(status)]} |" for status in ERROR_RESPONSES),
        "",
    ]
    for path, methods in api["paths"].items():
        for method, about in methods.items():
            page.append(endpoint(method.upper(), path, about, api["components"]["schemas"]))
    return "\n".join(page)


STATUSES = {
    400: "this is no HTTP/1.1 request, or its head is too long; in OpenAI's API also what is 422 elsewhere",
    401: "a key is missing or wrong",
    403: "a full quota, or a page of another site",
    404: "no such memory or checkpoint",
    405: "the path has no such method",
    408: "the request did not arrive in time",
    409: "the name is taken, or the memory is pinned",
    413: "too large",
    415: "the body is not what it should be",
    422: "a text or an option that cannot be taken",
    429: "too many requests: `Retry-After` says in how many seconds to come back",
    502: "the upstream server failed",
    503: "not now: `Retry-After` likewise",
    504: "it took too long",
}
"""What each status of an error means."""


def endpoint(method: str, path: str, about: Plain, schemas: Plain) -> str:
    """One method of one path."""
    lines = [f"## `{method} {path}`\n", paragraphs(about.get("description", "")), ""]
    rows = [(one["name"], one["in"], one["schema"], one.get("required", False)) for one in about.get("parameters", [])]
    for kind, body in about.get("requestBody", {}).get("content", {}).items():
        if "$ref" not in body["schema"]:
            lines.append(f"The body is `{kind}`.\n")
            continue
        whole = schemas[body["schema"]["$ref"].rsplit("/", 1)[1]]
        required = whole.get("required", [])
        rows += [(name, "body", schema, name in required) for name, schema in whole["properties"].items()]
    if rows:
        lines.append("| parameter | where | type | default | meaning |\n|---|---|---|---|---|")
        for name, where, schema, required in rows:
            default = "required" if required else shown(schema.get("default"))
            meaning = one_line(schema.get("description", ""))
            lines.append(f"| `{name}` | {where} | {type_of(schema)} | {default} | {meaning} |")
        lines.append("")
    answer = next(one for status, one in about["responses"].items() if status < "300")
    for body in answer.get("content", {}).values():
        schema = body.get("schema", {})
        if "$ref" in schema:
            found = schemas[schema["$ref"].rsplit("/", 1)[1]]
            lines.append("Answer: " + ", ".join(f"`{name}`" for name in found["properties"]) + ".\n")
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default for a cell of a table."""
    return "" if default in (None, "") else f"`{default}`"


def type_of(schema: Plain) -> str:
    """A JSON type in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if kinds := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(type_of(one) for one in kinds))
    if "enum" in schema:
        return ", ".join(f"`{one if isinstance(one, str) else json.dumps(one)}`" for one in schema["enum"])
    kind = str(schema.get("type", "any"))
    return f"list of {type_of(schema['items'])}" if kind == "array" and "items" in schema else kind


def paragraphs(text: str) -> str:
    """A docstring without its sections of parameters."""
    return re.split(r"\n(?:Parameters|Attributes|Raises)\n-", inspect.cleandoc(text))[0].strip()


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"cli.md": commands, "recipe.md": recipes, "methods.md": methods, "http.md": http}
"""Pages by name, and what writes them."""

if __name__ == "__main__":
    for name, written in PAGES.items():
        (REFERENCE / name).write_text(written(), encoding="utf-8")
