"""When stages end, and their learning rates, without training anything."""

from __future__ import annotations

import pytest

from gradmem.training import Recipe, Stage
from gradmem.training.schedule import WINDOW, finished, lr_scale, time_is_over
from gradmem.training.state import RunState


def scales(stage: Stage, matches: list[float], **changes: object) -> list[float]:
    """The scale of each step, with the exact match of the steps given, until the stage is over."""
    recipe = Recipe(task={"name": "kv"}, backbone={}, method={"name": "gradmem"}, stages=[stage], **changes)
    state, found = RunState(), []
    for match in matches:
        if finished(stage, state) or time_is_over(recipe, state):
            return found
        found.append(lr_scale(recipe, stage, state))
        state.stage_step, state.seconds = state.stage_step + 1, state.seconds + 6
        state.recent = [*state.recent, match][-WINDOW:]
    raise AssertionError("the stage did not end")


def test_rates_rise_and_fall_within_the_steps_of_a_stage() -> None:
    stage = Stage(max_steps=8, write_steps=[1], warmup_steps=2, decay_steps=4, lr_scale=0.5)
    assert scales(stage, [0.0] * 99) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125]


@pytest.mark.parametrize("decay", [0, 2])
def test_exact_match_ends_a_stage_after_its_decay(decay: int) -> None:
    """The mean of ten steps reaches the half with the fifth right one of them."""
    stage = Stage(max_steps=99, write_steps=[1], warmup_steps=1, decay_steps=decay, until_exact_match=0.5)
    assert scales(stage, [0.0] * 10 + [1.0] * 99) == [1.0] * 15 + [1.0, 0.5][:decay]


def test_a_full_window_is_needed() -> None:
    stage = Stage(max_steps=99, write_steps=[1], warmup_steps=1, until_exact_match=0.5)
    assert len(scales(stage, [1.0] * 99)) == WINDOW


def test_rates_cool_down_until_the_time_is_over() -> None:
    """A minute has ten steps; over its last half the rates fall to zero."""
    stage = Stage(max_steps=99, write_steps=[1], warmup_steps=1)
    found = scales(stage, [0.0] * 99, max_minutes=1.0, cooldown=0.5)
    assert found == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])
