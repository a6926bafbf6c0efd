"""`gradmem compare` and what it counts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from gradmem import GradmemError
from gradmem.cli.main import main
from gradmem.experiments.compare import Training, compare
from gradmem.experiments.cost import flops, measure
from gradmem.model import MemoryModel
from gradmem.tasks.kv import KV

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 32}
TASK = {"name": "kv", "pairs": 4}


def model(method: str, backbone: dict = LLAMA, **options: object) -> MemoryModel:
    torch.manual_seed(0)
    built = MemoryModel.from_spec(TASK, backbone, {"name": method, **options})
    built.name = method
    built.method.eval()
    return built


def test_flops_of_a_product() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert flops(lambda: left @ right) == 2 * 3 * 5 * 7


def test_cost_counts_passes_over_the_context() -> None:
    """A write of K steps is K gradients, of about three forward passes each, where the full context takes one pass."""
    task = KV(pairs=8)
    gradmem, full = model("gradmem", n_mem=2), model("full_context")
    one, five = (_with_steps(gradmem, steps, task) for steps in (1, 5))
    once = measure(full.method, task, repeats=1)
    assert five == pytest.approx(5 * one)
    assert 2 < one / once.write_flops < 5
    assert once.queries == 8
    assert once.bytes == full.method.write(task.batch("test", 0, 1).context).memory.nbytes


def _with_steps(system: MemoryModel, steps: int, task: KV) -> float:
    system.method.write_steps = steps
    return measure(system.method, task, repeats=1).write_flops


def test_systems_are_measured_on_the_same_contexts() -> None:
    systems = [(model("rmt", n_mem=2), Training(10, 60.0)), (model("mamba", MAMBA), Training())]
    entries = compare(systems, [2, 4], samples=4, repeats=1)
    assert [(e.result.checkpoint, e.result.task["pairs"]) for e in entries] == [
        ("rmt", 2),
        ("rmt", 4),
        ("mamba", 2),
        ("mamba", 4),
    ]
    assert entries[0].reference is entries[2].reference
    assert entries[0].cost.bytes == 2 * 16 * 4
    row = entries[0].to_dict()
    assert (row["trained_samples"], row["trained_seconds"], row["pairs"]) == (10, 60.0, 2)


def test_training_curve_counts_pairs(tmp_path: Path) -> None:
    """Means of as many rows as a point has: exact match times the pairs of the stage."""
    stages = [{"max_steps": 600, "tasks": [{"pairs": 4}]}, {"max_steps": 300, "tasks": [{"pairs": 8}, {}]}]
    recipe = {"task": TASK | {"pairs": 16}, "backbone": LLAMA, "method": {"name": "rmt"}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [f"{step // 600},{(step % 5) / 4},{step},{60 * step}" for step in range(900)]
    (tmp_path / "log.csv").write_text("\n".join(["stage,exact_match,samples,seconds", *rows]))
    training = Training.of(tmp_path)
    assert (training.samples, training.seconds) == (899, 60 * 899)
    assert training.curve == tuple((start, pytest.approx(2 if start < 600 else 6)) for start in range(0, 900, 5))
    assert Training.of(tmp_path / "none") == Training()


def test_without_any_kv_cache_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(GradmemError, match="KV-cache"):
        compare([(model("mamba", MAMBA), Training())], [2], samples=2)


def test_command_trains_once_and_saves_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = []
    for name, backbone in (("rmt", LLAMA), ("mamba", MAMBA)):
        recipe = {
            "task": TASK,
            "backbone": backbone,
            "method": {"name": name},
            "stages": [{"max_steps": 2, "write_steps": [1], "batch_size": 2}],
            "valid_samples": 2,
        }
        recipes.append(str(tmp_path / f"tiny-{name}.yaml"))
        Path(recipes[-1]).write_text(yaml.safe_dump(recipe))
    options = ["--pairs", "2,4", "--samples", "4", "--output", str(tmp_path / "runs")]
    files = ["--json", str(tmp_path / "c.json"), "--csv", str(tmp_path / "c.csv"), "--figures", str(tmp_path / "f")]
    assert main(["compare", *recipes, *options, *files]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("│")]
    for name in ("tiny-rmt", "tiny-mamba"):  # whole, in both rows of both tables, however narrow the terminal
        assert sum(name in line for line in lines) == 4
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [(row["checkpoint"], row["pairs"]) for row in rows] == [
        (f"tiny-{name}", pairs) for name in ("rmt", "mamba") for pairs in (2, 4)
    ]
    assert all(row["trained_samples"] == 4 for row in rows)
    assert {"exact_match", "unwritten", "swapped", "bytes", "write_seconds", "cheaper_than_rereading_from"} <= set(
        rows[0]
    )
    with (tmp_path / "c.csv").open(newline="") as file:
        assert [row["checkpoint"] for row in csv.DictReader(file)] == [row["checkpoint"] for row in rows]
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        f"{name}.png" for name in ("pairs", "bytes", "flops", "training", "cost")
    }
    # Trained already: the same weights are measured again.
    log = (tmp_path / "runs" / "tiny-rmt" / "log.csv").read_text()
    assert main(["compare", *recipes, *options]) == 0
    assert (tmp_path / "runs" / "tiny-rmt" / "log.csv").read_text() == log
    # Directories of runs say all that recipes say.
    runs = [str(tmp_path / "runs" / f"tiny-{name}") for name in ("rmt", "mamba")]
    assert main(["compare", *runs, *options, "--json", str(tmp_path / "d.json")]) == 0
    of_runs = json.loads((tmp_path / "d.json").read_text())
    kept = ("checkpoint", "pairs", "exact_match", "trained_samples", "trained_seconds")
    assert [[row[key] for key in kept] for row in of_runs] == [[row[key] for key in kept] for row in rows]
