"""What methods have in common: the one interface, and bases that several share."""

from .method import Method, Mode, Written, anywhere, last_state

__all__ = ["Method", "Mode", "Written", "anywhere", "last_state"]
