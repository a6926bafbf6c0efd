"""Memory methods, one file each; the file's name is the method's name."""

from .base import Method, Written
from .gradmem import GradMem
from .rmt import RMT

__all__ = ["RMT", "GradMem", "Method", "Written"]
