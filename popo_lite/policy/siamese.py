"""The predictor head, and the siamese network: a moving average of only the trainable weights, over the shared base.

The average of the LoRA factors A and B is not the average of the product BA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from popo_lite.errors import PopoError


class PredictorHead(nn.Module):
    """h = Linear(D, H) - LayerNorm - ReLU - Linear(H, D), Xavier initialised.

    Maps mean features [B, D] to predictions [B, D], in float32 (float64 for a float64 policy).
    """

    def __init__(self, width: int, hidden_width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        first, last = nn.Linear(width, hidden_width, dtype=dtype), nn.Linear(hidden_width, width, dtype=dtype)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(first, nn.LayerNorm(hidden_width, dtype=dtype), nn.ReLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        """Return predictions [B, D]; 16-bit features are widened to the head's dtype first."""
        return cast("Tensor", self.layers(features.to(next(self.parameters()).dtype)))


class Siamese:
    """The float32 average xi <- tau * xi + (1 - tau) * theta of `parameters` (adapters and predictor head).

    A 16-bit average would freeze: (1 - tau) times a small step is below its resolution. `average` holds xi by name,
    `largest_update` the largest update norm so far.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], tau: float) -> None:
        if narrow := [name for name, p in parameters if p.dtype not in (torch.float32, torch.float64)]:
            raise PopoError(f"the siamese needs float32 weights; {narrow[0]} and {len(narrow) - 1} others are narrower")
        self.tau = tau
        self._live: dict[str, Tensor] = dict(parameters)
        self.average = {name: parameter.detach().clone() for name, parameter in parameters}
        self.largest_update, self._swapped = 0.0, False

    @property
    def extra_bytes(self) -> int:
        """Bytes that the siamese needs in addition to the policy."""
        return sum(tensor.nbytes for tensor in self.average.values())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the policy's modules for the block, by exchanging pointers without a copy.

        The weights are restored after an exception too. Do not enter while an autograd graph over the weights exists.
        """
        if self._swapped:
            raise PopoError("the siamese weights are swapped in already")

        def exchange() -> None:
            self._swapped = not self._swapped
            for name, parameter in self._live.items():
                parameter.data, self.average[name] = self.average[name], parameter.data

        exchange()
        try:
            yield
        finally:
            exchange()

    @torch.no_grad()
    def update(self, update_norm: float) -> None:
        """Move the average after an optimizer step that changed the weights by `update_norm` (global L2 norm)."""
        if self._swapped:
            raise PopoError("the siamese cannot be updated while its weights are swapped in")
        torch._foreach_lerp_(list(self.average.values()), list(self._live.values()), 1.0 - self.tau)
        self.largest_update = max(self.largest_update, update_norm)

    @torch.no_grad()
    def drift(self) -> float:
        """Return ||theta - xi||, the global L2 norm over all averaged weights."""
        differences = torch._foreach_sub(list(self._live.values()), list(self.average.values()))
        return float(torch.stack(torch._foreach_norm(differences)).double().norm())

    def drift_bound(self) -> float:
        """Return the bound of Lemma 3.2 on the drift: tau * largest_update / (1 - tau)."""
        return self.tau * self.largest_update / (1.0 - self.tau)

    def load_state(self, average: Mapping[str, Tensor], largest_update: float) -> None:
        """Restore both attributes. Raises KeyError or ValueError if names or shapes are not those of this policy."""
        for name, tensor in self.average.items():
            if average[name].shape != tensor.shape:
                raise ValueError(f"{name} of the siamese has the shape {tuple(average[name].shape)}")
            tensor.copy_(average[name])
        self.largest_update = largest_update
