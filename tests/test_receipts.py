"""What a receipt may hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rich.console import Console

from gradmem import Receipt
from gradmem.cli.memory_tables import receipt_table, receipts_table
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


def test_receipts_say_how_close_answers_are(capsys: pytest.CaptureFixture[str]) -> None:
    memory = made(1)
    fidelity = {"questions": 4, "tokens": 96, "kl_unwritten": 2.5, "kl_start": 0.4, "kl": 0.125}
    measured = dataclasses.replace(
        memory.receipts[0], fidelity=fidelity | {"agreement_unwritten": 0.5, "agreement": 0.9375}
    )
    Console(width=200).print(receipt_table(measured))
    shown = capsys.readouterr().out
    assert "93.8% of 96 tokens as with the whole text, KL 0.125 nats; without the text 50.0%, 2.500 nats" in shown
    Console(width=200).print(receipts_table([measured, memory.receipts[0]]))
    shown = capsys.readouterr().out
    assert "93.8%" in shown
    assert "0.125" in shown
    for wrong in ({"kl": "much"}, {"kl": None}, [0.125]):
        with pytest.raises(ValueError, match="fidelity"):
            dataclasses.replace(memory.receipts[0], fidelity=wrong)
