"""What of Accelerate's configuration training refuses; tests/system/test_sharding.py trains with the packaged one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradmem import GradmemError
from gradmem.training.trainer import Trainer
from recipes import recipe

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (FSDP2, "shards over several accelerators only"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "set `fsdp_version: 2`"),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, "set `fsdp_auto_wrap_policy: NO_WRAP`"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "take FSDP2"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(
    environment: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GradmemError, match=told):
        Trainer(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
