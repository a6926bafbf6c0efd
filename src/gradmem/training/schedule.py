"""When a stage ends, and the scale of its learning rates until then."""

from __future__ import annotations

from .recipe import Recipe, Stage
from .state import RunState

WINDOW = 10
"""Steps over which exact match is averaged."""


def finished(stage: Stage, state: RunState) -> bool:
    """Whether the stage is over; also starts its decay when that is due."""
    mean = sum(state.recent) / WINDOW if len(state.recent) == WINDOW else 0.0
    reached = stage.until_exact_match is not None and mean >= stage.until_exact_match
    if state.decay_from is None and (reached or state.stage_step >= stage.max_steps - stage.decay_steps):
        state.decay_from = state.stage_step
    return state.decay_from is not None and state.stage_step >= state.decay_from + stage.decay_steps


def time_is_over(recipe: Recipe, state: RunState) -> bool:
    """Whether the run has used up its `max_minutes`."""
    return recipe.max_minutes is not None and state.seconds >= 60 * recipe.max_minutes


def validation_is_due(recipe: Recipe, before: float, now: float) -> bool:
    """Whether another `valid_minutes` of a run ended between two times, in seconds of the run."""
    if recipe.valid_minutes is None:
        return False
    return before // (60 * recipe.valid_minutes) < now // (60 * recipe.valid_minutes)


def lr_scale(recipe: Recipe, stage: Stage, state: RunState) -> float:
    """Factor on all learning rates at this step: warm-up, decay, and the cooldown before `max_minutes` are over."""
    scale = stage.lr_scale * min(1.0, (state.stage_step + 1) / max(stage.warmup_steps, 1))
    if state.decay_from is not None:
        scale *= 1 - (state.stage_step - state.decay_from) / stage.decay_steps
    if recipe.max_minutes is not None:
        left = 1 - state.seconds / (60 * recipe.max_minutes)
        scale *= min(1.0, max(left, 0.0) / recipe.cooldown)
    return scale
