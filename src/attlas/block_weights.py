"""The weights of one block and their logarithms, computed when they are looked at.

    weights = exp(score - m) / l        log_weights = score - m - log l

A statistic sees a block through these. In PyTorch they are `ScoredBlockWeights`; a kernel may
have its own, so that the score that is read is the score that was summed, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .spec import ScoreSpec, finite, log_weights, normalised


class BlockWeights:
    """The weights of one block and their logarithms, each computed when it is first looked at."""

    device: torch.device
    takes_bounds = False  # whether masks may come as `Bounds`, and what is masked is never read
    _weights: Tensor | None = None
    _log_weights: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """`[b, h, q, k]`, 0 where masked."""
        if self._weights is None:
            self._weights = self._compute_weights()
        return self._weights

    @property
    def log_weights(self) -> Tensor:
        """`[b, h, q, k]`, natural log, -inf where masked."""
        if self._log_weights is None:
            self._log_weights = self._compute_log_weights()
        return self._log_weights

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The weights in the dtype of query."""
        return self.weights.to(dtype)

    def like(self, *slices: Any) -> BlockWeights:
        """A block of other weights, from its slices, computed in the same way."""
        raise NotImplementedError

    def _compute_weights(self) -> Tensor:
        raise NotImplementedError

    def _compute_log_weights(self) -> Tensor:
        raise NotImplementedError


class ScoredBlockWeights(BlockWeights):
    """One block in PyTorch, from its slices of the tensors of a call."""

    def __init__(
        self,
        spec: ScoreSpec,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
        normaliser: Tensor,
    ) -> None:
        self.device, self.normaliser = query.device, normaliser
        self.centred = spec.centred(query, key, bias, allowed, normaliser)

    def like(self, *slices: Any) -> BlockWeights:
        return ScoredBlockWeights(*slices)

    def _compute_weights(self) -> Tensor:
        return normalised(self.centred, self.normaliser)

    def _compute_log_weights(self) -> Tensor:
        return log_weights(self.centred, self.normaliser)


class MeanBlockWeights(BlockWeights):
    """The mean over heads of the weights of a block."""

    def __init__(self, of: BlockWeights) -> None:
        self.of, self.device, self.like = of, of.device, of.like

    def _compute_weights(self) -> Tensor:
        mean = mean_of(head.unsqueeze(1) for head in self.of.weights.unbind(1))
        return mean.masked_fill(mean == 0, 0.0)  # where nothing is read no gradient comes back

    def _compute_log_weights(self) -> Tensor:
        return log_mean(self.of.log_weights)


def mean_of(heads: Iterable[Tensor]) -> Tensor:
    """The mean of some heads, added one after the other: the same bits for blocks of any size."""
    total, count = None, 0
    for plane in heads:
        total, count = plane if total is None else total + plane, count + 1
    assert total is not None
    return total / count


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean of exp(log_weights) over heads, `[b, 1, q, k]`; -inf, without NaN, stays."""
    largest = log_weights.detach().amax(1, keepdim=True)
    total = (log_weights - finite(largest)).exp().mean(1, keepdim=True)
    empty = total == 0  # elsewhere it is 1 / heads at least
    return total.masked_fill(empty, 1.0).log().masked_fill(empty, -math.inf) + finite(largest)
