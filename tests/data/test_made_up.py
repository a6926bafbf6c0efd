"""Reports that are made up, and their questions."""

from __future__ import annotations

import pytest

from gradmem import GradmemError
from gradmem.data.made_up import made_up_texts


@pytest.mark.parametrize(("words", "questions"), [(100, 4), (300, 10), (3000, 100)])
def test_every_question_is_answered_by_a_sentence_about_what_it_names(words: int, questions: int) -> None:
    for text, asked in made_up_texts(3, words):
        assert 0.8 * words <= len(text.split()) <= words
        assert len(asked) >= questions
        assert len({question for question, _ in asked}) == len(asked)
        sentences = text.replace("\n\n", " ").split(". ")
        for question, answers in asked:
            names = [word for word in question.rstrip("?").split()[1:] if word[0].isupper()]
            assert any(answers[0] in one and all(name in one for name in names) for one in sentences), question


def test_each_seed_makes_other_texts() -> None:
    assert made_up_texts(4, 100, seed=1) == made_up_texts(4, 100, seed=1)
    assert made_up_texts(2, 100, seed=1) == made_up_texts(4, 100, seed=1)[:2]
    texts = [text for seed in range(3) for text, _ in made_up_texts(4, 100, seed)]
    assert len(set(texts)) == 12


@pytest.mark.parametrize(
    ("count", "words", "message"), [(0, 100, "contexts"), (1, 20, "from 60 to"), (1, 10**6, "3000")]
)
def test_sizes_that_cannot_be_made_are_refused(count: int, words: int, message: str) -> None:
    with pytest.raises(GradmemError, match=message):
        made_up_texts(count, words)
