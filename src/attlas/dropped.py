"""The weights after dropout, as lazy as those before it.

    dropped[i, j] = weights[i, j] * keep[i, j] / (1 - p)

What was dropped is drawn again from the seed of the call, where it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, indexing
from .block_weights import BlockWeights
from .blocks import Shape, whole
from .divergence import Beside
from .dropout import Dropout
from .matrix import LazyMatrix
from .statistics import Part, Statistic, Through

if TYPE_CHECKING:
    from .weights import AttentionWeights


@dataclass(frozen=True, eq=False, repr=False)
class DroppedWeights(LazyMatrix):
    """What a call of `attention` with dropout multiplied with the values; `weights.dropped`.

    It has indexing, `@`, `.T @`, `to_dense()` and `evaluate(statistic)`, all with gradients. Rows
    sum to 1 in the mean only, so the readouts of distributions are left to the weights.
    """

    weights: AttentionWeights
    dropout: Dropout

    @property
    def lead(self) -> tuple[int, ...]:  # type: ignore[override]
        """The dimensions before L and S."""
        return self.weights.lead

    @property
    def _sizes(self) -> Shape:
        return self.weights._sizes

    @property
    def _like(self) -> Tensor:
        return self.weights._like

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weights, that of query."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        """The device of query."""
        return self.weights.device

    def keep(self) -> Tensor:
        """True where a weight is kept, as a dense bool tensor; allocates L x S."""
        return self.weights._lead(self.dropout.keep(whole(self._sizes)))

    def to_dense(self) -> Tensor:
        """All the dropped weights as a tensor; allocates L x S."""
        return self.dropout.apply(self.weights.to_dense(), self.keep())

    def evaluate(self, statistic: Statistic) -> Any:
        """A statistic of the dropped weights; see `attlas.statistics`."""
        return self.weights.evaluate(Dropped(statistic, self.dropout))

    def _results(self, statistic: Statistic) -> tuple[Tensor, ...]:
        """The results of a statistic, `[B, H, ...]` each."""
        return self.weights._results(Dropped(statistic, self.dropout))

    def __matmul__(self, x: Any) -> Tensor:
        """dropped @ x, `[..., L, D]`, for x `[S]`, `[S, D]` or with leading dimensions."""
        if self.dropout.heads is not None:
            mend = "multiply before select_heads, or write dropped.to_dense() @ x"
            checks.fail(NotImplementedError, "dropped", "have all heads", "some of them", mend)
        return self.weights._product(x, self.dropout)

    def _read(self, index: Any, kind: indexing.Kind = "weights") -> Tensor:
        full = indexing.expand(index, self.shape)
        at = torch.meshgrid(*map(self._positions, self.shape), indexing="ij")  # views, not copies
        *lead, q, k = (positions[full] for positions in at)
        b, h = (*lead, torch.zeros_like(q), torch.zeros_like(q))[:2]
        return self.dropout.apply(self.weights._read(index), self.dropout.keep_at(b, h, q, k))

    def _positions(self, size: int) -> Tensor:
        return torch.arange(size, device=self.device)

    def _beside(self) -> Beside:
        mend = "pass the weights before dropout, dropped.weights"
        checks.fail(TypeError, "other", "be weights whose rows sum to 1", "dropped ones", mend)


class Dropped(Through):
    """A statistic of the weights after dropout."""

    def __init__(self, of: Statistic, dropout: Dropout) -> None:
        super().__init__(of)
        self.dropout = dropout

    def weights_of(self, part: Part) -> BlockWeights:
        return DroppedBlockWeights(part.block_weights, self.dropout, self.dropout.keep(part.block))


class DroppedBlockWeights(BlockWeights):
    """What dropout leaves of the values of a block."""

    def __init__(self, of: BlockWeights, dropout: Dropout, keep: Tensor) -> None:
        self.of, self.dropout, self.keep = of, dropout, keep
        self.device, self.like = of.device, of.like

    def _compute_weights(self) -> Tensor:
        return self.dropout.apply(self.of.weights, self.keep)

    def _compute_log_weights(self) -> Tensor:
        kept = self.of.log_weights + math.log(self.dropout.scale or 1.0)
        return kept.masked_fill(~self.keep, -math.inf)
