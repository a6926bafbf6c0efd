"""Nothing waits for PyTorch or transformers that does not compute; seconds are in `benchmarks/startup.py`."""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

import gradmem
from gradmem import MemoryModel
from gradmem.lazy import attach
from gradmem.store import Store

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "fastapi", "matplotlib", "accelerate"}
LISTED = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
COMMANDS_RUN = """
import sys
from gradmem.cli.main import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        pass
"""
RUN = COMMANDS_RUN + LISTED
TRANSFORMERS = """
import os
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
"""
GENERATED = """
shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)
"""
# Forked from what both import, which takes most of the time.
BESIDE = (
    TRANSFORMERS
    + "if forked := os.fork():\n    os.waitpid(forked, 0)"
    + indent(GENERATED, "    ")
    + "else:"
    + indent(COMMANDS_RUN, "    ")
    + LISTED
)


def listed(code: str, *arguments: str) -> list[set[str]]:
    """Modules that a fresh process and what it forks have imported at the end, those of what ends first first."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in done.stderr.splitlines() if line.startswith('["')]


def imported(code: str, *arguments: str) -> set[str]:
    """Modules that a fresh process has imported at the end."""
    (found,) = listed(code, *arguments)
    return found


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.fixture
def kept(tiny: MemoryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A store with a memory, a file of keys, and the memory's file."""
    monkeypatch.setenv("GRADMEM_KEYS", str(tmp_path / "keys.json"))
    tiny.save_pretrained(tmp_path / "checkpoint")
    written = gradmem.load(tmp_path / "checkpoint").write("a7:Qz")
    with Store() as store:
        store.put(written, name="notes", tags="work")
    return written.save(tmp_path / "m.safetensors")


COMMANDS = ["train", "train kv-32", "plan", "eval", "sweep", "compare", "calibrate", "board", "write", "ask", "restore"]
OTHERS = ["inspect", "write-corpus", "serve", "mcp", "demo", "list", "keys", "keys add"]
LIGHT = ["list", "--help", "--version", "remember", "keys add me", "keys ls", "keys rm me"]
IN_STORE = [
    "ls",
    "ls --json --tags work",
    "show notes",
    "show none",
    "tag notes b",
    "pin notes",
    "rm notes",
    "append -h",
]


def test_light_commands(kept: Path) -> None:
    """All in one process: none of them imports anything large."""
    helps = [f"{command} --help" for command in COMMANDS + OTHERS]
    assert not roots(imported(RUN, *LIGHT, *helps)) & {*HEAVY, "sqlalchemy"}


def test_the_store_without_models(kept: Path) -> None:
    assert not roots(imported(RUN, *[f"store {line}" for line in IN_STORE])) & HEAVY


def test_inspect_needs_no_model(kept: Path) -> None:
    assert "transformers" not in roots(imported(RUN, f"inspect {kept}"))


def test_ask_imports_little_but_what_transformers_itself_does(kept: Path) -> None:
    """Of packages that answer nothing: the command line's own, small ones."""
    ours, theirs = listed(BESIDE, f"ask {kept} a7")
    assert "gradmem.generation" in ours
    more = roots(ours) - roots(theirs) - set(sys.stdlib_module_names)
    small = {"gradmem", "rich", "jsonargparse", "docstring_parser", "typeshed_client", "platformdirs", "pygments"}
    small |= {"attr", "attrs"}  # rich imports these where they are installed
    assert not {name for name in more if not name.startswith("_")} - small
    parts = (
        "torch.distributed",
        "torch._dynamo",
        "torch._inductor",
        "transformers.generation",
        "transformers.quantizers",
    )
    needed = {"transformers.generation.streamers"}  # one class, which streams of several batches derive from
    assert not {name for name in ours - theirs - needed if name.startswith(parts)}


def test_an_mcp_server_starts_without_models() -> None:
    """A client waits for its start."""
    pytest.importorskip("mcp")
    found = roots(imported("import gradmem.agents.mcp_server" + LISTED))
    assert not found & (HEAVY - {"fastapi"})


def test_import_is_lazy() -> None:
    code = "import gradmem\nassert gradmem.GradmemError and gradmem.checkpoint_names()" + LISTED
    assert not roots(imported(code)) & HEAVY


def test_public_names() -> None:
    found = {name: getattr(gradmem, name) for name in gradmem.__all__}
    assert found["load"].__module__ == "gradmem.model.loading"
    assert found["Memory"] is gradmem.memory.Memory
    assert set(gradmem.__all__) | {"open"} <= set(dir(gradmem))
    assert gradmem.inner.descend  # submodules are there as if they had been imported
    with pytest.raises(AttributeError, match="no attribute 'remember'"):
        _ = gradmem.remember


def test_importing_everything_hides_no_builtin() -> None:
    names: dict[str, object] = {}
    exec("from gradmem import *", names)
    assert "load" in names
    assert not [name for name in names if hasattr(builtins, name) and not name.startswith("__")]
    assert gradmem.open is not builtins.open


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_as_before(enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is imported at first use is imported without collecting; then it is as it was."""
    name = f"lazy_{enabled}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "module.py").write_text("import gc\ncollecting = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert attach(name, {"collecting": "module"})("collecting") is False
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
