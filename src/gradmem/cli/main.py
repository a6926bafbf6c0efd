"""The command line: options, defaults and help come from the signatures in the modules named `commands`.

Only the command that was given gets a parser with its options, and nothing here imports what computes: PyTorch and
transformers take seconds, which `--help`, `list`, `store ls` and the like need not wait for.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import register_type

from .. import __version__
from ..device import device_named
from ..errors import GradmemError
from ..training.recipe import Recipe, recipe_names, recipe_values
from ..visible import visible
from . import evaluation as evaluation_commands
from . import memory as memory_commands
from . import serving as serving_commands
from . import training as training_commands
from .console import use_utf8
from .demo import demo

set_parsing_settings(docstring_parse_attribute_docstrings=True)
register_type(evaluation_commands.Ints, lambda numbers: ",".join(map(str, numbers)), evaluation_commands.Ints.parse)
register_type(datetime, datetime.isoformat, datetime.fromisoformat)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eval": evaluation_commands.measure,
    "sweep": evaluation_commands.sweep,
    "compare": evaluation_commands.compare,
    "calibrate": evaluation_commands.calibrate,
    "write": memory_commands.write,
    "ask": memory_commands.ask,
    "restore": memory_commands.restore,
    "inspect": memory_commands.inspect,
    "serve": serving_commands.serve,
    "demo": demo,
    "list": memory_commands.show_list,
}
CHECKPOINTS_HELP = "names of packaged checkpoints, directories, or hub names"
SYSTEMS_HELP = "recipes, each trained in OUTPUT/NAME where that is not done yet, directories of runs, and checkpoints"
QUERIES_HELP = "queries; without any, one a line from standard input, answered as JSON lines"
PROCESSES_HELP = "data-parallel: each on an accelerator of its own, else on the CPU with one thread each"
KEYS_HELP = "API keys of `gradmem serve` (GRADMEM_KEYS: the file of their hashes)."
STORE_HELP = "Memories that are kept, under names and tags (GRADMEM_STORE: file or PostgreSQL URL)."
GROUPS = {
    "store": ("gradmem.cli.store:COMMANDS", STORE_HELP),
    "keys": ("gradmem.cli.serving:KEYS", KEYS_HELP),
}
POSITIONAL: dict[str, dict[str, dict[str, Any]]] = {
    "ask": {
        "memory": {"type": Path, "help": "memory file, or id or name in the store"},
        "queries": {"nargs": "*", "help": QUERIES_HELP},
    },
    "serve": {"checkpoints": {"nargs": "*", "help": "checkpoints to serve; default: those in the package"}},
    "sweep": {"checkpoints": {"nargs": "+", "help": CHECKPOINTS_HELP}},
    "compare": {"systems": {"nargs": "+", "help": SYSTEMS_HELP}},
    "store rm": {"refs": {"nargs": "*", "help": "ids or names"}},
    "store import": {"files": {"nargs": "+", "type": Path, "help": "memory files"}},
    "store rename": {
        "ref": {"help": "id or name"},
        "name": {"nargs": "?", "help": "new name; without one the memory has none"},
    },
}
"""Arguments of commands whose line ends in any number of them, or in one that may be left out: from a signature
jsonargparse makes arguments of one value each. Everything else, flags too, comes from the signatures."""
SHORT = {"-o": "--output"}
INNER = {"eval": "task", "calibrate": "task", "write": "options"}
"""Commands that take any option of a task or a method, and their parameter for these."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Returns
    -------
    int
        Exit code: 0, 2 after one line that says what was wrong, or 130 after an interruption.
    """
    if arguments is None:
        use_utf8()
        warnings.showwarning = _note
        arguments = sys.argv[1:]
    for number, argument in enumerate(arguments, 1):
        if not _is_text(argument):
            return _refuse(f"argument {number} is not UTF-8 text; a file of such a name can be given another, or piped")
    arguments = [_long(argument) for argument in arguments]
    if arguments and arguments[0] in INNER:
        arguments = [_inner_option(argument, arguments[0]) for argument in arguments]
    try:
        _run(arguments)
    except GradmemError as error:
        return _refuse(str(error))
    except ArgumentError as error:
        return _refuse(f"{error} (see gradmem {' '.join(arguments[:1])} --help)")
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            print(f"gradmem: interrupted{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left (as `head` does): nothing more to say, and no traceback at exit either.
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
    """Show a warning of ours as one line, and others as Python does."""
    ours = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1])
    shown = f"gradmem: note: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(shown)


def _is_text(argument: str) -> bool:
    """Whether an argument was UTF-8: Python passes other bytes on as lone surrogates, which nothing can write."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    given, recipe = next((one for one in arguments if not one.startswith("-")), None), _given_recipe(arguments)
    makers: dict[str, tuple[Callable[[], ArgumentParser], str]] = {
        "train": (lambda: _train_parser(recipe), "train a recipe"),
        "plan": (lambda: _recipe_parser(training_commands.plan, recipe), _summary(training_commands.plan)),
        **{name: (partial(_function_parser, name, one), _summary(one)) for name, one in FUNCTIONS.items()},
        **{name: (partial(ArgumentParser, description=about), about) for name, (_, about) in GROUPS.items()},
    }
    for name, (make, about) in makers.items():
        made = make() if name == given else ArgumentParser()
        subcommands.add_subcommand(name, made, help=about)
        if name == given and name in GROUPS:
            _add_members(made, name)
    parsed = parser.parse_args(arguments)
    chosen = parsed[parsed.subcommand]
    if parsed.subcommand == "train":
        _train(parser.instantiate(parsed)["train"], arguments)
    elif parsed.subcommand == "plan":
        options = parser.instantiate(parsed)["plan"]
        training_commands.plan(_recipe(options), options.json)
    elif parsed.subcommand in GROUPS:
        options = chosen[chosen.subcommand]
        _members(parsed.subcommand)[chosen.subcommand](**(options.as_dict() if options else {}))
    else:
        FUNCTIONS[parsed.subcommand](**chosen.as_dict())


