"""The predictor head h: Linear(D, H) - LayerNorm - ReLU - Linear(H, D), Xavier initialised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class PredictorHead(nn.Module):
    """Maps mean features [B, D] to predictions [B, D], in float32 (float64 for a float64 policy)."""

    def __init__(self, width: int, hidden_width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        first = nn.Linear(width, hidden_width, dtype=dtype)
        last = nn.Linear(hidden_width, width, dtype=dtype)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(first, nn.LayerNorm(hidden_width, dtype=dtype), nn.ReLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        """Return predictions [B, D]; 16-bit features are widened to the head's dtype first."""
        return cast("Tensor", self.layers(features.to(cast("nn.Linear", self.layers[0]).weight.dtype)))
