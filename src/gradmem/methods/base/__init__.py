"""The interface of all methods, and base classes that several methods share."""

from .method import Method
from .written import Written, last_state

__all__ = ["Method", "Written", "last_state"]
