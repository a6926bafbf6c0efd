"""Any Hugging Face causal language model, through input embeddings, output head and prefix cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .errors import GradmemError
from .inner import attention
from .inner.closed_form import closed_forms, replaced


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
    def from_config(cls, config: dict[str, Any]) -> Backbone:
        """Build a randomly initialised model from the fields of its Hugging Face config, `model_type` among them.

        Raises
        ------
        GradmemError
            When transformers does not know the model type or refuses a field.
        """
        fields = dict(config)
        try:
            built = AutoConfig.for_model(fields.pop("model_type"), **fields)
            model = AutoModelForCausalLM.from_config(built)
        except (KeyError, ValueError, TypeError) as error:
            raise GradmemError(f"cannot build a backbone from {config}: {error}") from error
        return cls(model)

    @classmethod
    def from_pretrained(cls, name: str, vocabulary: int = 0) -> Backbone:
        """Load pretrained weights by hub name or local directory; embeddings grow where `vocabulary` is larger."""
        try:
            model = AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise GradmemError(f"cannot load the backbone '{name}': {error}") from error
        if vocabulary > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocabulary)
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
    def head(self) -> nn.Linear:
        """The output layer, hidden states -> logits."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) -> input embeddings (batch, length, d)."""
        return self.model.get_input_embeddings()(ids)

    def hidden(self, embeds: Tensor, cache: Cache | None = None) -> Tensor:
        """Run the blocks.

        Pads stand on the right, where causal attention keeps them from every real token, so no mask is needed.

        Parameters
        ----------
        embeds : Tensor, shape (batch, length, d)
        cache : Cache, optional
            Keys and values of what comes before; it is extended in place.

        Returns
        -------
        Tensor, shape (batch, length, d), after the final norm
        """
        return self.model.base_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state

    def prefix(self, embeds: Tensor) -> Prefix:
        """Run a prefix once and keep what later tokens need of it."""
        cache = DynamicCache(config=self.model.config)
        return Prefix(self.hidden(embeds, cache)[:, -1], cache)

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
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = self.second_order_attention
        try:
            with replaced(self.closed_forms):
                yield
        finally:
            config._attn_implementation = before


class Prefix:
    """A prefix that has been run: its last hidden state (batch, d) and its key-value cache."""

    def __init__(self, last: Tensor, cache: Cache) -> None:
        self.last = last
        self.cache = cache

    def select(self, rows: Tensor) -> Prefix:
        """Rows of the prefix, in any order and any number of times; the original stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        return Prefix(self.last[rows], cache)

    @property
    def length(self) -> int:
        """Prefix positions."""
        return int(self.cache.get_seq_length())


def generate(
    backbone: Backbone, prefix: Prefix, queries: list[list[int]], pad_id: int, **options: Any
) -> list[list[int]]:
    """Continue each query after its prefix with `transformers` generation.

    The prefix stands in the cache; in the ids it is only a run of place-holders that generation skips. Queries are
    padded on the left, between prefix and query, under the attention mask.

    Parameters
    ----------
    prefix : Prefix
        One row for each query.
    queries : list of list of int
        Token ids, at least one each.
    options
        Arguments of `GenerationMixin.generate`.

    Returns
    -------
    list of list of int
        The new tokens of each query (of each of its sequences, one after the other, where `num_return_sequences`
        asks for more).
    """
    device = prefix.last.device
    # Generation repeats ids and mask for beams and sequences, but not a cache that it is given.
    repeats = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    prefix = prefix.select(torch.arange(len(queries), device=device).repeat_interleave(repeats))
    longest = max(len(query) for query in queries)
    width = prefix.length + longest
    ids = torch.full((len(queries), width), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    mask[:, : prefix.length] = 1
    for row, query in enumerate(queries):
        ids[row, width - len(query) :] = torch.tensor(query, device=device)
        mask[row, width - len(query) :] = 1
    generated = backbone.model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=prefix.cache, pad_token_id=pad_id, **options
    )
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    return sequences[:, width:].tolist()
