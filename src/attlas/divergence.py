"""Statistics that compare weights p with others, q: lazy ones, or a dense tensor.

    KLDivergence      Σ_j p_ij (log p_ij - log q_ij)
    CrossEntropy     -Σ_j p_ij log q_ij
    TargetCrossEntropy  -Σ_j t_ij log p_ij, for a dense target t

A term is 0 where its first factor is 0, and +inf where only the second weight is 0. An infinite
term is a constant: it has no gradient, and leaves the gradients of the other terms finite. Lazy
others are read block by block beside the weights, from their own query, key and normaliser, which
are operands like any other: gradients reach both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .block_weights import BlockWeights, MeanBlockWeights
from .blocks import Block
from .spec import BoundMask, ScoreSpec, is_bounded
from .statistics import Part, State, Statistic, Sum


class Beside:
    """The weights of another attention call, for the blocks of a statistic.

    Its heads are those of the block or, with `mean`, all of them, whose mean is taken.
    """

    def __init__(self, spec: ScoreSpec, tensors: Sequence[Tensor | None], mean: bool) -> None:
        self.spec, self.mean = spec, mean
        self.biased = tensors[2] is not None
        self.operands = tuple(t for t in tensors if t is not None)  # query, key, bias, normaliser
        axes = ("bhqe", "bhke", *(("bhqk",) if self.biased else ()), "bhqn")
        self.axes = tuple(a.replace("h", ".") for a in axes) if mean else axes
        self.planes = spec.shape.heads if mean else 1

    @cached_property
    def mask(self) -> BoundMask | None:
        """The masks as one."""
        return self.spec.bind()

    @cached_property
    def guarded(self) -> ScoreSpec:
        """The specification for what PyTorch computes."""
        query, key, *bias, _ = self.operands
        return self.spec.guarded(query, key, bias=bias[0] if bias else None)

    def weights_of(self, part: Part) -> BlockWeights:
        """`[b, h, q, k]` (h is 1 with `mean`), computed as those of the part are."""
        query, key, *bias, normaliser = part.operands
        heads = slice(0, self.spec.shape.heads) if self.mean else part.block.heads
        block = part.block._replace(shape=self.spec.shape, heads=heads)
        allowed = None if self.mask is None else self.mask.allowed(block, query.device)
        key = _whole_groups(key, block)
        one = bias[0] if bias else None
        spec = self.spec if part.block_weights.takes_bounds else self.guarded
        values = part.read(spec, query, key, one, allowed, normaliser)
        return MeanBlockWeights(values) if self.mean else values


class DenseBeside:
    """Dense weights `[B or 1, H or 1, L or 1, S or 1]`, for the blocks of a statistic."""

    axes = ("bhqk",)
    planes = 1

    def __init__(self, weights: Tensor) -> None:
        self.operands = (weights,)

    def weights_of(self, part: Part) -> BlockWeights:
        """Those of the block."""
        return DenseBlockWeights(part.operands[0])


class DenseBlockWeights(BlockWeights):
    """The values of a block of dense weights."""

    def __init__(self, weights: Tensor) -> None:
        self._weights, self.device = weights, weights.device

    def _compute_log_weights(self) -> Tensor:
        zero = self.weights == 0  # where a logarithm has no derivative
        return self.weights.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


class CrossEntropy(Sum):
    """-Σ_j p_ij log q_ij, in nats, where q are other weights."""

    def __init__(self, other: Beside | DenseBeside) -> None:
        self.other = other
        self.operands, self.axes, self.planes = other.operands, other.axes, 1 + other.planes

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        return cls(DenseBeside(*operands))  # `attlas.encoding` does the lazy ones

    def of(self, part: Part) -> Tensor:
        return -expected_log(part.weights, self.other.weights_of(part).log_weights).sum(-1)


class KLDivergence(CrossEntropy):
    """Σ_j p_ij (log p_ij - log q_ij), in nats, where q are other weights.

    Summed as Σ_j (p (log p - log q) + q - p), of which no term is below 0, and Σ p - Σ q, which is
    0 where both rows sum to the same but for their rounding. So no divergence of weights that sum
    to 1 is below 0.
    """

    def init(self, block: Block, like: Tensor) -> State:
        return tuple(like.new_zeros(block.sizes("bhq")) for _ in range(3))

    def update(self, state: State, part: Part) -> State:
        others = self.other.weights_of(part)
        log_p, log_q = part.log_weights, others.log_weights
        p, q = part.weights, others.weights
        if is_bounded(log_p, log_q):  # as below, in half the time
            terms = _divergence(p, q, log_q - log_p)
        else:
            lost = (log_q == -math.inf) & (p != 0)
            none = (log_q == -math.inf) | (log_p == -math.inf)
            p = p.masked_fill(lost, 0.0)
            log_p, log_q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 1.0)
            terms = _divergence(p, q, log_q - log_p)  # where one weight is 0: q
            terms = terms + _infinite(lost, terms)
        new = (terms.sum(-1), p.sum(-1), q.expand_as(p).sum(-1))
        return tuple(a + b for a, b in zip(state, new, strict=True))

    def merge(self, a: State, b: State) -> State:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def finalize(self, state: State) -> State:
        terms, of_p, of_q = state
        rest = of_p - of_q
        alike = rest.abs() <= 8 * torch.finfo(rest.dtype).eps * of_p.abs()
        return (terms + (rest - torch.where(alike, rest, 0.0).detach()),)


def _divergence(p: Tensor, q: Tensor, rise: Tensor) -> Tensor:
    """p (log p - log q) + q - p, at least 0, for rise = log q - log p."""
    near = rise.abs() < 0.5
    small = torch.where(near, rise, 0.0)
    return torch.where(near, p * (small.expm1() - small), q - p - p * rise)


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
