"""A device for machines without one: it computes on the CPU, but is not the CPU.

It refuses what a GPU refuses, operations on tensors of two devices, and counts what a GPU waits for: values that the
CPU looks at, shapes that depend on values, and copies.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "standin"
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
"""Operations whose results the CPU waits for."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
"""Those that may take indices from the CPU."""
MAKING = [
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "randperm",
    "linspace",
]
"""Those that make tensors on the device out of nothing; all others come by `Standin.__torch_dispatch__`."""
waits: Counter[str] = Counter()
"""How often the CPU has waited for what, and where."""


class _Module:
    """What PyTorch asks of the module of a device."""

    is_initialized = is_available = staticmethod(lambda: Standin.here)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: Standin.count if Standin.here else 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class Standin(Tensor):
    """A tensor of the device, around one on the CPU."""

    here = False
    """Whether the device is switched on."""
    count = 1
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Standin:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self, **options: Any) -> str:
        return f"Standin({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def storage(self) -> torch.storage.TypedStorage:
        return self.held.storage()  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet, given = function.overloadpacket, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = kwargs.get("device")
    device = None if device is None else torch.device(device).type
    mine = any(isinstance(tensor, Standin) for tensor in given)
    if not mine and device != NAME:
        return function(*args, **kwargs)
    moved = packet in (aten._to_copy, aten.copy_, aten.copy)
    others = [tensor for tensor in given if not isinstance(tensor, Standin) and tensor.dim()]
    if mine and others and not moved and packet not in INDEXING:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found {NAME} and cpu")
    _count(packet, args, kwargs, device, bool(others))
    held = tree_map_only(Standin, lambda tensor: tensor.held, (args, kwargs))
    if device == NAME:
        held[1]["device"] = torch.device("cpu")
    found = function(*held[0], **held[1])
    if device == "cpu" or (moved and packet is not aten._to_copy and not isinstance(args[0], Standin)):
        return args[0] if packet is aten.copy_ else found
    # What was made of another tensor without a copy would otherwise change with it.
    found = tree_map_only(Tensor, Standin, found)
    return return_and_correct_aliasing(function, args, kwargs, found)


def _kernel(name: str) -> Any:
    packet, _, overload = name.partition(".")
    function = getattr(getattr(aten, packet), overload or "default")
    return lambda *args, **kwargs: _compute(function, args, kwargs)


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    return _compute(aten.copy_.default, (to, source, non_blocking), {})


def _count(packet: Any, args: Any, kwargs: dict[str, Any], device: str | None, others: bool) -> None:
    """Count an operation if a GPU would make the CPU wait for it."""
    if packet in WAITING or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
        _waits(str(packet))
    if packet in (aten._to_copy, aten.copy_):
        source, target = (args[0], None) if packet is aten._to_copy else (args[1], args[0])
        to = device or (NAME if isinstance(source, Standin) else "cpu")
        if target is not None:
            to = NAME if isinstance(target, Standin) else "cpu"
        if not source.numel():
            return
        asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        if (to == NAME) != isinstance(source, Standin) and not (asynchronous and to == NAME):
            _waits(f"{packet} to {to}")
    if packet in INDEXING:
        indices = [index for index in args[1] if index is not None]
        # A flag and a single value are a masked fill.
        fills = packet is not aten.index and args[2].numel() == 1
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
            _waits(f"{packet} by flags")
        if others and any(not isinstance(index, Standin) for index in indices):
            _waits(f"{packet} by indices of the CPU")


def _waits(what: str) -> None:
    frame: Any = sys._getframe()
    while frame.f_back is not None and "/gradmem/" not in frame.f_code.co_filename:
        frame = frame.f_back
    waits[f"{what}, {frame.f_code.co_filename.rpartition('/gradmem/')[2]}:{frame.f_lineno}"] += 1


@contextmanager
def standin() -> Iterator[torch.device]:
    """Switch the device on."""
    Standin.here, before = True, torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    asked = {
        "get_memory_info": lambda device=None: (2**30, 2**31),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 2**20,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: _waits("synchronize"),
    }
    try:
        with mock.patch.multiple(torch.accelerator, **asked):
            yield torch.device(NAME, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
        Standin.here = False


@contextmanager
def absent() -> Iterator[None]:
    """Switch the device off for a while."""
    Standin.here = False
    try:
        yield
    finally:
        Standin.here = True


@contextmanager
def waiting() -> Iterator[Counter[str]]:
    """Count what the CPU waits for."""
    waits.clear()
    yield waits


def register() -> str:
    """Make the device known to PyTorch, before anything is differentiated; say why not where that fails."""
    try:

        class Hook(torch._C._acc.PrivateUse1Hooks):
            def is_available(self) -> bool:
                return Standin.here

            def has_primary_context(self, index: int) -> bool:
                return True

            def is_built(self) -> bool:
                return True

        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), Hook())
        for name in MAKING:
            KERNELS.impl(name, _kernel(name), "PrivateUse1")
        KERNELS.impl("_copy_from", _copy_from, "PrivateUse1")
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this PyTorch has no devices in Python: {error}"
    return ""


KERNELS = torch.library.Library("aten", "IMPL")
# With another accelerator registered, PyTorch would no longer find a real one.
REAL = os.environ.get("GRADMEM_TEST_DEVICE", "cpu") != "cpu"
MISSING = "a real device is asked for" if REAL else register()
