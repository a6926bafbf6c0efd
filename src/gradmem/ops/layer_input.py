"""The input of an inner layer of a model: take it from a pass, or put other states in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Reached(Exception):
    """Ends a pass at the layer whose input is wanted."""


def layer_input(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Run a model up to a layer.

    Parameters
    ----------
    layer : nn.Module
        A decoder layer, which takes hidden states as its first argument.
    run : callable
        Runs the model.

    Returns
    -------
    Tensor, shape (batch, length, d)
        The hidden states that the layer would have been given.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(args[0] if args else options["hidden_states"])
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


@contextmanager
def replaced_input(layer: nn.Module, states: Tensor) -> Iterator[None]:
    """Give a layer these hidden states, whatever the layers before it compute."""

    def replace(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        return ((states, *args[1:]), options) if args else (args, options | {"hidden_states": states})

    hook = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
