"""Meta-training: recipes, the training loop, and what it is made of."""

from .recipe import Recipe, Stage

__all__ = ["Recipe", "Stage"]
