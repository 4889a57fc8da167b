"""The predictor head h: Linear(D, H) - LayerNorm - ReLU - Linear(H, D), Xavier initialised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class PredictorHead(nn.Module):
    """Maps mean features [B, D] to predictions [B, D], in float32 (float64 for a float64 policy)."""

    def __init__(self, width: int, hidden_width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden_width, dtype=dtype),
            nn.LayerNorm(hidden_width, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden_width, width, dtype=dtype),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, D]; the input is widened to the head's own dtype first."""
        first = cast("nn.Linear", self.layers[0])
        return cast("Tensor", self.layers(features.to(first.weight.dtype)))
