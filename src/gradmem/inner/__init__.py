"""The WRITE optimisation: what is minimised, by which update, and how gradients pass through it."""

from .gauss_newton import gauss_newton
from .meta_gradient import Order, Step, Strategy, descend
from .objective import token_losses

__all__ = ["Order", "Step", "Strategy", "descend", "gauss_newton", "token_losses"]
