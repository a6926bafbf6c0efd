"""What a recipe may import: what is installed or given explicitly, and never what happens to lie in the directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradmem
from gradmem import GradmemError, methods
from gradmem.methods import RMT, Method
from gradmem.plugins import find, names
from gradmem.training.recipe import load_recipe, recipe_groups, recipe_names, recipe_path

MODULE = """
from pathlib import Path
from gradmem.methods.mean_pool import MeanPool
Path(__file__).with_name("ran").touch()
class Mine(MeanPool):
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module in it, searched by Python as `python -m` and an interactive session do."""
    (tmp_path / "lying").mkdir()
    (tmp_path / "lying" / "here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend("")
    yield tmp_path
    for name in ("lying.here", "lying"):
        sys.modules.pop(name, None)


def sought(**how: bool) -> type:
    return find(Method, methods.__name__, "method", "lying.here", **how)


@pytest.mark.parametrize("searched", ["", ".", "whole"])
def test_a_module_of_the_current_directory_is_not_run(
    here: Path, searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path[0] = str(here) if searched == "whole" else searched
    path = sys.path[:]
    for given in ("", os.pathsep, f"{here / 'other'}{os.pathsep}"):  # an empty entry stands for the current directory
        monkeypatch.setenv("PYTHONPATH", given)
        with pytest.raises(GradmemError, match=r"cannot import the method 'lying\.here'.*or name its directory"):
            sought()
    assert not (here / "lying" / "ran").exists()
    assert sys.path == path


@pytest.mark.parametrize("how", ["PYTHONPATH", "installed", "imported"])
def test_a_module_that_was_given_is_taken(here: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", f"/nowhere{os.pathsep}.")
    elif how == "installed":
        monkeypatch.syspath_prepend(str(here))
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")
    else:
        __import__("lying.here")
    assert sought().__name__ == "Mine"
    assert sought(trusted=False).__name__ == "Mine"  # imported by now


def test_a_name_in_a_file_imports_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    with pytest.raises(GradmemError, match="import that module first"):
        sought(trusted=False)
    assert not (here / "lying" / "ran").exists()


NO_NAMES = [None, 5, ["a.b"], {}, "", ".", "..", ".evil", "a..b", "os.", "a.b c", "../evil", "a.\x1b[31m"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("trusted", [True, False])
def test_what_is_no_name_is_refused(name: object, trusted: bool) -> None:
    with pytest.raises(GradmemError, match="method"):
        find(Method, methods.__name__, "method", name, trusted=trusted)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["raise RuntimeError('mine')", "def", "import lying.none"])
def test_a_module_that_fails_is_one_line(here: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))
    (here / "lying" / "here.py").write_text(text)
    with pytest.raises(GradmemError, match=r"cannot import the method 'lying\.here'"):
        sought()


def test_the_command_imports_nothing_of_the_current_directory(here: Path) -> None:
    text = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    for name in ("torch", "rich", "yaml", "jsonargparse"):
        (here / f"{name}.py").write_text(text)
    given = {**os.environ, "PYTHONPATH": str(Path(gradmem.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "gradmem", "list"], capture_output=True, text=True, env=given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kv-32" in done.stdout
    assert not (here / "ran").exists()


# --- Plug-ins of installed packages --------------------------------------------------------------------------

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "memory-extras"
version = "1.0"

[project.entry-points."gradmem.methods"]
mean_twice = "memory_extras.mean_twice"

[project.entry-points."gradmem.tasks"]
kv_short = "memory_extras.kv_short"

[project.entry-points."gradmem.recipes"]
extras = "memory_extras.recipes"
"""
PACKAGE = {
    "__init__.py": "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n",
    "mean_twice.py": "from gradmem.methods.mean_pool import MeanPool\nclass MeanTwice(MeanPool):\n    pass\n",
    "kv_short.py": "from gradmem.tasks.kv import KV\nclass Short(KV):\n    pass\n",
    "recipes/kv-twice.yaml": "extends: kv-mean-pool\nmethod: {name: mean_twice}\ntask: {name: kv_short, pairs: 3}\n",
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that a small package was built and installed into."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    for name, text in PACKAGE.items():
        file = source / "memory_extras" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    return site


@pytest.fixture
def extras(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package where Python finds it, imported by no test before."""
    (site / "memory_extras" / "imported").unlink(missing_ok=True)
    monkeypatch.syspath_prepend(str(site))
    yield site / "memory_extras"
    forget("memory_extras")


def forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def offer(site: Path, package: str, group: str, **entries: str) -> None:
    """Put what installing a package with these entry points leaves there."""
    about = site / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[gradmem.{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))


def gradmem_command(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(Path(gradmem.__file__).parents[1])])
    command = [sys.executable, "-m", "gradmem", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def test_commands_show_an_installed_package(extras: Path) -> None:
    done = gradmem_command("list", site=extras.parent)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["recipes (memory-extras)"] == "kv-twice"
    assert {"gradmem", "mean_twice"} <= set(lines["methods"].split(", "))
    assert {"kv", "kv_short"} <= set(lines["tasks"].split(", "))
    shown = gradmem_command("train", "--help", site=extras.parent).stdout
    assert all(name in shown for name in ("kv-twice", "mean_twice", "kv_short"))
    assert not (extras / "imported").exists()


def test_an_installed_recipe_builds_its_method_and_its_task(extras: Path) -> None:
    recipe = load_recipe("kv-twice")
    assert recipe.stages == load_recipe("kv-mean-pool").stages
    model = gradmem.MemoryModel.from_spec(recipe.task, recipe.backbone, recipe.method)
    assert (type(model.method).__name__, type(model.task).__name__) == ("MeanTwice", "Short")


def test_a_checkpoint_may_name_an_installed_method(extras: Path, tmp_path: Path) -> None:
    recipe = load_recipe("kv-twice")
    made = gradmem.MemoryModel.from_spec(recipe.task, recipe.backbone | {"num_hidden_layers": 1}, recipe.method)
    made.save_pretrained(tmp_path / "checkpoint")
    forget("memory_extras")  # as in another process
    assert type(gradmem.load(tmp_path / "checkpoint").method).__name__ == "MeanTwice"


def test_without_the_package_its_names_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(GradmemError, match=r"unknown method 'mean_twice': .*known: armt"):
        find(Method, methods.__name__, "method", "mean_twice")


BROKEN = {
    "raise RuntimeError('mine')": "cannot import the method 'broken' of the package others: mine",
    "import nowhere_at_all": "cannot import the method 'broken' of the package others: No module named",
    "def": "cannot import the method 'broken' of the package others: ",
    "x = 1": "others_broken must define exactly one subclass of Method, and it defines 0",
    "from gradmem.methods import RMT\nclass A(RMT): pass\nclass B(RMT): pass": "exactly one .* it defines 2",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_plugin_is_one_line_and_breaks_nothing_else(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, "others", "methods", broken="others_broken")
    (tmp_path / "others_broken.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken" in names(methods.__name__)
    with pytest.raises(GradmemError, match=BROKEN[text]):
        find(Method, methods.__name__, "method", "broken")
    assert find(Method, methods.__name__, "method", "rmt") is RMT
    forget("others_broken")


def test_gradmem_keeps_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, "others", "methods", rmt="nowhere", other="nowhere")
    offer(tmp_path, "more", "recipes", ours="more_recipes")
    (tmp_path / "more_recipes").mkdir()
    for name in ("kv-32", "kv-33"):
        (tmp_path / "more_recipes" / f"{name}.yaml").write_text("extends: kv-16\n")
    packaged = recipe_path("kv-32")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="'rmt' of the package others is ignored"):
        assert find(Method, methods.__name__, "method", "rmt") is RMT
    with pytest.warns(UserWarning, match="the recipe 'kv-32' of the package more is ignored"):
        assert recipe_groups()["more"] == ["kv-33"]
    with pytest.warns(UserWarning, match="kv-32"):
        assert recipe_path("kv-32") == packaged
    done = gradmem_command("list", site=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "gradmem: note: the recipe 'kv-32' of the package more is ignored: the name is taken",
        "gradmem: note: 'rmt' of the package others is ignored: gradmem has its own (gradmem.methods)",
    ]


def test_a_name_of_two_packages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one", "two"):
        offer(tmp_path, package, "methods", both="nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(GradmemError, match="several packages have a method 'both': uninstall all but one of"):
        find(Method, methods.__name__, "method", "both")


def test_an_entry_point_that_names_nothing_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(tmp_path, "others", "methods", odd="others:Method")
    offer(tmp_path, "more", "recipes", one="nowhere.recipes", two="..", three="sys", four="json.nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(GradmemError, match="must name a module, not 'others:Method'"):
        find(Method, methods.__name__, "method", "odd")
    with pytest.warns(UserWarning, match="the package more has no directory nowhere.recipes") as told:
        assert "more" not in recipe_groups()
    assert len(told) == 4


def test_entry_points_of_the_current_directory_do_not_count(here: Path) -> None:
    offer(here, "lying-about", "methods", mine="lying.here")
    offer(here, "lying-more", "recipes", mine="lying")
    (here / "lying" / "kv-lying.yaml").write_text("extends: kv-16\n")
    assert "mine" not in names(methods.__name__)
    assert "kv-lying" not in recipe_names()
    with pytest.raises(GradmemError, match="unknown method 'mine'"):
        find(Method, methods.__name__, "method", "mine")
    assert not (here / "lying" / "ran").exists()
