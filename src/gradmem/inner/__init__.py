"""The inner optimization of WRITE: loss, update rules, and the gradient through the descent."""

from .gauss_newton import gauss_newton
from .meta_gradient import Order, Step, Strategy, descend
from .objective import token_losses

__all__ = ["Order", "Step", "Strategy", "descend", "gauss_newton", "token_losses"]
