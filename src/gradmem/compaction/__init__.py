"""Memories of any text without training: writers that `compact` runs one after the other, and what `vectors` shares."""
