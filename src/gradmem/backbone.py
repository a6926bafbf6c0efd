"""The language model under a memory method: any Hugging Face causal language model that passes a few checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from typing_extensions import Self

from .errors import GradmemError, refused
from .language_model import built_model, loaded_model
from .lora import add_lora, lora_parameters
from .model_runner import ModelRunner
from .ops import attention
from .ops.head import ScaledHead
from .ops.patching import OpenLayerNorm, closed_forms, patched
from .ops.workspace import elements_at_once
from .pretrained import pretrained_place
from .probing import FAILURES, check_reading, find_head, hides_pads, obeys_masks, other_layers
from .untrusted import Stored

MIN_VOCABULARY_SHARE = 0.95
"""Smallest share of a pretrained model's embeddings that its tokenizer must have tokens for."""
MAX_ADDED_TOKENS = 4
"""Most special tokens that a pretrained model's tokenizer may have beyond its embeddings, such as a pad token."""
TOKENS_AT_ONCE = 4096
"""Context tokens to write at once on a CPU without meta-gradient: more cost memory and save no time."""
ACTIVATIONS = 2**28
"""Most activations of the tokens that are written at once on a CPU, so that larger models write fewer."""
ACTIVATIONS_SHARE = 8
"""On another device these activations may take one part in this many of its memory; tokens are not limited there."""
WINDOW = re.compile(r"window(?!_layers)|local_attention|attention_types|chunk_size$|index_topk|block_size")
"""Names of config fields that limit how far attention reaches."""


