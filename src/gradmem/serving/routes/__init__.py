"""The routes of the HTTP API, one file for each part of it."""

from . import checkpoints, memories, openai

ROUTERS = (memories.router, checkpoints.router, openai.router)
"""Routers that the application includes, in the order of its documentation."""
