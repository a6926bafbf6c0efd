"""Compiled write steps on a machine without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import ROOT


def test_without_a_compiler_it_says_what_to_do() -> None:
    code = (
        "from helpers import ROOT, make_batch, make_gradmem, outer_loss\n"
        "method = make_gradmem('llama', config={'num_hidden_layers': 1})\n"
        "method.strategy = 'compile'\n"
        "outer_loss(method, make_batch())\n"
    )
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert "set `strategy: unroll`" in ran.stderr.splitlines()[-1]
