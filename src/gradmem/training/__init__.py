"""Meta-training: recipes, one step of it, and the loop."""

from .recipe import Recipe, Stage

__all__ = ["Recipe", "Stage"]
