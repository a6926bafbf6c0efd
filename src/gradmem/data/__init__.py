"""Data sets: tokenized once, cached, read without loading them whole."""

from .cache import cached, digest_files
from .samples import Query, Sample, Samples, collate, split_indices

__all__ = ["Query", "Sample", "Samples", "cached", "collate", "digest_files", "split_indices"]
