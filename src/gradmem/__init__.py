"""Memory for language models that is written once, by gradient descent, and asked many times.

>>> import gradmem
>>> memory = gradmem.load("kv-32").write("a7:Qz\\nk2:9f\\nzz:aa")
>>> memory.ask("a7")
'Qz'
"""

from typing import TYPE_CHECKING, Any

from .backbone import Backbone
from .batch import Batch, Tokens
from .checkpoints import checkpoint_names, load
from .checkpoints import open_memory as open
from .errors import GradmemError
from .memory import Memory
from .methods import GradMem, Method, Written
from .model import MemoryModel
from .records import Record
from .trust import Answer

if TYPE_CHECKING:
    from .serving.client import Client

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Backbone",
    "Batch",
    "Client",
    "GradMem",
    "GradmemError",
    "Memory",
    "MemoryModel",
    "Method",
    "Record",
    "Tokens",
    "Written",
    "checkpoint_names",
    "load",
    "open",
]


def __getattr__(name: str) -> Any:
    """The client, which with its database types is imported only where it is used."""
    if name == "Client":
        from .serving.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
