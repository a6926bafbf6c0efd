"""Command line of the GPU plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import check, speed, train
from .common import ONLY, SEEN, device, machine, part, say


def main() -> None:
    """Run checks, measurements or a training."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("what", choices=["check", "speed", "train"])
    command.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for JSON, CSV and checkpoints")
    command.add_argument("--fixtures", type=Path, default=None, help="parity fixtures (.safetensors)")
    command.add_argument(
        "--checkpoint", choices=sorted(train.PLANS), default="kv-64-k1", help="what `train` goes on from"
    )
    command.add_argument("--minutes", type=float, default=3.0, help="of training")
    command.add_argument("--samples", type=int, default=1000, help="test contexts after training")
    command.add_argument("--only", nargs="*", default=[], help="parts of check or speed to run; all by default")
    command.add_argument("--quick", action="store_true", help="small sizes, to try the plan out on a CPU")
    options = command.parse_args()
    say(f"{device()}: {machine()}")
    out, quick = options.out, options.quick
    ONLY.update(options.only)
    if options.what == "check":
        part("parity", partial(check.parity, options.fixtures), out, 60)
        part("derivatives", check.derivatives, out, 30)
        settings = [("kv-16", 2), ("kv-16", 4), ("kv-16", 16), ("kv-64-k1", 64), ("kv-96", 96)]
        run = partial(check.meta_gradients, settings[:1] if quick else settings)
        part("meta-gradients", run, out, 90)
        part("waits", partial(check.waits, "kv-96"), out, 30)
        part("answers", partial(check.answers, 8 if quick else 200), out, 40)
    elif options.what == "speed":
        _speed(out, quick)
    else:
        samples = 8 if quick else options.samples
        run = partial(train.train, options.checkpoint, options.minutes, out, samples, 4 if quick else None)
        part(f"train-{options.checkpoint}", run, out, 60 * options.minutes + 240)
    if unknown := ONLY - SEEN:
        command.error(f"no part of {options.what} is {', '.join(sorted(unknown))}; there are {', '.join(sorted(SEEN))}")


def _speed(out: Path, quick: bool) -> None:
    eager: speed.Ways = [("recompute", "tf32"), ("unroll", "tf32")]
    one, few, many = (2, 2, 2) if quick else (128, 8, 32)

    def measure(
        name: str, setting: Callable[[], speed.Setting], ways: speed.Ways, most: float, **options: bool
    ) -> None:
        part(f"steps-{name}", partial(speed.steps, setting, ways, **options), out, most)

    packaged = speed.Setting.packaged
    measure("kv-64-k1", partial(packaged, "kv-64-k1", one), eager[:1], 30, profile=True)
    measure("kv-96", partial(packaged, "kv-96", many), [*eager, ("unroll", "fp32")], 40, profile=True)
    measure("text-160", partial(speed.Setting.text, 160, 1, many // 2, 4), eager[:1], 40, profile=True)
    measure("kv-96-naive", partial(speed.Setting.pairs, 96, 5, few), eager, 30, against_naive=True)
    for length in (256, 512):
        setting = partial(speed.Setting.text, length, 2, 512 // length)
        measure(f"text-{length}-naive", setting, eager[:1], 40, against_naive=True)
    part("reading", partial(speed.reading, (1,) if quick else (1, 64, 512)), out, 60)
    if not quick:
        # The very contexts that `train` compiles for, so that a second run on this machine need not.
        measure("kv-96-compiled", partial(packaged, "kv-96", 24), [("compile", "tf32")], 150)


if __name__ == "__main__":
    main()
