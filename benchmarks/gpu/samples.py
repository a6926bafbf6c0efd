"""Tokenized samples of the qa task in one small file, to train where the texts are not.

    python -m benchmarks.gpu.samples --data DIR --model MODEL --out DIR

writes OUT/samples.xz, the samples of training (every entry of the recipe's mix) and validation, and OUT/dev.jsonl, the
dev questions on paragraphs of up to 100 words.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from gradmem.data import Samples
from gradmem.model.build import build_task
from gradmem.tasks.qa import QA
from gradmem.training.recipe import Recipe, load_recipe

MOST = 12_000
"""Contexts of an entry that travel: more than a short run draws."""
ENDS = {"context_end": np.uint16, "query_end": np.uint16, "queries_end": np.uint16}
WORDS = 100


def narrow(samples: Samples) -> dict[str, np.ndarray]:
    """Arrays of samples in small types: lengths in place of ends."""
    arrays = {name: np.asarray(array) for name, array in samples.arrays.items()}
    small = {name: arrays[name].astype(np.uint16) for name in ("context", "query", "target")}
    return small | {name: np.diff(arrays[name], prepend=0).astype(kind) for name, kind in ENDS.items()}


def widen(small: dict[str, np.ndarray], references: list[list[str]]) -> Samples:
    """The samples again."""
    arrays = {name: small[name].astype(np.int32) for name in ("context", "query", "target")}
    arrays |= {name: np.cumsum(small[name], dtype=np.int64) for name in ENDS}
    return Samples(arrays, references, [])


def some(samples: Samples, most: int) -> Samples:
    """At most so many of them, from everywhere."""
    if len(samples) <= most:
        return samples
    chosen = np.random.default_rng(0).choice(len(samples), most, replace=False)
    return Samples.build(samples[int(i)] for i in np.sort(chosen))


def tasks_of(recipe: Recipe, model: str, data: Path) -> list[QA]:
    """The task of each stage."""
    tasks = []
    for stage in recipe.stages:
        task = build_task({**recipe.task, "tokenizer": model, "data": str(data), **stage.tasks[0]})
        assert isinstance(task, QA)
        tasks.append(task)
    return tasks


def save_samples(tasks: list[QA], file: Path) -> None:
    """Write the training samples of all stages, and the validation samples of the last one."""
    arrays: dict[str, np.ndarray] = {}
    sets: list[list[Any]] = []
    for task in tasks:
        for pattern, part in zip(task.mix, task.parts, strict=True):
            if [task.longest, pattern] not in sets:
                arrays |= {f"{len(sets)}.{name}": array for name, array in narrow(some(part, MOST)).items()}
                sets.append([task.longest, pattern])
    valid = tasks[-1].samples("valid")
    arrays |= {f"valid.{name}": array for name, array in narrow(valid).items()}
    about = json.dumps({"sets": sets, "references": valid.references})
    arrays["about"] = np.frombuffer(about.encode(), np.uint8)
    file.write_bytes(lzma.compress(save(arrays), preset=6))


def load_samples(tasks: list[QA], file: Path) -> None:
    """Give the tasks the samples of a file in place of their texts."""
    arrays = load(lzma.decompress(file.read_bytes()))
    about: dict[str, Any] = json.loads(arrays.pop("about").tobytes())
    small: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        owner, name = key.split(".")
        small.setdefault(owner, {})[name] = array
    valid = widen(small.pop("valid"), about["references"])
    whole = {tuple(key): widen(small[str(number)], []) for number, key in enumerate(about["sets"])}
    for task in tasks:
        task.parts = [whole[task.longest, pattern] for pattern in task.mix]
        task._loaded["valid"] = valid


def main() -> None:
    """Tokenize and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="english-pooled")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tasks = tasks_of(load_recipe(given.recipe), given.model, given.data)
    given.out.mkdir(parents=True, exist_ok=True)
    save_samples(tasks, given.out / "samples.xz")
    for pattern, part in zip(tasks[-1].mix, tasks[-1].parts, strict=True):
        print(pattern, len(part), *part.notes, sep="; ")
    lines = (given.data / "squad_subset/dev.jsonl").read_text(encoding="utf-8").splitlines()
    short = [line for line in lines if len(json.loads(line)["context"].split()) <= WORDS]
    (given.out / "dev.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    print(f"{len(short)} dev questions;", (given.out / "samples.xz").stat().st_size, "bytes of samples")


if __name__ == "__main__":
    main()
