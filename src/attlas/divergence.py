"""Statistics that compare weights p with others, q: lazy ones, or a dense tensor.

    KLDivergence      Σ_j p_ij (log p_ij - log q_ij)
    CrossEntropy     -Σ_j p_ij log q_ij
    TargetCrossEntropy  -Σ_j t_ij log p_ij, for a dense target t

A term is 0 where its first factor is 0, and +inf where only the second weight is 0. An infinite
term is a constant: it has no gradient, and leaves the gradients of the other terms finite. Lazy
others are read block by block beside the weights, from their own query, key and lse, which are
operands like any other: gradients reach both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .blocks import Block
from .spec import BoundMask, ScoreSpec, is_bounded
from .statistics import Part, Statistic, Sum, log_mean


class Beside:
    """The log weights of another attention call, for the blocks of a statistic.

    Its heads are those of the block or, with `mean`, all of them, whose mean is taken.
    """

    def __init__(self, spec: ScoreSpec, tensors: Sequence[Tensor | None], mean: bool) -> None:
        self.spec, self.mean = spec, mean
        self.biased = tensors[2] is not None
        self.operands = tuple(t for t in tensors if t is not None)  # query, key, bias, lse
        axes = ("bhqe", "bhke", *(("bhqk",) if self.biased else ()), "bhq")
        self.axes = tuple(a.replace("h", ".") for a in axes) if mean else axes
        self.planes = spec.shape.heads if mean else 1

    @cached_property
    def mask(self) -> BoundMask | None:
        """The masks as one."""
        return self.spec.bind()

    def log_weights(self, part: Part) -> Tensor:
        """`[b, h, q, k]` (h is 1 with `mean`), -inf where masked."""
        query, key, *bias, lse = part.operands
        heads = slice(0, self.spec.shape.heads) if self.mean else part.block.heads
        block = part.block._replace(shape=self.spec.shape, heads=heads)
        allowed = None if self.mask is None else self.mask.allowed(block, query.device)
        key = _whole_groups(key, block)
        scores = self.spec.scores(query, key, bias[0] if bias else None, allowed, lse)
        return log_mean(scores) if self.mean else scores


class DenseBeside:
    """The logarithm of dense weights `[B or 1, H or 1, L or 1, S or 1]`."""

    axes = ("bhqk",)
    planes = 1

    def __init__(self, weights: Tensor) -> None:
        self.operands = (weights,)

    def log_weights(self, part: Part) -> Tensor:
        weights = part.operands[0]
        zero = weights == 0  # where a logarithm has no derivative
        return weights.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


class CrossEntropy(Sum):
    """-Σ_j p_ij log q_ij, in nats, where q are other weights."""

    def __init__(self, other: Beside | DenseBeside) -> None:
        self.other = other
        self.operands, self.axes, self.planes = other.operands, other.axes, 1 + other.planes

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        return cls(DenseBeside(*operands))  # `attlas.encoding` does the lazy ones

    def of(self, part: Part) -> Tensor:
        return -expected_log(part.weights, self.other.log_weights(part)).sum(-1)


class KLDivergence(CrossEntropy):
    """Σ_j p_ij (log p_ij - log q_ij), in nats, where q are other weights."""

    def of(self, part: Part) -> Tensor:
        log_p, log_q = part.log_weights, self.other.log_weights(part)
        if is_bounded(log_p, log_q):  # as below, in half the time
            return (part.weights * (log_p - log_q)).sum(-1)
        lost = (log_q == -math.inf) & (part.weights != 0)
        ratio = log_p.clamp(min=-1e30) - log_q.masked_fill(log_q == -math.inf, 0.0)
        return (part.weights.masked_fill(lost, 0.0) * ratio + _infinite(lost, ratio)).sum(-1)


class TargetCrossEntropy(Sum):
    """-Σ_j t_ij log p_ij, in nats, for dense t `[B or 1, H or 1, L or 1, S or 1]`."""

    axes = ("bhqk",)
    skips = False  # a target where every weight of a block is 0 is infinite

    def __init__(self, target: Tensor) -> None:
        self.operands = (target,)

    def of(self, part: Part) -> Tensor:
        return -expected_log(part.operands[0], part.log_weights).sum(-1)


def expected_log(weights: Tensor, log_others: Tensor) -> Tensor:
    """Each w log q: 0 where w is 0, and -inf, a constant, where only q is 0."""
    if is_bounded(log_others):  # as below, in half the time
        return weights * log_others
    zero = log_others == -math.inf
    lost = zero & (weights != 0)
    return weights * log_others.masked_fill(zero, 0.0) - _infinite(lost, log_others)


def _infinite(where: Tensor, like: Tensor) -> Tensor:
    return torch.where(where, math.inf, 0.0).to(like.dtype)


def _whole_groups(key: Tensor, block: Block) -> Tensor:
    """The key, with a head for each of the block's where these are no whole groups."""
    group = block.shape.group
    first, last = block.heads.start, block.heads.stop
    if group == 1 or not (first % group or last % group):
        return key
    start = first // group * group
    return key.repeat_interleave(group, dim=1)[:, first - start : last - start]
