"""Memory methods, one file each; the file's name is the method's name."""

from .armt import ARMT
from .base import Method, Written
from .gradmem import GradMem
from .rmt import RMT

__all__ = ["ARMT", "RMT", "GradMem", "Method", "Written"]
