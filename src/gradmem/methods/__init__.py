"""Memory methods, one file each; the file's name is the method's name."""

from .armt import ARMT
from .base import Method, Written
from .cram import Cram
from .full_context import FullContext
from .gradmem import GradMem
from .mamba import Mamba
from .mean_pool import MeanPool
from .rmt import RMT
from .vectors import Vectors

__all__ = ["ARMT", "RMT", "Cram", "FullContext", "GradMem", "Mamba", "MeanPool", "Method", "Vectors", "Written"]
