"""Parsers of the commands, built from the signatures and docstrings of their functions."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from ..plugins import names
from ..training.recipe import Recipe, recipe_names, recipe_values
from .evaluation import Ints

set_parsing_settings(docstring_parse_attribute_docstrings=True)
register_type(Ints, lambda numbers: ",".join(map(str, numbers)), Ints.parse)
register_type(datetime, datetime.isoformat, datetime.fromisoformat)

NARGS = {
    "ask": {"queries": "*"},
    "serve": {"checkpoints": "*"},
    "mcp": {"checkpoints": "*"},
    "sweep": {"checkpoints": "+"},
    "join": {"memories": "+"},
    "compare": {"systems": "+"},
    "store rm": {"refs": "*"},
    "store import": {"files": "+"},
    "store rename": {"name": "?"},
}
"""Positional arguments that take any number of values, or may be omitted. All others take one value."""
SHORT = {"-o": "--output"}
NESTED = {"eval": "task", "calibrate": "task", "write": "options", "write-corpus": "options"}
"""Commands that accept every option of a task or a method, and the parameter that collects these options."""


class HelpFormatter(DefaultHelpFormatter):
    """Help without types of positional arguments, and without defaults that are null or empty."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.help or ""
        useless = ", default: %(default)s" if action.default in (None, "") else "required, "
        return super()._get_help_string(action).replace(useless, "")


def full_name(argument: str) -> str:
    """Replace `-o` by `--output`, and `--max-steps` by `--max_steps`."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    return SHORT.get(name, name) + equals + value


def nested_option(argument: str, command: str, function: Callable[..., Any]) -> str:
    """Replace `--tasks qa1` by `--task.tasks qa1` if the option belongs to the task or the method of a command."""
    name = argument.removeprefix("--").partition("=")[0].partition(".")[0]
    own = {*inspect.signature(function).parameters, "help", ""}
    if command not in NESTED or not argument.startswith("--") or name in own:
        return argument
    return f"--{NESTED[command]}.{argument[2:]}"


def command_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Build the parser of a function. Parameters without a default are positional, and booleans are flags."""
    parser = ArgumentParser(description=_description(function))
    parameters = inspect.signature(function).parameters
    helps = {one.arg_name: one.description for one in docstring_parser.parse(function.__doc__ or "").params}
    nargs = NARGS.get(command, {})
    added: set[str | int] = set()
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        settings: dict[str, Any] = {"help": helps.get(name)}
        if parameter.annotation == "bool":
            parser.add_argument(f"--{name}", action="store_true", **settings)
        elif parameter.annotation == "list[str] | None":
            parser.add_argument(f"--{name}", action="append", type=str, **settings)
        elif name in nargs or (nargs and required):
            settings |= {"nargs": nargs[name]} if name in nargs else {}
            parser.add_argument(name, type=Path if "Path" in parameter.annotation else str, **settings)
        else:
            continue
        added.add(name)
    parser.add_function_arguments(function, as_positional=True, skip=added, fail_untyped=True)
    return parser


def recipe_parser(function: Callable[..., Any], recipe: str | None) -> ArgumentParser:
    """Build the parser of a function of a recipe. The values of the named recipe are the defaults of its fields."""
    known = {"recipes": recipe_names(), "methods": names("gradmem.methods"), "tasks": names("gradmem.tasks")}
    listed = " ".join(f"Known {kind}: {', '.join(found)}." for kind, found in known.items())
    parser = ArgumentParser(description=f"{summary(function)} {listed}")
    parser.add_argument("recipe", help="Name of a recipe, or a YAML file.")
    parser.add_function_arguments(function, skip={"recipe", "output"})
    parser.add_class_arguments(Recipe)
    if recipe is not None:
        parser.set_defaults(recipe_values(recipe))
    return parser


def given_recipe(arguments: list[str]) -> str | None:
    """Return the recipe in the arguments of `train` or `plan`."""
    return arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None


def recipe_of(options: Namespace) -> Recipe:
    """Return the recipe with the options of the command line."""
    return Recipe(**{field.name: options[field.name] for field in dataclasses.fields(Recipe)})


def group_commands(table: str) -> dict[str, Callable[..., Any]]:
    """Import the commands of a group from `module:name`."""
    module, name = table.split(":")
    commands: dict[str, Callable[..., Any]] = getattr(import_module(module), name)
    return commands


def summary(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring."""
    return (function.__doc__ or "").splitlines()[0]


def _description(function: Callable[..., Any]) -> str:
    """Return a docstring without its parameters."""
    text = inspect.cleandoc(function.__doc__ or "").partition("\nParameters\n")[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
