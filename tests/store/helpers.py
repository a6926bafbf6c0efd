"""What several tests of the store need."""

from __future__ import annotations

from gradmem.store import Store

TEXT = "a7:Qz\nk2:9f"


def names(entries) -> list[str | None]:
    return [entry.name for entry in entries]


def state(store: Store) -> dict:
    """All that a store says."""
    return {entry.id: (entry, tuple(store.versions(entry.id))) for entry in store.list()}
