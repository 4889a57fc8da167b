"""The predictor head, and the siamese network: an exponential moving average of adapters and head over the shared base.

Note that averaging the LoRA factors A and B is not averaging the product BA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from popo_lite.errors import CheckpointError, PopoError


class PredictorHead(nn.Module):
    """h: Linear(D, H) - LayerNorm - ReLU - Linear(H, D), Xavier initialised.

    Maps mean features [B, D] to predictions [B, D], in float32 (float64 for a float64 policy).
    """

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


class Siamese:
    """xi <- tau * xi + (1 - tau) * theta over `parameters` (adapters and predictor head), kept in float32.

    A 16-bit average would freeze: an update of (1 - tau) times a small step is below its resolution.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], tau: float) -> None:
        if narrow := [name for name, p in parameters if p.dtype not in (torch.float32, torch.float64)]:
            raise PopoError(
                f"the siamese averages float32 weights; {narrow[0]} and {len(narrow) - 1} others are narrower"
            )
        self.tau = tau
        self._names = [name for name, _ in parameters]
        self._live = [parameter for _, parameter in parameters]
        self._average = [parameter.detach().clone() for parameter in self._live]
        self._largest_update = 0.0
        self._swapped = False

    @property
    def extra_bytes(self) -> int:
        """Bytes that the siamese adds to the policy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._average)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the policy's modules hold the averaged weights. Pointers are exchanged and nothing is copied.

        Restored even when an exception passes through. Not to be entered while a graph over the weights is alive.
        """
        if self._swapped:
            raise PopoError("the siamese weights are swapped in already")
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self._swapped = not self._swapped
        for index, parameter in enumerate(self._live):
            parameter.data, self._average[index] = self._average[index], parameter.data

    @torch.no_grad()
    def update(self, update_norm: float) -> None:
        """Move the average after an optimizer step that changed the weights by `update_norm` (global L2 norm)."""
        if self._swapped:
            raise PopoError("the siamese cannot be updated while its weights are swapped in")
        torch._foreach_lerp_(self._average, [p.detach() for p in self._live], 1.0 - self.tau)
        self._largest_update = max(self._largest_update, update_norm)

    @torch.no_grad()
    def drift(self) -> float:
        """||theta - xi||, global L2 norm over all averaged weights."""
        differences = torch._foreach_sub([p.detach() for p in self._live], self._average)
        return float(torch.stack(torch._foreach_norm(differences)).double().norm())

    def drift_bound(self) -> float:
        """Lemma 3.2: drift <= tau * (largest update norm so far) / (1 - tau), for any optimizer."""
        return self.tau * self._largest_update / (1.0 - self.tau)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(averaged tensors by name, scalars): what a checkpoint keeps."""
        return dict(zip(self._names, self._average, strict=True)), {"largest_update": self._largest_update}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Restore `state`. Raises CheckpointError where names or shapes are not those of this policy."""
        for name, average in zip(self._names, self._average, strict=True):
            if name not in tensors or tensors[name].shape != average.shape:
                raise CheckpointError(f"the checkpoint's siamese has no tensor {name} of shape {tuple(average.shape)}")
            average.copy_(tensors[name])
        self._largest_update = scalars["largest_update"]
