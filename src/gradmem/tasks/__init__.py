"""Tasks, one file each; the file's name is the task's name."""

from .base import Task

__all__ = ["Task"]
