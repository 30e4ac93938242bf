"""The mean of all heads of the weights, as lazy as they are.

    mean[i, j] = (1 / H) Σ_h weights[h, i, j]

What is asked of the mean is not the mean of what is asked of the heads: its entropy is that of
the mixture. So a block holds all heads, and its statistic sees their mean. What is linear in the
weights, products and indices are averaged over heads when they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import indexing
from .blocks import Shape
from .comparisons import Comparisons
from .divergence import Beside
from .readouts import Readouts
from .spectrum import Spectrum
from .statistics import OverHeads, Statistic

if TYPE_CHECKING:
    from .weights import AttentionWeights


@dataclass(frozen=True, eq=False, repr=False)
class HeadMean(Readouts, Comparisons, Spectrum):
    """The mean over heads of lazy weights, `[B, L, S]`; `weights.head_mean()` makes one.

    It has every readout of `AttentionWeights`, with `[B, L]` where they have `[B, H, L]`.
    """

    weights: AttentionWeights  # [B, H, L, S]

    @property
    def lead(self) -> tuple[int, ...]:  # type: ignore[override]
        """The dimensions before L and S."""
        return self.weights.lead[:1]

    @property
    def _sizes(self) -> Shape:
        return self.weights._sizes._replace(heads=1, kv_heads=1)

    @property
    def _like(self) -> Tensor:
        return self.weights._like

    @property
    def _sums_to_one(self) -> bool:
        return self.weights._sums_to_one

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense mean, that of query."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """The device of query."""
        return self.weights.device

    @property
    def requires_grad(self) -> bool:
        """True when a readout may have a gradient."""
        return self.weights.requires_grad

    def detach(self) -> HeadMean:
        """The same mean without gradients."""
        return HeadMean(self.weights.detach())

    def sink_mass(self) -> Tensor:
        """The mean over heads of the weight that the sink logits take, `[B, L]`."""
        return self.weights.sink_mass().mean(1)

    def evaluate(self, statistic: Statistic) -> Any:
        """A statistic of the mean of the heads; see `attlas.statistics`."""
        if statistic.linear:
            shaped = tuple(r.mean(1) for r in self.weights._results(statistic))
        else:
            shaped = tuple(self._lead(r) for r in self.weights._results(OverHeads(statistic)))
        return shaped[0] if len(shaped) == 1 else shaped

    def _within(self, left: int | None, right: int | None) -> HeadMean:
        return HeadMean(self.weights._within(left, right))

    def __matmul__(self, x: Any) -> Tensor:
        """mean @ x, `[B, L, D]`, for x `[S]`, `[S, D]` or `[B, S, D]`."""
        x, vector = self._operand(x, self._sizes.keys, "S")
        result = self.weights.__matmul__(x).mean(1)  # torch.compile swaps the sides of @
        return result.squeeze(-1) if vector else result

    def _transposed_matmul(self, x: Any) -> Tensor:
        x, vector = self._operand(x, self._sizes.queries, "L")
        result = self.weights._transposed_matmul(x).mean(1)
        return result.squeeze(-1) if vector else result

    def _read(self, index: Any, kind: indexing.Kind = "weights") -> Tensor:
        full = indexing.expand(index, self.shape)
        return indexing.read(full, self.shape, self.weights._matrix(), kind=kind, mean=True)

    def _beside(self) -> Beside:
        return Beside(self.weights.spec, self.weights._tensors, mean=True)
