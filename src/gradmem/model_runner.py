"""A Hugging Face causal language model that runs on input embeddings, with a cache before them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import GradmemError
from .ops.head import Head, ScaledHead
from .prefix import Prefix

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_params")
"""Arguments of generation that are tensors and caches."""
ORIGINAL = "original_max_position_embeddings"
"""Config field with the longest input for which rotary angles are those of short inputs."""

_one_sequence_a_row: ContextVar[bool] = ContextVar("one_sequence_a_row", default=False)
_find_packed_sequences = masking_utils.find_packed_sequence_indices


def _packed_sequences(position_ids: Tensor) -> Tensor | None:
    """Replace a check that transformers makes in every forward: its answer waits for the device, and we know it."""
    return None if _one_sequence_a_row.get() else _find_packed_sequences(position_ids)


masking_utils.find_packed_sequence_indices = _packed_sequences


class ModelRunner(nn.Module):
    """Run a causal language model on input embeddings: hidden states, prefixes and generation.

    `Backbone` adds what a memory method must know of the model.

    Parameters
    ----------
    model : PreTrainedModel
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.config.return_dict = True  # otherwise transformers' own generation fails
        self._scaling: tuple[float, float | None] | None = None

    @property
    def width(self) -> int:
        """Model width d."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def body(self) -> Any:
        """The model without its output layer."""
        return self.model.model if self.model.base_model is self.model else self.model.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers.

        Raises
        ------
        GradmemError
            If the model does not keep them in a list.
        """
        config = self.model.config
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
                return module
        raise GradmemError(
            f"'{config.model_type}' has no list of layers that could hold a memory: use another backbone"
        )

    @property
    def max_positions(self) -> int:
        """Longest input in tokens before rotary angles would change, as those of keys in the cache cannot."""
        config = self.model.config.get_text_config(decoder=True)
        most = [getattr(config, "max_position_embeddings", None)]
        turned = getattr(config, "rope_parameters", None) or {}
        for rope in [turned, *(value for value in turned.values() if isinstance(value, dict))]:
            if rope.get("rope_type") in ("dynamic", "longrope"):
                most += [rope.get(ORIGINAL), getattr(config, ORIGINAL, None)]
        return min((int(length) for length in most if length), default=2**31 - 1)

    @property
    def takes_positions(self) -> bool:
        """Whether the model accepts position ids; models that bias attention by distance count for themselves."""
        return "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def head(self) -> Head:
        """The output layer, hidden states -> logits, with the scale and cap that the model applies to its logits."""
        layer: nn.Linear = self.model.get_output_embeddings()
        return layer if self._scaling is None else ScaledHead(layer, *self._scaling)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) -> input embeddings (batch, length, d)."""
        return self.model.get_input_embeddings()(ids)

    def random_embeddings(self, count: int) -> Tensor:
        """Draw vectors (count, d) with the standard deviation of the token embeddings."""
        like = self.model.get_input_embeddings().weight
        drawn = torch.randn(count, self.width, dtype=like.dtype, device=like.device)
        return drawn * float(like.detach().float().std())

    def hidden(
        self, embeds: Tensor, cache: Cache | None = None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Run the blocks.

        Pads must be on the right: no real token attends to them, so they need no mask.

        Parameters
        ----------
        embeds : Tensor, shape (batch, length, d)
        cache : Cache, optional
            Keys and values of what comes before; it is extended in place.
        mask : Tensor, optional
            Attention mask as transformers takes it, if attention is not just causal.
        positions : Tensor, int64, shape (batch, length), optional
            Position ids, if they do not simply count on; a model that accepts none counts the mask for itself.

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
        """Run a prefix once, and keep the keys and values that later tokens need.

        Parameters
        ----------
        embeds : Tensor, shape (batch, length, d)
        real : Tensor, bool, shape (batch, length), optional
            True at real tokens, for rows of different lengths; pads must be on the right. It must be on the CPU, as
            its values decide shapes.
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
        """An empty cache that keeps all positions, also for layers with sliding windows, which masks restrict."""
        cache = DynamicCache(config=self.model.config)
        cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]
        return cache

    def generate(
        self, streamer: Any = None, logits_processor: Any = None, stopping_criteria: Any = None, **options: Any
    ) -> Any:
        """Generate with transformers from the arguments alone; the model's own generation config is ignored.

        Raises
        ------
        GradmemError
            If transformers refuses an option.
        """
        model, inputs = self.model, {name: options.pop(name) for name in INPUTS if name in options}
        before = model.generation_config
        try:
            settings = GenerationConfig(**options, use_cache=True)
            model.generation_config = GenerationConfig()
            with self._caching():
                return model.generate(
                    **inputs,
                    generation_config=settings,
                    streamer=streamer,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                )
        except ValueError as error:
            raise GradmemError(f"cannot generate: {str(error).splitlines()[0]}") from error
        finally:
            model.generation_config = before

    @contextmanager
    def _caching(self) -> Iterator[None]:
        """Switch gradient checkpointing off: layers that recompute their activations neither fill nor read a cache."""
        modules = self.model.modules() if self.model.training else ()
        flagged = [module for module in modules if vars(module).get("gradient_checkpointing")]
        for module in flagged:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in flagged:
                module.gradient_checkpointing = True

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Switch dropout off, and restore the mode afterwards."""
        mode = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(mode)
