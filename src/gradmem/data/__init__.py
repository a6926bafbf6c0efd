"""Data sets: tokenized once, cached, and read without loading them into memory."""

from ..files import digest_files
from .cache import cached
from .samples import Query, Sample, Samples, collate, split_indices

__all__ = ["Query", "Sample", "Samples", "cached", "collate", "digest_files", "split_indices"]
