"""Any Hugging Face causal language model, through input embeddings, output head and prefix cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicCache

from .data.checked import Stored
from .data.language_model import built_model, loaded_model
from .data.pretrained import pretrained_place
from .errors import GradmemError, refused
from .inner import attention
from .inner.closed_form import closed_forms, replaced
from .inner.room import room
from .prefix import Prefix

SPARE = 0.95
"""Smallest part of a pretrained model's embeddings that its tokenizer has tokens for."""
ADDED = 4
"""Most special tokens that a pretrained model's tokenizer may have got since, as one to pad with."""
TOKENS_AT_ONCE = 4096
"""Context tokens to write at once on a CPU where no meta-gradient is wanted: more only cost memory and page faults."""
ACTIVATIONS = 2**28
"""Activations that these tokens may have, so that larger models write fewer at once."""
ACTIVATIONS_SHARE = 8
"""On another device the activations take one in so many of the bytes of its memory, and tokens may be as many."""

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
        When the logits of the model are not its output layer applied to its last hidden states (some models scale or
        cap them), or when it does not take `inputs_embeds`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._check_head()
        self.closed_forms = closed_forms(model)
        self.second_order_attention = attention.NAME
        if not self._second_order_agrees():
            self.second_order_attention = "eager"

    def _check_head(self) -> None:
        """Compare the model's own logits with ours on one vector: a wrong head would go unnoticed."""
        kind = self.model.config.model_type
        probe = self.model.get_input_embeddings().weight[-1].detach()[None, None]
        mode = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                wanted = self.model(inputs_embeds=probe, use_cache=False).logits
                found = self.head(self.hidden(probe))
        except (TypeError, AttributeError, ValueError) as error:
            raise GradmemError(f"'{kind}' cannot serve as a backbone: {error}") from error
        finally:
            self.model.train(mode)
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
            raise GradmemError(f"'{kind}' cannot serve as a backbone: it changes its logits after the output layer")

    def _second_order_agrees(self) -> bool:
        """Whether the model computes the same with our attention; some have one of their own."""
        ids = torch.arange(min(8, self.model.config.vocab_size), device=self.model.device)
        probe = self.embed(ids).detach()[None]
        with torch.no_grad(), self.without_dropout():
            wanted = self.hidden(probe)
            try:
                with self.second_order():
                    found = self.hidden(probe)
            except GradmemError:
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
        """Longest input in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31 - 1))

    @property
    def attends(self) -> bool:
        """Whether every layer keeps keys and values of what came before, and no recurrent state."""
        return not any(hasattr(layer, "conv_states") for layer in DynamicCache(config=self.model.config).layers)

    @property
    def tokens_at_once(self) -> int:
        """Context tokens to write at once where no meta-gradient is wanted."""
        # What goes into a matrix and what comes out of it is kept for the gradient.
        of_token = sum(sum(weights.shape) for weights in self.model.parameters() if weights.ndim == 2)
        device = self.model.device
        most = TOKENS_AT_ONCE if device.type == "cpu" else 2**62
        return max(1, min(most, room(device, ACTIVATIONS, ACTIVATIONS_SHARE) // of_token))

    @property
    def takes_positions(self) -> bool:
        """Whether positions can be given; models that bias attention by distance count for themselves."""
        return "position_ids" in inspect.signature(self.model.base_model.forward).parameters

    @property
    def head(self) -> nn.Linear:
        """The output layer, hidden states -> logits."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

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
            return self.model.base_model(
                inputs_embeds=embeds,
                past_key_values=cache,
                use_cache=cache is not None,
                **{name: tensor for name, tensor in given.items() if tensor is not None},
            ).last_hidden_state
        finally:
            _one_sequence_a_row.reset(token)

    def prefix(self, embeds: Tensor) -> Prefix:
        """Run a prefix once and keep what later tokens need of it."""
        cache = DynamicCache(config=self.model.config)
        return Prefix(self.hidden(embeds, cache)[:, -1], cache)

    @torch.no_grad()
    def cache_bytes(self, ids: Tensor) -> int:
        """Bytes of the key-value cache of tokens (batch, length): what it takes to keep a text whole."""
        layers = self.prefix(self.embed(ids)).cache.layers
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

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
    def second_order(self) -> Iterator[None]:
        """Compute with what can be differentiated twice, which fused attention cannot, and keeps little for it."""
        with self._attention(self.second_order_attention), replaced(self.closed_forms):
            yield

    def plain(self) -> AbstractContextManager[None]:
        """Compute with the formulas as they are, which a compiler sees through best."""
        return self._attention("eager")

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Compute with the attention that is fast with its gradient: PyTorch's is not for bfloat16 on a CPU."""
        config = self.model.config
        dropout = any(value for name, value in vars(config).items() if "att" in name and "drop" in name)
        low = self.model.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        fits = config._attn_implementation == "sdpa" and self.second_order_attention == attention.NAME
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
    if not SPARE * known <= vocabulary <= known + min(unspoken, ADDED):
        raise GradmemError(
            f"the backbone '{name}' knows {known} tokens and the task's tokenizer has {vocabulary}: they do not belong "
            f"together; give the task `tokenizer: {name}`"
        )
    if vocabulary > known:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = layer.weight[:known].mean(0)  # always the same, like no other token
