"""The routes of the HTTP API, one file for each part of it."""

from . import chat, checkpoints, memories, models, responses

ROUTERS = (memories.router, checkpoints.router, models.router, chat.router, responses.router)
"""Routers that the application includes, in the order of its documentation."""
