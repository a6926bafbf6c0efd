"""Any Hugging Face causal language model, through input embeddings, output head and prefix cache."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import GradmemError, refused
from .language_model import built_model, loaded_model
from .ops import attention
from .ops.head import Head, ScaledHead
from .ops.patching import closed_forms, patched
from .ops.workspace import elements_at_once
from .prefix import Prefix
from .pretrained import pretrained_place
from .probing import FAILURES, check_reading, find_head, hides_pads, obeys_masks, other_layers
from .untrusted import Stored

MIN_VOCABULARY_SHARE = 0.95
"""Smallest part of a pretrained model's embeddings that its tokenizer has tokens for."""
MAX_ADDED_TOKENS = 4
"""Most special tokens that a pretrained model's tokenizer may have got since, as one to pad with."""
TOKENS_AT_ONCE = 4096
"""Context tokens to write at once on a CPU where no meta-gradient is wanted: more only cost memory and page faults."""
ACTIVATIONS = 2**28
"""Activations that these tokens may have, so that larger models write fewer at once."""
ACTIVATIONS_SHARE = 8
"""On another device the activations take one in so many of the bytes of its memory, and tokens may be as many."""
WINDOW = re.compile(r"window(?!_layers)|local_attention|attention_types|chunk_size$|index_topk|block_size")
"""Names of config fields that say how far attention reaches."""
ORIGINAL = "original_max_position_embeddings"
"""Where a config says up to which length rotary angles are those of short inputs."""
INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_params")
"""Arguments of generation that are tensors and caches."""

_one_sequence_a_row: ContextVar[bool] = ContextVar("one_sequence_a_row", default=False)
_find_packed_sequences = masking_utils.find_packed_sequence_indices


def _packed_sequences(position_ids: Tensor) -> Tensor | None:
    """What transformers asks at every forward without a cache; the answer waits for the device, and ours is known."""
    return None if _one_sequence_a_row.get() else _find_packed_sequences(position_ids)


masking_utils.find_packed_sequence_indices = _packed_sequences


