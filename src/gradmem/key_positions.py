"""Move keys in a language model's cache to other positions, without running the model.

Rotary positions turn pairs of a key's numbers by an angle that grows with the position. Which numbers are pairs, and
how fast each turns, is observed: the model runs a few single tokens at several positions. A single token attends only
to itself, so its hidden states do not depend on its position, and its keys at two positions differ by the rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import GradmemError
from .model_runner import ModelRunner

TOKENS = 4
"""Tokens of a probe."""
POSITIONS = (1, 16, 256, 4096)
"""Positions at which single tokens are observed. Each is a small multiple of the one before, so that its angle says
how many whole turns lie between, and the last one is large, so that the slowest pairs turn."""
SHIFT = 100
"""How far the probe's text is moved to verify the rotation."""
PART = 0.05
"""Largest change with the position that counts as rounding, as a share of the norm."""
ERROR = 0.25
"""Largest error of a verified number and its partner, as a share of their norm: what is not understood is as large as
they are."""


class KeyMover:
    """Move keys of a model's cache from one position to another.

    Parameters
    ----------
    runner : ModelRunner
        A model whose layers all keep keys and values.

    Attributes
    ----------
    kind : str
        "rotary" if keys are rotated by their position; "none" if they carry no position that could be changed, as
        with learned positions, which are part of the hidden states, or with attention that is biased by distance.

    Raises
    ------
    GradmemError
        If keys depend on their position in another way.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.kind = "none"
        self._partners: list[Tensor] = []
        self._frequencies: list[Tensor] = []
        with torch.no_grad(), runner.without_dropout():
            if runner.takes_positions:
                self._observe(runner)
            elif _counted(runner):
                raise _refusal(runner, "accepts no position ids")
            if self.kind == "rotary" and not self._verified(runner):
                raise _refusal(runner, "places keys by more than a rotation")

    def move(self, keys: Tensor, layer: int, offsets: Tensor) -> Tensor:
        """Move keys of one layer.

        Parameters
        ----------
        keys : Tensor, shape (..., entries, width)
            As they are in the cache.
        layer : int
        offsets : Tensor, int64, broadcastable to shape (..., entries)
            New position less the old one.

        Returns
        -------
        Tensor, of the shape of `keys`
            Keys that carry no position are returned as they are.
        """
        if self.kind == "none":
            return keys
        frequency, partner = self._frequencies[layer], self._partners[layer].to(keys.device)
        angles = offsets[..., None].to(frequency) * frequency
        return keys * angles.cos().to(keys) + keys[..., partner] * angles.sin().to(keys)

    def _observe(self, runner: ModelRunner) -> None:
        """Find the pairs and their frequencies in radians per position: of opposite signs for the two of a pair."""
        positions = [0, *(p for p in POSITIONS if p < runner.max_positions)]
        tokens = _tokens(runner).repeat(len(positions), 1, 1)
        places = torch.tensor(positions, device=tokens.device).repeat_interleave(TOKENS)[:, None]
        all_keys, all_values = _keys_and_values(runner, tokens, places)
        # (positions, samples, width): the tokens and heads are samples of the same rotation.
        all_keys = [keys.double().cpu().unflatten(0, (-1, TOKENS)).flatten(1, 3) for keys in all_keys]
        keys_depend = any(map(_differ, all_keys))
        # Values as a whole: rounding may change a small number among them by much.
        values_depend = any(_differ(values.double().cpu().view(len(positions), -1, 1)) for values in all_values)
        if values_depend and not keys_depend:
            raise _refusal(runner, "keeps positions beside its keys")
        if values_depend or not keys_depend:
            return
        self.kind = "rotary"
        for keys in all_keys:
            partner = _partners(keys)
            self._partners.append(partner)
            self._frequencies.append(_frequencies(keys, partner, positions))

    def _verified(self, runner: ModelRunner) -> bool:
        """Whether keys of a short text are, after a move, those of the same text at later positions."""
        shift = min(SHIFT, runner.max_positions - TOKENS)
        text = _tokens(runner).transpose(0, 1)
        start = torch.arange(TOKENS, device=text.device)[None]
        before, after = (_keys_and_values(runner, text, start + offset)[0] for offset in (0, shift))
        for layer, (keys, wanted) in enumerate(zip(before, after, strict=True)):
            wrong = self.move(keys, layer, start.new_tensor(shift)) - wanted
            error, size = (tensor.double().cpu().flatten(0, 2).norm(dim=0) for tensor in (wrong, wanted))
            if bool((error > ERROR * torch.hypot(size, size[self._partners[layer]])).any()):
                return False
        return True


def _counted(runner: ModelRunner) -> bool:
    """Whether the keys of a model that accepts no position ids depend on positions that it counts for itself.

    One token is repeated: in the first layer, its keys are then the same, unless its position is in them. If it is in
    the values too, it is in the hidden states.
    """
    layers = _keys_and_values(runner, _tokens(runner)[:1].expand(-1, TOKENS, -1), None)
    keys, values = (layer[0][0].double().cpu().transpose(0, 1) for layer in layers)
    return _differ(keys) and not _differ(values.reshape(TOKENS, -1, 1))


def _refusal(runner: ModelRunner, why: str) -> GradmemError:
    kind = runner.model.config.model_type
    return GradmemError(f"the keys of '{kind}' cannot be moved to other positions: it {why}")


def _keys_and_values(
    runner: ModelRunner, embeds: Tensor, positions: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer, each of shape (batch, heads, length, width)."""
    cache = runner.new_cache()
    runner.hidden(embeds, cache, positions=positions)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def _tokens(runner: ModelRunner) -> Tensor:
    """Embeddings of a few tokens from all over the vocabulary: shape (TOKENS, 1, d)."""
    count, device = runner.model.get_input_embeddings().weight.shape[0], runner.model.device
    return runner.embed(torch.arange(1, TOKENS + 1, device=device)[:, None] * count // (TOKENS + 1))


def _differ(observed: Tensor) -> bool:
    """Whether a number changes with the position by more than rounding, from numbers (positions, samples, width)."""
    change, size = ((observed - start).flatten(0, 1).norm(dim=0) for start in (observed[:1], 0))
    return bool((change > PART * size).any())


def _partners(keys: Tensor) -> Tensor:
    """Find the index of each number's partner, from keys (positions, samples, width); its own if there is none.

    A rotation keeps the sum of the two squares: what one square gains, the other loses.
    """
    gains = (keys[1:].square() - keys[:1].square()).flatten(0, 1).T.contiguous()
    distances = torch.cdist(gains, -gains, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    partner, own = distances.argmin(1), torch.arange(len(gains))
    return torch.where(partner[partner] == own, partner, own)


def _frequencies(keys: Tensor, partner: Tensor, positions: list[int]) -> Tensor:
    """Compute the angle per position by which each number's pair turns, from keys (positions, samples, width)."""
    # A number as the real part and its partner as the imaginary part turn one way, and the reverse the other way.
    pairs = torch.complex(keys[..., partner], keys)
    angles = (pairs[:1].conj() * pairs).sum(1).angle()
    frequency = torch.zeros(keys.shape[2], dtype=torch.float64)
    for position, angle in zip(positions[1:], angles[1:], strict=True):
        rest = angle - frequency * position
        frequency = frequency + torch.atan2(rest.sin(), rest.cos()) / position
    return frequency.masked_fill(partner == torch.arange(len(partner)), 0)
