"""`gradmem` in a process of `accelerate launch` that shards over CPUs, which Accelerate by itself does over GPUs only.

With STOP_AT in the environment, it is told to stop in that step, as by Ctrl-C.
"""

import os
import signal
import sys
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from gradmem.cli.main import main
from gradmem.training.trainer import Trainer

build, step = Accelerator.__init__, Trainer._step


def with_fsdp(self: Accelerator, *given: Any, **options: Any) -> None:
    build(self, *given, **options)
    assert self.distributed_type == DistributedType.MULTI_CPU
    self.state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def stopped(self: Trainer, *given: Any) -> dict[str, Any]:
    assert all(isinstance(parameter, DTensor) for parameter in self.step_module.parameters())
    if str(self.state.step) == os.environ.get("STOP_AT"):
        signal.raise_signal(signal.SIGINT)
    return step(self, *given)


if __name__ == "__main__":
    Accelerator.__init__, Trainer._step = with_fsdp, stopped  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