class Backbone(nn.Module):
    """A causal language model that takes `inputs_embeds`.

    Parameters
    ----------
    model : PreTrainedModel
        Any `AutoModelForCausalLM`, with any attention that can be differentiated once.

    Raises
    ------
    GradmemError
        When the model does not compute the same with the memory in its cache as in one pass over memory, query and
        answer, or changes its logits in another way than to scale and cap them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.config.return_dict = True  # otherwise transformers' own generation fails
        self.batches_uneven = False
        """Whether rows of different lengths can be run together: pads change nothing. Where windows count positions,
        rows of one length are run at a time."""
        self._check()
        self.closed_forms = closed_forms(model)
        self.double_backward_attention = attention.NAME
        if not self._double_backward_agrees():
            self.double_backward_attention = "eager"

    def _check(self) -> None:
        """Run the model on a few vectors: what it does wrong would go unnoticed."""
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
        """Whether the model computes the same with our attention; some have one of their own."""
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
            Weights that are to be loaded into it: the model may not be larger.

        Raises
        ------
        GradmemError
            When transformers does not know the model type or refuses a field, or the model is too large.
        """
        with refused("cannot build a backbone from these fields"):
            return cls(built_model(config, stored))

    @classmethod
    def from_pretrained(
        cls, name: str, vocabulary: int | None = None, unspoken: int = 0, dtype: str = "float32"
    ) -> Backbone:
        """Load pretrained weights.

        Parameters
        ----------
        name : str
            Hub name, local directory, GGUF file, or the short name of a model that comes as a Python package.
        vocabulary : int, optional
            Tokens of the tokenizer it is to be used with.
        unspoken : int
            The last ones of these that stand in no text, as one to pad with: the embeddings may grow by them.
        dtype : str
            Type of the weights, as PyTorch names it.

        Raises
        ------
        GradmemError
            When the weights cannot be loaded or are not all there, or the tokenizer is not that of the model.
        """
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise GradmemError(f"the backbone's dtype is a type of weights like 'float32' or 'bfloat16', not '{dtype}'")
        place = pretrained_place(name)
        with refused(f"cannot load the backbone '{name}'"):
            model = loaded_model(place, getattr(torch, dtype))
            if vocabulary is not None:
                _fit(model, vocabulary, unspoken, name)
            return cls(model)

    @property
    def width(self) -> int:
        """Model width d."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def max_positions(self) -> int:
        """Longest input in tokens, before rotary angles change: those of what is in the cache would stay."""
        config = self.model.config.get_text_config(decoder=True)
        most = [getattr(config, "max_position_embeddings", None)]
        turned = getattr(config, "rope_parameters", None) or {}
        for rope in [turned, *(value for value in turned.values() if isinstance(value, dict))]:
            if rope.get("rope_type") in ("dynamic", "longrope"):
                most += [rope.get(ORIGINAL), getattr(config, ORIGINAL, None)]
        return min((int(length) for length in most if length), default=2**31 - 1)

    @property
    def attends(self) -> bool:
        """Whether every layer keeps keys and values of what came before, and nothing else."""
        return not other_layers(self)

    @property
    def windows(self) -> list[str]:
        """Fields of the config that say that layers attend to a part of what came before only.

        A probe cannot tell: it would have to be longer than the window.
        """
        fields = self.model.config.get_text_config(decoder=True).to_dict()
        return [name for name, value in fields.items() if value and WINDOW.search(name)]

    @cached_property
    def takes_masks(self) -> bool:
        """Whether the attention takes masks that say what each position sees."""
        return obeys_masks(self)

    @property
    def tokens_at_once(self) -> int:
        """Context tokens to write at once where no meta-gradient is wanted."""
        # What goes into a matrix and what comes out of it is kept for the gradient.
        of_token = sum(sum(weights.shape) for weights in self.model.parameters() if weights.ndim == 2)
        device = self.model.device
        most = TOKENS_AT_ONCE if device.type == "cpu" else 2**62
        return max(1, min(most, elements_at_once(device, ACTIVATIONS, ACTIVATIONS_SHARE) // of_token))

    @property
    def body(self) -> Any:
        """The model without its output layer."""
        return self.model.model if self.model.base_model is self.model else self.model.base_model

    @property
    def takes_positions(self) -> bool:
        """Whether positions can be given; models that bias attention by distance count for themselves."""
        return "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def head(self) -> Head:
        """The output layer, hidden states -> logits, with what the model does to its logits."""
        layer: nn.Linear = self.model.get_output_embeddings()
        return layer if self._scaling is None else ScaledHead(layer, *self._scaling)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) -> input embeddings (batch, length, d)."""
        return self.model.get_input_embeddings()(ids)

    def hidden(
        self, embeds: Tensor, cache: Cache | None = None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Run the blocks.

        Pads stand on the right, where causal attention keeps them from every real token, so no mask is needed.

        Parameters
        ----------
        embeds : Tensor, shape (batch, length, d)
        cache : Cache, optional
            Keys and values of what comes before; it is extended in place.
        mask : Tensor, optional
            Attention mask as transformers takes it, where attention is not just causal.
        positions : Tensor, int64, shape (batch, length), optional
            Position ids, where they do not just count on; a model that takes none counts the mask for itself.

        Returns
        -------
        Tensor, shape (batch, length, d), after the final norm
        """
        given = {"attention_mask": mask, "position_ids": positions if self.takes_positions else None}
        token = _one_sequence_a_row.set(True)
        try:
            with nullcontext() if cache is None else self._caching():
                return self.body(
                    inputs_embeds=embeds,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    return_dict=True,
                    **{name: tensor for name, tensor in given.items() if tensor is not None},
                ).last_hidden_state
        finally:
            _one_sequence_a_row.reset(token)

    def prefix(self, embeds: Tensor, real: Tensor | None = None) -> Prefix:
        """Run a prefix once and keep what later tokens need of it.

        Parameters
        ----------
        embeds : Tensor, shape (batch, length, d)
        real : Tensor, bool, shape (batch, length), optional
            Rows of different lengths: their pads stand behind them, where causality and a mask hide them. On the CPU,
            since it is looked at.
        """
        cache = self.new_cache()
        hidden = self.hidden(embeds, cache)
        if real is None or bool(real.all()):
            return Prefix(hidden[:, -1], cache)
        device = hidden.device
        lengths = real.sum(1).to(device, non_blocking=True)
        last = hidden[torch.arange(len(lengths), device=device), lengths - 1]
        mask = torch.arange(real.shape[1], device=device) < lengths[:, None]
        return Prefix(last, cache, mask, lengths if self.takes_positions else None)

    def new_cache(self) -> DynamicCache:
        """An empty cache that keeps all positions; where layers have windows, masks cut them."""
        cache = DynamicCache(config=self.model.config)
        cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]
        return cache

    def generate(self, streamer: Any = None, **options: Any) -> Any:
        """Generate with transformers, from the arguments alone: what the model's directory says counts for nothing.

        Raises
        ------
        GradmemError
            When transformers refuses an option.
        """
        model, inputs = self.model, {name: options.pop(name) for name in INPUTS if name in options}
        before = model.generation_config
        try:
            settings = GenerationConfig(**options, use_cache=True)
            model.generation_config = GenerationConfig()
            with self._caching():
                return model.generate(**inputs, generation_config=settings, streamer=streamer)
        except ValueError as error:
            raise GradmemError(f"cannot generate: {str(error).splitlines()[0]}") from error
        finally:
            model.generation_config = before

    @contextmanager
    def _caching(self) -> Iterator[None]:
        """Keep activations: layers that compute them again in the backward pass neither fill nor read a cache."""
        modules = self.model.modules() if self.model.training else ()
        flagged = [module for module in modules if vars(module).get("gradient_checkpointing")]
        for module in flagged:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in flagged:
                module.gradient_checkpointing = True

    @torch.no_grad()
    def cache_bytes(self, ids: Tensor) -> int:
        """Bytes of the key-value cache of tokens (batch, length): what it takes to keep a text whole."""
        cache = DynamicCache(config=self.model.config)
        self.hidden(self.embed(ids), cache)
        return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

    @cached_property
    def token_cache_bytes(self) -> int | None:
        """Bytes that the key-value cache keeps of each token; None for models that keep recurrent states instead."""
        return self.cache_bytes(torch.zeros(1, 1, dtype=torch.long, device=self.model.device)) if self.attends else None

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Switch dropout off, as WRITE wants it, and restore the mode afterwards."""
        mode = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(mode)

    @contextmanager
    def double_backward(self) -> Iterator[None]:
        """Compute with what can be differentiated twice, which fused attention cannot, and keeps little for it."""
        with self._attention(self.double_backward_attention), patched(self.closed_forms):
            yield

    def eager_attention(self) -> AbstractContextManager[None]:
        """Compute with the formulas as they are, which a compiler sees through best."""
        return self._attention("eager")

    @contextmanager
    def training_attention(self) -> Iterator[None]:
        """Compute with the attention that is fast with its gradient: PyTorch's is not for bfloat16 on a CPU."""
        config = self.model.config
        dropout = any(value for name, value in vars(config).items() if "att" in name and "drop" in name)
        low = self.model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        fits = config._attn_implementation == "sdpa" and self.double_backward_attention == attention.NAME
        with self._attention(attention.NAME) if low and fits and not dropout else nullcontext():
            yield

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Compute with an attention that transformers knows by this name."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before


def _fit(model: PreTrainedModel, vocabulary: int, unspoken: int, name: str) -> None:
    """Let the embeddings grow by a pad token or so; refuse a tokenizer that is not the model's."""
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
                layer.weight[known:] = layer.weight[:known].mean(0)  # always the same, like no other token
