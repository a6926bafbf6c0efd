"""The rules of the source tree: what may import what (pyproject.toml), how long a file may be, and who prints."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import gradmem

SOURCE = Path(gradmem.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
BELOW_CLI = [file for file in FILES if file.relative_to(SOURCE).parts[0] != "cli"]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("gradmem", cache_dir=None)


def test_imports_keep_to_the_contracts():
    """The same as in `make lint`."""
    lint = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    run = subprocess.run(lint, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_no_module_is_in_an_import_circle(graph):
    """Imports for types count. The contracts do not see a package that one of its own modules imports."""
    try:
        TopologicalSorter({one: graph.find_modules_directly_imported_by(one) for one in graph.modules}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_and_functions_are_short():
    long = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        if len(lines) > LONGEST_FILE:
            long.append(f"{file}: {len(lines)} lines")
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS))
        long += [f"{file}:{one.lineno}: {one.name}" for one in functions if code_lines(one, lines) > LONGEST_FUNCTION]
    assert FILES
    assert not long


def code_lines(function, lines):
    """Lines of a function but for empty ones and those of its docstring."""
    count = sum(bool(line.strip()) for line in lines[function.lineno - 1 : function.end_lineno])
    if ast.get_docstring(function) is None:
        return count
    text = function.body[0]
    return count - sum(bool(line.strip()) for line in lines[text.lineno - 1 : text.end_lineno])


def test_docstrings_and_empty_lines_are_no_code():
    text = 'def f():\n    """One.\n\n    Two."""\n\n    return 1\n'
    assert code_lines(ast.parse(text).body[0], text.splitlines()) == 2


def test_only_the_command_line_prints():
    printed = []
    for file in BELOW_CLI:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                printed.append(f"{file}:{node.lineno}")
    assert BELOW_CLI
    assert not printed
