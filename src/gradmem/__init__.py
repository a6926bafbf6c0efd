"""Memory for language models that is written once, by gradient descent, and asked many times.

>>> import gradmem
>>> memory = gradmem.load("kv-32").write("a7:Qz\\nk2:9f\\nzz:aa")
>>> memory.ask("a7")
'Qz'
"""

from typing import TYPE_CHECKING

from .errors import GradmemError
from .lazy import attach

if TYPE_CHECKING:
    from .backbone import Backbone
    from .batch import Batch, Tokens
    from .memory import Memory
    from .methods import GradMem, Method, Written
    from .model import Answer, BoundMemory, MemoryModel
    from .model.loading import load
    from .model.loading import open_memory as open  # noqa: F401
    from .model.packaged import checkpoint_names
    from .receipts import Receipt
    from .serving.client import Client

# Without `open`: `from gradmem import *` must not hide Python's own.
__all__ = [
    "Answer",
    "Backbone",
    "Batch",
    "BoundMemory",
    "Client",
    "GradMem",
    "GradmemError",
    "Memory",
    "MemoryModel",
    "Method",
    "Receipt",
    "Tokens",
    "Written",
    "checkpoint_names",
    "load",
]

MODULES = {
    "Answer": "model",
    "Backbone": "backbone",
    "Batch": "batch",
    "BoundMemory": "model",
    "Client": "serving.client",
    "GradMem": "methods",
    "Memory": "memory",
    "MemoryModel": "model",
    "Method": "methods",
    "Receipt": "receipts",
    "Tokens": "batch",
    "Written": "methods",
    "checkpoint_names": "model.packaged",
    "load": "model.loading",
    "open": "model.loading:open_memory",
}
__getattr__ = attach(__name__, MODULES, submodules=True)


def __dir__() -> list[str]:
    return [*globals(), *(name for name in MODULES if name not in globals())]