def _members(group: str) -> dict[str, Callable[..., Any]]:
    module, name = GROUPS[group][0].split(":")
    found: dict[str, Callable[..., Any]] = getattr(import_module(module), name)
    return found


def _add_members(parser: ArgumentParser, group: str) -> None:
    members = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, function in _members(group).items():
        members.add_subcommand(name, _function_parser(f"{group} {name}", function), help=_summary(function))


def _function_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Options of a command: from the signature of its function, where booleans are flags, and from `POSITIONAL`."""
    parser = ArgumentParser(description=_described(function))
    by_hand = POSITIONAL.get(command, {})
    for name, settings in by_hand.items():
        parser.add_argument(name, **settings)
    flags = {name for name, one in inspect.signature(function).parameters.items() if one.annotation == "bool"}
    texts = {one.arg_name: one.description for one in docstring_parser.parse(function.__doc__ or "").params}
    for name in sorted(flags):
        parser.add_argument(f"--{name}", action="store_true", help=texts[name])
    parser.add_function_arguments(function, as_positional=True, skip={*by_hand, *flags}, fail_untyped=True)
    return parser


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _described(function: Callable[..., Any]) -> str:
    """The docstring of a command without its parameters."""
    text = inspect.cleandoc(function.__doc__ or "").partition("\nParameters\n")[0]
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _given_recipe(arguments: list[str]) -> str | None:
    given = arguments[1:2] if arguments[:1] in (["train"], ["plan"]) else []
    return given[0] if given and not given[0].startswith("-") else None


def _train_parser(recipe: str | None) -> ArgumentParser:
    parser = _recipe_parser(training_commands.train, recipe)
    parser.add_argument("--output", type=Path | None, default=None, help="directory of the run (default: runs/RECIPE)")
    parser.add_argument("--processes", type=int, default=1, help=PROCESSES_HELP)
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
        _launch(options.processes, options.device, arguments)
        return
    output = options.output or Path("runs") / Path(options.recipe).stem
    training_commands.train(_recipe(options), output, options.resume)


def _recipe(options: Namespace) -> Recipe:
    return Recipe(**{field.name: options[field.name] for field in dataclasses.fields(Recipe)})


def _launch(processes: int, device: str, arguments: list[str]) -> None:
    """Run the same command in several processes, each on an accelerator of its own where there are as many.

    On a CPU two with one thread each beat one with two threads.
    """
    import torch
    import torch.distributed.run as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    found = device_named(device).type
    if found != "cpu" and (count := torch.accelerator.device_count()) < processes:
        short = f"{processes} processes and {count} {found} device{'s' if count > 1 else ''}"
        if device != "auto":
            raise GradmemError(f"{short}: give at most --processes {count}, or --device cpu")
        print(f"{short}: training on the CPU", file=sys.stderr)
        found = "cpu"
    if found == "cpu":
        arguments = [*arguments, "--device", "cpu"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns once that it need not look for unused parameters
    try:
        launcher.main(["--standalone", f"--nproc-per-node={processes}", "-m", "gradmem", *arguments])
    except SignalException as signalled:
        raise KeyboardInterrupt("each process was told to stop, and said what it saved") from signalled
    except ChildFailedError as error:
        raise GradmemError(f"one of {processes} training processes failed: its own message is above") from error


if __name__ == "__main__":
    sys.exit(main())
