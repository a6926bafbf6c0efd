"""Tokenizers of pretrained models, made fit for training with end tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from ..errors import GradmemError
from .gguf import pretrained_place

PAD = "[PAD]"


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer by hub name, directory or GGUF file, and give it a pad token of its own where it has none.

    Many models pad with their end token, or do not pad at all; then a true end would look like padding. A backbone
    that is loaded with such a tokenizer grows by the one embedding.

    Raises
    ------
    GradmemError
        As `plain_tokenizer` does.
    """
    tokenizer = plain_tokenizer(name)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (*ends, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def plain_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer by hub name or directory, with the tokens that it has.

    Raises
    ------
    GradmemError
        When there is none of that name, or it has no end token or no fast implementation.
    """
    place = pretrained_place(name)
    directory = Path(place)
    try:
        if (directory / "vocab.bpe").is_file():  # GPT-2 as it was first released
            files = {"vocab": str(directory / "encoder.json"), "merges": str(directory / "vocab.bpe")}
            tokenizer = GPT2TokenizerFast(**files)
        elif (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
        else:
            tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the hub's client, tokenizers and the system each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GradmemError(f"cannot load the tokenizer '{name}': {reason}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise GradmemError(f"the tokenizer '{name}' has no end token or no fast implementation: choose another")
    if tokenizer.unk_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        tokenizer.unk_token = None  # byte-level tokenizers know everything; the end token is not a sign of alien text
    return tokenizer


def digest_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how a tokenizer splits text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
