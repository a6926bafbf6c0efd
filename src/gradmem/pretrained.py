"""Tokenizers of pretrained models, made fit for training with end tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, GPT2TokenizerFast, PretrainedConfig, PreTrainedTokenizerFast

from .errors import GradmemError, refused
from .gguf import converted, is_gguf
from .language_model import CONFIG, config_of
from .untrusted import INDEX, WEIGHTS, read_json

PAD = "[PAD]"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors", "*token*.json", "vocab*", "merges.txt", "tokenizer.model"]
"""Files of a language model on the hub that are downloaded."""


def pretrained_place(name: str) -> Path:
    """The directory of a language model and its tokenizer, which is downloaded or converted where it must be.

    Parameters
    ----------
    name : str
        Directory, hub name, GGUF file, or short name of a model that comes as a Python package.

    Raises
    ------
    GradmemError
        When the hub does not give it, a package is missing, or a GGUF file cannot be converted.
    """
    if is_gguf(name):
        return converted(name)
    if os.path.exists(name) or not HUB_NAME.fullmatch(name):
        return Path(name)
    with refused(f"'{name}' is no directory, and the hub does not give it"):
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))


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
    directory = pretrained_place(name)
    with refused(f"cannot load the tokenizer '{name}'"):
        if (directory / "vocab.bpe").is_file():  # GPT-2 as it was first released
            files = {"vocab": str(directory / "encoder.json"), "merges": str(directory / "vocab.bpe")}
            tokenizer = GPT2TokenizerFast(**files)
        elif (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        elif directory.is_dir():
            given = (directory / CONFIG).is_file()
            config = config_of(read_json(directory / CONFIG), 0) if given else PretrainedConfig()
            local = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(directory, config=config, **local)
        else:
            raise FileNotFoundError("there is no such directory")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise GradmemError(f"the tokenizer '{name}' has no end token or no fast implementation: choose another")
    if tokenizer.unk_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        tokenizer.unk_token = None  # byte-level tokenizers know everything; the end token is not a sign of alien text
    return tokenizer


def unspoken(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many of the last tokens are special ones, which stand in no text: a model can do without their embeddings."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next(count for count in range(len(tokenizer) + 1) if len(tokenizer) - 1 - count not in special)


def digest_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how a tokenizer splits text, and how tokens become text again."""
    backend = tokenizer.backend_tokenizer
    # What the last call padded or cut belongs to that call.
    backend.no_padding()
    backend.no_truncation()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    about = [backend.to_str(), special, tokenizer.clean_up_tokenization_spaces]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
