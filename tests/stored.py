"""Memories to keep, made without a model."""

from __future__ import annotations

import torch

from gradmem import Memory, Receipt

LOST = 5.0


def made(seed: int, lost: tuple[int, ...] = (), tokens: int = 6, checkpoint: str = "c", rows: int = 1) -> Memory:
    """Make a memory of 4 x 8 random numbers whose receipt says that the tokens `lost` are."""
    generator = torch.Generator().manual_seed(seed)
    receipt = Receipt(
        method="gradmem",
        model=f"model-{checkpoint}",
        backbone="b" * 64,
        checkpoint=checkpoint * 64,
        tokenizer="t" * 64,
        context_sha256=f"{seed:064x}",
        context_tokens=tokens,
        steps=2,
        inner_lr=[0.5],
        losses=[3.0, 2.0, 1.0 + seed],
        token_losses=[LOST if position in lost else 0.25 for position in range(tokens)],
    )
    return Memory({"memory": torch.randn(rows, 4, 8, generator=generator)}, [receipt] * rows)


def large(seed: int, checkpoint: str = "c") -> Memory:
    """Make a memory that is too large for a row, if the store has another place for it."""
    memory = made(seed, checkpoint=checkpoint)
    return Memory({"memory": memory.tensors["memory"].repeat(1, 520, 1)}, memory.receipts)
