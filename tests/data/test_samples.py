"""The order of samples in a split."""

from __future__ import annotations

from gradmem.data import split_indices


def test_the_first_samples_of_a_split_come_from_all_over_it() -> None:
    found = split_indices("test", 0, 1000, 1000, seed=1, shuffled=True).tolist()
    assert sorted(found) == list(range(1000))
    few = sorted(found[:100])
    assert max(b - a for a, b in zip([0, *few], [*few, 1000], strict=True)) < 80
    assert split_indices("test", 5, 3, 1000, seed=2, shuffled=True).tolist() == found[5:8]


def test_orders() -> None:
    assert split_indices("test", 3, 4, 10, 0).tolist() == [3, 4, 5, 6]
    rounds = split_indices("train", 0, 30, 10, 0).reshape(3, 10)
    assert all(sorted(one) == list(range(10)) for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) == 3
    assert split_indices("train", 7, 9, 10, 0).tolist() == rounds.flatten()[7:16].tolist()
    assert split_indices("train", 0, 10, 10, 1).tolist() != rounds[0].tolist()
