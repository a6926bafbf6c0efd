"""The WRITE optimisation: what is minimised, by which update, and how gradients pass through it."""

from .meta_gradient import Order, Step, Strategy, descend
from .newton import gauss_newton
from .objective import token_losses

__all__ = ["Order", "Step", "Strategy", "descend", "gauss_newton", "token_losses"]
