"""The command line: `gradmem COMMAND`.

`COMMANDS` and `GROUPS` map each command to its function. Options, defaults and help come from the signature and the
docstring of the function. Nothing here imports PyTorch or transformers, which take seconds to load: `--help`, `list`,
`store ls` and the like need neither.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ..errors import GradmemError
from ..visible import visible
from . import composing, evaluation, mcp, memory, serving, training
from .board import board
from .console import use_utf8
from .corpus import write_corpus
from .demo import demo
from .download import download
from .export import export, merge
from .launch import launch
from .pack import pack
from .parsers import (
    HelpFormatter,
    command_parser,
    full_name,
    given_recipe,
    group_commands,
    nested_option,
    recipe_of,
    recipe_parser,
    summary,
)

RECIPE_COMMANDS: dict[str, Callable[..., Any]] = {"train": training.train, "plan": training.plan}
"""Commands with a recipe, whose fields are options too."""
COMMANDS: dict[str, Callable[..., Any]] = {
    "eval": evaluation.measure,
    "sweep": evaluation.sweep,
    "compare": evaluation.compare,
    "board": board,
    "calibrate": evaluation.calibrate,
    "write": memory.write,
    "write-corpus": write_corpus,
    "ask": memory.ask,
    "restore": memory.restore,
    "inspect": memory.inspect,
    "join": composing.join,
    "replace": composing.replace,
    "forget": composing.forget,
    "export": export,
    "pack": pack,
    "merge": merge,
    "serve": serving.serve,
    "mcp": mcp.mcp,
    "demo": demo,
    "list": memory.show_list,
    "download": download,
}
GROUPS = {
    "store": ("gradmem.cli.store:COMMANDS", "Manage stored memories (GRADMEM_STORE: file or PostgreSQL URL)."),
    "keys": (
        "gradmem.cli.serving:KEYS",
        "Manage the API keys of `gradmem serve` (GRADMEM_KEYS: file of their hashes).",
    ),
}
"""Groups of commands: where the table of the group is, imported when it is needed, and the help of the group."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Parameters
    ----------
    arguments : list of str, optional
        By default those of the process.

    Returns
    -------
    int
        Exit code: 0, 2 after a one-line error message, or 130 after an interruption.
    """
    if arguments is None:
        use_utf8()
        warnings.showwarning = _note
        arguments = sys.argv[1:]
    for number, argument in enumerate(arguments, 1):
        if not _is_text(argument):
            return _refuse(f"argument {number} is not UTF-8 text: rename the file, or give it on standard input")
    arguments = [full_name(argument) for argument in arguments]
    if arguments and arguments[0] in COMMANDS:
        arguments = [nested_option(argument, arguments[0], COMMANDS[arguments[0]]) for argument in arguments]
    try:
        _run(arguments)
    except GradmemError as error:
        return _refuse(str(error))
    except ArgumentError as error:
        return _refuse(f"{error} (see gradmem {' '.join(arguments[:1])} --help)")
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # of several training processes only the first prints
            print(f"gradmem: interrupted{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has exited. Python must not fail when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _refuse(reason: str) -> int:
    print("gradmem: error: " + visible(" ".join(reason.split())), file=sys.stderr)
    return 2


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of this package as one line, and others as Python does."""
    ours = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1])
    shown = f"gradmem: note: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(shown)


def _is_text(argument: str) -> bool:
    """Whether an argument is UTF-8. Python decodes other bytes to lone surrogates, which cannot be printed."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _run(arguments: list[str]) -> None:
    """Parse the arguments and call the function of the command. Only that command gets a parser with its options."""
    parser = ArgumentParser(
        prog="gradmem",
        description="Memory for language models: write once, ask many.",
        version=version("gradmem"),
        exit_on_error=False,
        formatter_class=HelpFormatter,  # subcommands take it over
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    helps = {name: summary(function) for name, function in {**RECIPE_COMMANDS, **COMMANDS}.items()}
    helps |= {name: about for name, (_, about) in GROUPS.items()}
    for name, about in helps.items():
        subparser = _parser(name, arguments) if name == command else ArgumentParser()
        subcommands.add_subcommand(name, subparser, help=about)
        if name == command and name in GROUPS:
            members = subparser.add_subcommands(required=True, metavar="COMMAND")
            for member, function in group_commands(GROUPS[name][0]).items():
                members.add_subcommand(member, command_parser(f"{name} {member}", function), help=summary(function))
    parsed = parser.parse_args(arguments)
    name, options = parsed.subcommand, parsed[parsed.subcommand]
    if name in RECIPE_COMMANDS:
        _run_with_recipe(name, parser.instantiate(parsed)[name], arguments)
    elif name in GROUPS:
        given = options[options.subcommand]
        group_commands(GROUPS[name][0])[options.subcommand](**(given.as_dict() if given else {}))
    else:
        COMMANDS[name](**options.as_dict())


def _parser(name: str, arguments: list[str]) -> ArgumentParser:
    """Build the parser of one command."""
    if name in GROUPS:
        return ArgumentParser(description=GROUPS[name][1])
    if name in COMMANDS:
        return command_parser(name, COMMANDS[name])
    parser = recipe_parser(RECIPE_COMMANDS[name], given_recipe(arguments))
    if name == "train":
        parser.add_argument(
            "--output", type=Path | None, default=None, help="Directory of the run (default: runs/RECIPE)."
        )
        parser.add_argument(
            "--processes",
            type=int,
            default=1,
            help="Data-parallel processes, one for each GPU, or with one CPU thread each.",
        )
    return parser


def _run_with_recipe(name: str, options: Namespace, arguments: list[str]) -> None:
    if name == "plan":
        training.plan(recipe_of(options), options.json)
    elif options.processes > 1 and "RANK" not in os.environ:
        launch(options.processes, options.device, arguments)
    else:
        output = options.output or Path("runs") / Path(options.recipe).stem
        training.train(recipe_of(options), output, options.resume)


if __name__ == "__main__":
    sys.exit(main())
