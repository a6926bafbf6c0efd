"""How the tokens of an answer are chosen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gradmem import GradmemError
from gradmem.sampling import Sampling, TokenChooser

SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0])


def chosen(chooser: TokenChooser) -> int:
    scores = SCORES.clone()
    chooser.choose(scores)
    token = int(scores.argmax())
    chooser.take(token)
    return token


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    chooser = TokenChooser(Sampling(temperature=2.0, seed=1))
    drawn = Counter(chosen(chooser) for _ in range(4000))
    for token, share in enumerate((SCORES / 2).softmax(0).tolist()):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


def test_the_same_seed_draws_the_same_and_top_p_leaves_tokens_out() -> None:
    def drawn(**options: float) -> list[int]:
        chooser = TokenChooser(Sampling(temperature=2.0, **options))  # type: ignore[arg-type]
        return [chosen(chooser) for _ in range(50)]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn() != drawn()
    assert set(drawn(seed=1, top_p=0.5)) == {0, 1}  # 0.455, 0.276, ...
    assert set(drawn(seed=1, top_p=0.0)) == {0}
    assert not Sampling(temperature=1e-9, top_p=0.5).chooses


def test_penalties_and_biases_are_subtracted_and_added() -> None:
    chooser = TokenChooser(Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.5}))
    for token in (0, 0, 2):
        chooser.take(token)
    scores = SCORES.clone()
    chooser.choose(scores)
    assert scores.tolist() == [2.0 - 0.5 - 0.5, 1.0, 0.0 - 0.5 - 0.25, -1.0 + 1.5]
    with pytest.raises(GradmemError, match="the token 4, and the model has 4 tokens"):
        TokenChooser(Sampling(logit_bias={4: 1.0})).choose(SCORES.clone())
    with pytest.raises(GradmemError, match="not finite"):
        TokenChooser(Sampling(temperature=1.0)).choose(SCORES * torch.nan)


@pytest.mark.parametrize(
    ("stop", "text", "cut", "held"),
    [
        ((), "one two", "one two", 0),
        (("two",), "one two", "one ", 0),
        (("two", "one"), "one two", "", 0),
        (("three",), "one th", "one th", 2),
        (("three", "hre"), "one th", "one th", 2),
        (("abab",), "xaba", "xaba", 3),
        (("abc",), "abx", "abx", 0),
    ],
)
def test_texts_end_an_answer(stop: tuple[str, ...], text: str, cut: str, held: int) -> None:
    sampling = Sampling(stop=stop)
    assert sampling.cut(text) == cut
    assert sampling.held_back(cut) == held


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 1.5}, {"stop": ("",)}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(GradmemError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
