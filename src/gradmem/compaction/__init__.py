"""Compaction of a text's key-value cache into fewer entries: writers that `compact` runs one after the other."""
