"""A learned write loss, in place of that of reconstructing the context."""

from __future__ import annotations

from torch import Tensor, nn

from ...backbone import Backbone


class Energy(nn.Module):
    """An energy of every context token, computed from its last hidden state; it may be negative.

    Parameters
    ----------
    backbone : Backbone
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.width
        self.ln = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.to(backbone.model.get_input_embeddings().weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, length, d) -> energies (batch, length)."""
        energies: Tensor = self.head(self.ln(hidden))[..., 0]
        return energies