class Backbone(ModelRunner):
    """The language model that a memory method writes and reads through.

    Parameters
    ----------
    model : PreTrainedModel
        Any `AutoModelForCausalLM` that takes `inputs_embeds`, with any attention that can be differentiated once.

    Raises
    ------
    GradmemError
        If the model computes something else with the memory in its cache than in one pass over memory, query and
        answer, or changes its logits other than by a scale and a cap.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.batches_uneven = False
        """Whether rows of different lengths can run in one batch, because pads change nothing. With sliding windows,
        which count positions, only rows of the same length run together."""
        self._check()
        self.closed_forms = closed_forms(model)
        self.double_backward_attention = attention.NAME
        if not self._double_backward_agrees():
            self.double_backward_attention = "eager"

    def _check(self) -> None:
        """Run the model on a few vectors, as a mistake would show nowhere else."""
        kind = self.model.config.model_type
        try:
            with torch.no_grad(), self.without_dropout():
                head = find_head(self)
                self._scaling = (head.scale, head.cap) if isinstance(head, ScaledHead) else None
                if self.attends:
                    moved = check_reading(self)
                    self.batches_uneven = moved > 0 and not self.windows and hides_pads(self, moved)
        except GradmemError as error:
            raise GradmemError(f"'{kind}' cannot serve as a backbone: {error}") from error
        except FAILURES as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise GradmemError(
                f"'{kind}' cannot serve as a backbone: it does not run on embeddings ({reason})"
            ) from error

    def _double_backward_agrees(self) -> bool:
        """Whether the model computes the same with our attention; some models have their own kind."""
        count = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(min(8, count), device=self.model.device)
        probe = self.embed(ids).detach()[None]
        with torch.no_grad(), self.without_dropout():
            wanted = self.hidden(probe)
            try:
                with self.double_backward():
                    found = self.hidden(probe)
            except (GradmemError, *FAILURES):
                return False
        tolerance = torch.finfo(wanted.dtype).eps ** 0.5
        return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))

    @classmethod
    def from_config(cls, config: dict[str, Any], stored: Stored | None = None) -> Backbone:
        """Build a randomly initialised model from the fields of its Hugging Face config, `model_type` among them.

        Parameters
        ----------
        config : dict
        stored : Stored, optional
            Weights that will be loaded into the model, which may not be larger.

        Raises
        ------
        GradmemError
            If transformers does not know the model type or refuses a field, or the model is too large.
        """
        with refused("cannot build a backbone from these fields"):
            return cls(built_model(config, stored))

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        vocabulary: int | None = None,
        unspoken: int = 0,
        dtype: str = "float32",
        lora: int | None = None,
    ) -> Backbone:
        """Load pretrained weights.

        Parameters
        ----------
        name : str
            Hub name, local directory, GGUF file, or the short name of a model that comes as a Python package.
        vocabulary : int, optional
            Number of tokens of the tokenizer that the model will be used with.
        unspoken : int
            How many of the last tokens occur in no text, such as a pad token: the embeddings may grow by them.
        dtype : str
            Type of the weights, by its PyTorch name.
        lora : int, optional
            Train LoRA of this rank on all linear layers of the blocks, and none of the model's own weights.

        Raises
        ------
        GradmemError
            If weights are missing or cannot be loaded, or the tokenizer is another model's.
        """
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise GradmemError(
                f"the backbone's dtype must be a type of weights such as 'float32' or 'bfloat16', not '{dtype}'"
            )
        place = pretrained_place(name)
        with refused(f"cannot load the backbone '{name}'"):
            model = loaded_model(place, getattr(torch, dtype))
            if vocabulary is not None:
                _fit(model, vocabulary, unspoken, name)
            if lora is not None:
                add_lora(model, lora)
            return cls(model)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Say whether the model is trained: all of its weights or, if it has LoRA, that alone."""
        super().requires_grad_(requires_grad and not self.has_lora)
        for parameter in lora_parameters(self.model):
            parameter.requires_grad_(requires_grad)
        return self

    @property
    def has_lora(self) -> bool:
        """Whether LoRA alone is trained, and none of the model's own weights."""
        return bool(lora_parameters(self.model))

    @property
    def attends(self) -> bool:
        """Whether every layer keeps keys and values of earlier tokens, and nothing else."""
        return not other_layers(self)

    @property
    def windows(self) -> list[str]:
        """Fields of the config that restrict layers to a window of earlier tokens.

        A probe cannot find out: it would have to be longer than the window.
        """
        fields = self.model.config.get_text_config(decoder=True).to_dict()
        return [name for name, value in fields.items() if value and WINDOW.search(name)]

    @property
    def max_full_attention(self) -> int:
        """Longest input in tokens in which every token attends to all earlier ones, whatever windows the layers have.

        It is 0 if the config restricts attention by more than a `sliding_window` of so many tokens.
        """
        # A switch and a pattern only say which layers have the window.
        sizes = {name for name in self.windows if not name.endswith("pattern") and name != "use_sliding_window"}
        if not sizes:
            return self.max_positions
        window = self.model.config.get_text_config(decoder=True).sliding_window if sizes == {"sliding_window"} else 0
        return min(window, self.max_positions) if isinstance(window, int) else 0

    @cached_property
    def takes_masks(self) -> bool:
        """Whether the attention obeys masks that say which positions each position attends to."""
        return obeys_masks(self)

    @property
    def tokens_at_once(self) -> int:
        """Context tokens to write at once without meta-gradient."""
        # The input and the output of each matrix are kept for the gradient.
        of_token = sum(sum(weights.shape) for weights in self.model.parameters() if weights.ndim == 2)
        device = self.model.device
        most = TOKENS_AT_ONCE if device.type == "cpu" else 2**62
        return max(1, min(most, elements_at_once(device, ACTIVATIONS, ACTIVATIONS_SHARE) // of_token))

    def contexts_at_once(self, length: int) -> int:
        """Contexts of this many tokens to write at once without meta-gradient, at least 1."""
        return max(1, self.tokens_at_once // length)

    @torch.no_grad()
    def cache_bytes(self, ids: Tensor) -> int:
        """Bytes of the key-value cache of tokens (batch, length)."""
        cache = DynamicCache(config=self.model.config)
        self.hidden(self.embed(ids), cache)
        return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

    @cached_property
    def token_cache_bytes(self) -> int | None:
        """Bytes of the key-value cache for each token; None for models that keep recurrent states instead."""
        return self.cache_bytes(torch.zeros(1, 1, dtype=torch.long, device=self.model.device)) if self.attends else None

    @contextmanager
    def double_backward(self) -> Iterator[None]:
        """Compute with operations that can be differentiated twice, which fused attention cannot."""
        with self._attention(self.double_backward_attention), patched(self.closed_forms):
            yield

    @contextmanager
    def triple_backward(self) -> Iterator[None]:
        """Compute with operations that can be differentiated three times."""
        with self._attention("eager"), OpenLayerNorm():
            yield

    def eager_attention(self) -> AbstractContextManager[None]:
        """Compute attention by its plain formula, which a compiler optimizes best."""
        return self._attention("eager")

    @contextmanager
    def training_attention(self) -> Iterator[None]:
        """Compute with the attention whose gradient is fastest: for bfloat16 on a CPU that is not PyTorch's."""
        config = self.model.config
        dropout = any(value for name, value in vars(config).items() if "att" in name and "drop" in name)
        low = self.model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        fits = config._attn_implementation == "sdpa" and self.double_backward_attention == attention.NAME
        with self._attention(attention.NAME) if low and fits and not dropout else nullcontext():
            yield

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Compute with the attention that transformers knows by this name."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before


def _fit(model: PreTrainedModel, vocabulary: int, unspoken: int, name: str) -> None:
    """Let the embeddings grow by a few special tokens; refuse a tokenizer of another model."""
    known = model.get_input_embeddings().num_embeddings
    # Many models have a few more embeddings than tokens, for round sizes.
    if not MIN_VOCABULARY_SHARE * known <= vocabulary <= known + min(unspoken, MAX_ADDED_TOKENS):
        raise GradmemError(
            f"the backbone '{name}' knows {known} tokens and the task's tokenizer has {vocabulary}: they do not belong "
            f"together; give the task `tokenizer: {name}`"
        )
    if vocabulary > known:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = layer.weight[:known].mean(0)  # the same in every run, unlike random vectors
