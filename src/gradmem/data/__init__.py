"""Data sets: tokenized once, cached, read without loading them whole."""

from .samples import Query, Sample, Samples, collate, places
from .store import cached, digest_files

__all__ = ["Query", "Sample", "Samples", "cached", "collate", "digest_files", "places"]
