"""Any Hugging Face causal language model, through input embeddings, output head and prefix cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .data.gguf import pretrained_place
from .errors import GradmemError
from .inner import attention
from .inner.closed_form import closed_forms, replaced

SPARE = 0.95
"""Smallest part of a pretrained model's embeddings that its tokenizer has tokens for."""
ADDED = 4
"""Most special tokens that a pretrained model's tokenizer may have got since, as one to pad with."""
TOKENS_AT_ONCE = 4096
"""Context tokens to write at once where no meta-gradient is wanted: more only costs memory and page faults."""
ACTIVATIONS = 2**28
"""Activations that these tokens may have, so that larger models write fewer at once."""


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
    def from_pretrained(cls, name: str, vocabulary: int | None = None, dtype: str = "float32") -> Backbone:
        """Load pretrained weights.

        Parameters
        ----------
        name : str
            Hub name, local directory, GGUF file, or the short name of a model that comes as a Python package.
        vocabulary : int, optional
            Tokens of the tokenizer it is to be used with. The embeddings grow where the tokenizer has got a pad token.
        dtype : str
            Type of the weights, as PyTorch names it.

        Raises
        ------
        GradmemError
            When the weights cannot be loaded, or the tokenizer is not that of the model.
        """
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise GradmemError(f"the backbone's dtype is a type of weights like 'float32' or 'bfloat16', not '{dtype}'")
        try:
            model = AutoModelForCausalLM.from_pretrained(pretrained_place(name), dtype=dtype)
        except (OSError, ValueError) as error:
            raise GradmemError(f"cannot load the backbone '{name}': {error}") from error
        if vocabulary is not None:
            _fit(model, vocabulary, name)
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
        return max(1, min(TOKENS_AT_ONCE, ACTIVATIONS // of_token))

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
        return self.model.base_model(
            inputs_embeds=embeds,
            past_key_values=cache,
            use_cache=cache is not None,
            **{name: tensor for name, tensor in given.items() if tensor is not None},
        ).last_hidden_state

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

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Compute with the attention that is fast with its gradient: PyTorch's is not for bfloat16 on a CPU."""
        config = self.model.config
        dropout = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
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


def _fit(model: PreTrainedModel, vocabulary: int, name: str) -> None:
    """Let the embeddings grow by a pad token or so; refuse a tokenizer that is not the model's."""
    known = model.get_input_embeddings().num_embeddings
    # Many models have a few more embeddings than tokens, for round sizes.
    if not SPARE * known <= vocabulary <= known + ADDED:
        raise GradmemError(
            f"the backbone '{name}' knows {known} tokens and the task's tokenizer has {vocabulary}: they do not belong "
            f"together; give the task `tokenizer: {name}`"
        )
    if vocabulary > known:
        model.resize_token_embeddings(vocabulary)


class Prefix:
    """A prefix that has been run, as what follows it needs it.

    Parameters
    ----------
    last : Tensor, shape (batch, d)
        Hidden state that predicts the first token after the prefix; zeros where no position of the prefix does.
    cache : Cache
        Keys and values of the prefix's positions, of which there may be none.
    mask : Tensor, bool, shape (batch, positions), optional
        True at the positions that count; by default all.
    start : Tensor, int64, shape (batch,), optional
        Position of the first token after the prefix. By default the model counts: all positions of the prefix, or,
        where it takes no positions, those of the mask.
    """

    def __init__(self, last: Tensor, cache: Cache, mask: Tensor | None = None, start: Tensor | None = None) -> None:
        self.last = last
        self.cache = cache
        self.mask = mask
        self.start = start

    def select(self, rows: Tensor) -> Prefix:
        """Rows of the prefix, in any order and any number of times; the original stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        mask, start = (None if tensor is None else tensor[rows] for tensor in (self.mask, self.start))
        return Prefix(self.last[rows], cache, mask, start)

    def join(self, others: Sequence[Prefix]) -> Prefix:
        """Rows of this prefix and of others that the same method has run, one after the other.

        Shorter ones are padded at the end, under the mask; the originals stay as they are.
        """
        parts = [self, *others]
        batches, lengths = [len(part.last) for part in parts], [part.length for part in parts]
        cache = copy.copy(self.cache)
        layers = zip(*(part.cache.layers for part in parts), strict=True)
        cache.layers = [_join_layers(same, batches, max(lengths)) for same in layers]
        joined = Prefix(torch.cat([part.last for part in parts]), cache)
        uneven = len(set(lengths)) > 1
        if uneven or any(part.mask is not None for part in parts):
            joined.mask = torch.cat([F.pad(part.seen, (0, max(lengths) - part.length)) for part in parts])
        if uneven or any(part.start is not None for part in parts):
            joined.start = torch.cat([part._begin() for part in parts])
        return joined

    @property
    def seen(self) -> Tensor:
        """The mask, also where all positions count: bool, shape (batch, positions)."""
        every = torch.ones(len(self.last), self.length, dtype=torch.bool, device=self.last.device)
        return every if self.mask is None else self.mask

    def _begin(self) -> Tensor:
        """The start, also where the model would count."""
        return torch.full_like(self.last[:, 0], self.length, dtype=torch.long) if self.start is None else self.start

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for the tokens that follow; subclasses add what they keep besides."""
        layers = [layer for layer in self.cache.layers if layer.get_seq_length()]
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values)) + self.last.nbytes

    def continued(self, length: int) -> dict[str, Tensor]:
        """Mask and positions for `Backbone.hidden` to run `length` tokens after the prefix, where it needs them."""
        given = {}
        if self.mask is not None:
            given["mask"] = F.pad(self.mask, (0, length), value=True)
        if self.start is not None:
            given["positions"] = self.start[:, None] + torch.arange(length, device=self.start.device)
        return given

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the model runs what follows the prefix; subclasses put there what a cache cannot hold."""
        return nullcontext()

    @property
    def length(self) -> int:
        """Prefix positions."""
        return int(self.cache.get_seq_length())


def _join_layers(layers: Sequence[Any], batches: list[int], length: int) -> Any:
    """One layer of several caches as a layer of one cache, each padded with zeros at the end to `length`."""
    filled = [layer for layer in layers if layer.get_seq_length()]
    joined = copy.copy((filled or layers)[0])
    for name in ("keys", "values") if filled else ():
        like = getattr(joined, name)
        rows = like.new_zeros(sum(batches), like.shape[1], length, like.shape[3])
        for part, layer in zip(rows.split(batches), layers, strict=True):
            if layer.get_seq_length():
                part[:, :, : layer.get_seq_length()] = getattr(layer, name)
        setattr(joined, name, rows)
    return joined


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
    longest = max(len(query) for query in queries)
    width = prefix.length + longest
    ids = torch.full((len(queries), width), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    mask[:, : prefix.length] = 1 if prefix.mask is None else prefix.mask
    for row, query in enumerate(queries):
        ids[row, width - len(query) :] = torch.tensor(query, device=device)
        mask[row, width - len(query) :] = 1
    if prefix.start is not None and backbone.takes_positions:
        first = torch.tensor([width - len(query) for query in queries], device=device)
        positions = prefix.start[:, None] + torch.arange(width, device=device) - first[:, None]
        options["position_ids"] = positions.clamp_min(0)
    # Generation repeats ids, mask and positions for beams and sequences, but not a cache that it is given.
    rows = torch.arange(len(queries), device=device).repeat_interleave(copies(options))
    prefix = prefix.select(rows)
    with prefix.active():
        generated = backbone.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=prefix.cache, pad_token_id=pad_id, **options
        )
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    return sequences[:, width:].tolist()


def copies(options: dict[str, Any]) -> int:
    """How many times generation with these options runs each query, for beams and sequences."""
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
