"""The C interface of llama.cpp, from the library in the package xllamacpp.

Only what the tests call is declared. The parameters of a context are a block of numbers whose places this version of
the package has; `Llama` checks the defaults that it finds there.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WORDS = 128
CONTEXT, THREADS, FLASH, KEYS, VALUES = 0, (7, 8), 13, 26, 27
"""Places of the context's length, its threads, flash attention and the types of its cache, in words of four bytes."""
DEFAULTS = {CONTEXT: 512, FLASH: 2**32 - 1, KEYS: 1, VALUES: 1}
MOST_TOKENS = 4096


class Parameters(Structure):
    """Parameters of a model or a context; larger than any of the two."""

    _fields_ = [("words", c_uint32 * WORDS)]


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
    "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_state_seq_load_file": (
        c_size_t,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_size_t, POINTER(c_size_t)],
    ),
}


@cache
def library() -> Any:
    """The library, silent; tests that need it are skipped where it is absent."""
    package = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    (file,) = Path(package.__file__).parent.glob("*.so")
    found = ctypes.CDLL(str(file))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.silent = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)
    found.llama_log_set(ctypes.cast(found.silent, c_void_p), None)
    return found


class Llama:
    """A model with one sequence.

    Parameters
    ----------
    file : Path
        GGUF file.
    length : int
        Positions of its context.
    """

    def __init__(self, file: Path, length: int = 256) -> None:
        self.library = library()
        self.model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        assert self.model, "the model does not load"
        given = self.library.llama_context_default_params()
        assert {place: given.words[place] for place in DEFAULTS} == DEFAULTS, "another layout of the parameters"
        given.words[CONTEXT] = length
        for place in THREADS:
            given.words[place] = 1
        self.context = self.library.llama_init_from_model(self.model, given)
        assert self.context, "there is no context"
        self.vocabulary = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))
        self.position = 0

    def close(self) -> None:
        """Free its memory."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def restore(self, file: Path) -> list[int]:
        """Load a sequence state and return its tokens; none if it is refused."""
        tokens, count = (c_int32 * MOST_TOKENS)(), c_size_t()
        self.library.llama_state_seq_load_file(
            self.context, str(file).encode(), 0, tokens, MOST_TOKENS, ctypes.byref(count)
        )
        self.position = count.value
        return list(tokens[: count.value])

    def read(self, tokens: list[int] | None = None, embeds: Tensor | None = None) -> Tensor:
        """Read tokens or embeddings, and return the logits of what comes next."""
        count = len(tokens or () if embeds is None else embeds)
        batch = self.library.llama_batch_init(count, 0 if embeds is None else embeds.shape[1], 1)
        batch.n_tokens = count
        if embeds is not None:
            numbers = embeds.float().contiguous()
            ctypes.memmove(batch.embd, numbers.data_ptr(), numbers.nbytes)
        for place in range(count):
            if tokens is not None:
                batch.token[place] = tokens[place]
            batch.pos[place] = self.position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place == count - 1
        assert self.library.llama_decode(self.context, batch) == 0
        self.library.llama_batch_free(batch)
        self.position += count
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return torch.tensor(logits[: self.vocabulary])
