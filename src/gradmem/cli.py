"""The command line: options, defaults and help come from the signatures in the modules named `commands`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from . import __version__, commands
from .demo import demo
from .errors import GradmemError
from .evaluation import commands as evaluation_commands
from .serving import commands as serving_commands
from .store import commands as store_commands
from .training import commands as training_commands
from .training.recipe import Recipe, recipe_names, recipe_values

set_parsing_settings(docstring_parse_attribute_docstrings=True)
register_type(evaluation_commands.Ints, lambda numbers: ",".join(map(str, numbers)), evaluation_commands.Ints.parse)
register_type(datetime, datetime.isoformat, datetime.fromisoformat)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eval": evaluation_commands.evaluate,
    "sweep": evaluation_commands.sweep,
    "compare": evaluation_commands.compare,
    "calibrate": evaluation_commands.calibrate,
    "write": commands.write,
    "ask": commands.ask,
    "restore": commands.restore,
    "inspect": commands.inspect,
    "serve": serving_commands.serve,
    "demo": demo,
    "list": commands.show_list,
}
CHECKPOINTS_HELP = "names of packaged checkpoints, directories, or hub names"
SYSTEMS_HELP = "recipes, each trained in OUTPUT/NAME where that is not done yet, directories of runs, and checkpoints"
QUERIES_HELP = "queries; without any, one a line from standard input, answered as JSON lines"
KEYS_HELP = "API keys of `gradmem serve` (GRADMEM_KEYS: the file of their hashes)."
STORE_HELP = "Memories that are kept, under names and tags (GRADMEM_STORE: file or PostgreSQL URL)."
GROUPS = {"store": (store_commands.COMMANDS, STORE_HELP), "keys": (serving_commands.KEYS, KEYS_HELP)}
BY_HAND: dict[Callable[..., Any], dict[str, dict[str, Any]]] = {
    commands.write: {
        "--store": {"action": "store_true", "help": "keep the memory in the store; a file only where OUTPUT is given"},
    },
    commands.ask: {
        "memory": {"type": Path, "help": "memory file, or id or name in the store"},
        "queries": {"nargs": "*", "help": QUERIES_HELP},
        "--jsonl": {"action": "store_true", "help": "print JSON lines also for queries given as arguments"},
        "--abstain": {
            "action": "store_true",
            "help": "say where the answer is not in the memory, and how sure others are",
        },
    },
    serving_commands.serve: {
        "checkpoints": {"nargs": "*", "help": "checkpoints to serve; default: those in the package"},
    },
    evaluation_commands.sweep: {"checkpoints": {"nargs": "+", "help": CHECKPOINTS_HELP}},
    evaluation_commands.compare: {"systems": {"nargs": "+", "help": SYSTEMS_HELP}},
    commands.inspect: {"--json": {"action": "store_true", "help": "print the records as JSON"}},
    store_commands.ls: {"--json": {"action": "store_true", "help": "print them as JSON"}},
    store_commands.show: {"--json": {"action": "store_true", "help": "print them as JSON"}},
    store_commands.diff: {"--json": {"action": "store_true", "help": "print it as JSON"}},
    store_commands.rm: {"refs": {"nargs": "*", "help": "ids or names"}},
    store_commands.import_files: {"files": {"nargs": "+", "type": Path, "help": "memory files"}},
    store_commands.rename: {
        "ref": {"help": "id or name"},
        "name": {"nargs": "?", "help": "new name; without one the memory has none"},
    },
    store_commands.pin: {"--off": {"action": "store_true", "help": "no longer keep it from that"}},
}
SHORT = {"-o": "--output"}
INNER = {"eval": "task", "calibrate": "task", "write": "options"}
"""Commands that take any option of a task or a method, and their parameter for these."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return 0, or 2 after one line that says what was wrong."""
    arguments = [_long(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if arguments and arguments[0] in INNER:
        arguments = [_inner_option(argument, arguments[0]) for argument in arguments]
    try:
        _run(arguments)
    except GradmemError as error:
        return _refuse(str(error))
    except ArgumentError as error:
        return _refuse(f"{error} (see gradmem {' '.join(arguments[:1])} --help)")
    except BrokenPipeError:
        # The reader of our output has left (as `head` does): nothing more to say, and no traceback at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _refuse(reason: str) -> int:
    print("gradmem: error: " + " ".join(reason.split()), file=sys.stderr)
    return 2


def _long(argument: str) -> str:
    """`-o` as `--output`, and `--max-steps` as the parameter `--max_steps`."""
    name, equals, value = argument.partition("=")
    return (
        SHORT.get(name, name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name)
        + equals
        + value
    )


def _inner_option(argument: str, command: str) -> str:
    """`--tasks qa1` as `--task.tasks qa1`: what is no option of the command is one of its task or its method."""
    name = argument.removeprefix("--").partition("=")[0].partition(".")[0]
    known = {*inspect.signature(FUNCTIONS[command]).parameters, "help", ""}
    inner = argument.startswith("--") and name not in known
    return f"--{INNER[command]}.{argument[2:]}" if inner else argument


def _run(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="gradmem",
        description="Memory for language models: write once, ask many.",
        version=__version__,
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    recipe = _given_recipe(arguments)
    subcommands.add_subcommand("train", _train_parser(recipe), help="train a recipe")
    subcommands.add_subcommand(
        "plan", _recipe_parser(training_commands.plan, recipe), help=_summary(training_commands.plan)
    )
    for name, function in FUNCTIONS.items():
        subcommands.add_subcommand(name, _function_parser(function), help=_summary(function))
    for group, (functions, about) in GROUPS.items():
        grouped = ArgumentParser(description=about)
        subcommands.add_subcommand(group, grouped, help=about)
        members = grouped.add_subcommands(required=True, metavar="COMMAND")
        for name, function in functions.items():
            members.add_subcommand(name, _function_parser(function), help=_summary(function))
    parsed = parser.parse_args(arguments)
    chosen = parsed[parsed.subcommand]
    if parsed.subcommand == "train":
        _train(parser.instantiate(parsed)["train"], arguments)
    elif parsed.subcommand == "plan":
        options = parser.instantiate(parsed)["plan"]
        training_commands.plan(_recipe(options), options.json)
    elif parsed.subcommand in GROUPS:
        functions, _ = GROUPS[parsed.subcommand]
        given = chosen[chosen.subcommand]
        functions[chosen.subcommand](**(given.as_dict() if given else {}))
    else:
        FUNCTIONS[parsed.subcommand](**chosen.as_dict())


def _function_parser(function: Callable[..., Any]) -> ArgumentParser:
    """Options of a command. Flags and the rest of the line are told by hand: signatures do not know them."""
    parser = ArgumentParser(description=_summary(function))
    by_hand = BY_HAND.get(function, {})
    for name, settings in by_hand.items():
        parser.add_argument(name, **settings)
    skip: set[Any] = {name.lstrip("-") for name in by_hand}
    parser.add_function_arguments(function, as_positional=True, skip=skip, fail_untyped=True)
    return parser


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _given_recipe(arguments: list[str]) -> str | None:
    given = arguments[1:2] if arguments[:1] in (["train"], ["plan"]) else []
    return given[0] if given and not given[0].startswith("-") else None


def _train_parser(recipe: str | None) -> ArgumentParser:
    parser = _recipe_parser(training_commands.train, recipe)
    parser.add_argument("--output", type=Path | None, default=None, help="directory of the run (default: runs/RECIPE)")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel CPU processes, one thread each")
    return parser


def _recipe_parser(function: Callable[..., Any], recipe: str | None) -> ArgumentParser:
    """Options of a command with a recipe: its fields too, with the values of the recipe that was named as defaults."""
    parser = ArgumentParser(description=f"{_summary(function)} Recipes in the package: {', '.join(recipe_names())}.")
    parser.add_argument("recipe", help="name of a packaged recipe, or a YAML file")
    parser.add_function_arguments(function, skip={"recipe", "output"})
    parser.add_class_arguments(Recipe)
    if recipe is not None:
        parser.set_defaults(recipe_values(recipe))
    return parser


def _train(options: Namespace, arguments: list[str]) -> None:
    if options.processes > 1 and "RANK" not in os.environ:
        _launch(options.processes, arguments)
        return
    output = options.output or Path("runs") / Path(options.recipe).stem
    training_commands.train(_recipe(options), output, options.resume)


def _recipe(options: Namespace) -> Recipe:
    return Recipe(**{field.name: options[field.name] for field in dataclasses.fields(Recipe)})


def _launch(processes: int, arguments: list[str]) -> None:
    """Run the same command in several processes; two with one thread each beat one with two threads on a CPU."""
    import torch.distributed.run as launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns once that it need not look for unused parameters
    try:
        launcher.main(["--standalone", f"--nproc-per-node={processes}", "-m", "gradmem", *arguments])
    except ChildFailedError as error:
        raise GradmemError(f"one of {processes} training processes failed: its own message is above") from error


if __name__ == "__main__":
    sys.exit(main())
