"""Data sets: tokenized once, cached, and read without loading them into memory."""

from .cache import cached, digest_files
from .samples import Query, Sample, Samples, collate, split_indices

__all__ = ["Query", "Sample", "Samples", "cached", "collate", "digest_files", "split_indices"]
