"""What a receipt may hold."""

from __future__ import annotations

from typing import Any

import pytest

from gradmem import Receipt
from stored import made


@pytest.mark.parametrize(
    "key", ["context_tokens", "steps", "losses", "token_losses", "inner_lr", "options", "deep", "many"]
)
def test_numbers_and_structures_of_a_receipt_are_limited(key: str) -> None:
    huge = 10**400
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    change: dict[str, Any] = {
        "context_tokens": huge,
        "steps": -huge,
        "losses": [huge],
        "token_losses": [2**63],
        "inner_lr": [1, huge],
        "options": {"n_mem": huge},
        "deep": {"x": deep},
        "many": {str(number): number for number in range(5000)},
    }
    receipt = vars(made(1).receipts[0]) | {("options" if key in ("deep", "many") else key): change[key]}
    with pytest.raises(ValueError, match="a receipt's"):
        Receipt.read(receipt)
