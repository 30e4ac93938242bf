"""Statistics of attention weights: each one a monoid over blocks, streamed in O(L) memory.

    init      the statistic of nothing
    update    a state and one block of weights  ->  the state with the block counted
    merge     two states of disjoint blocks     ->  their common state
    finalize  a state                           ->  the result

One law, merge(split(x)) == whole(x), lets the same code stream over keys, split over threads
and merge over machines. A statistic says which axis it `keeps` (one result for each query, or
for each key) and which it `scans`; `stream` does the rest. It differentiates by computing each
block again, in reverse order, so `update` and `finalize` are all the derivative there is to
write. Add your own: subclass `Statistic` (or `Sum`) and call `weights.evaluate(statistic)`.

Example:
    >>> import torch, attlas
    >>> class Gini(attlas.statistics.Sum):  # the chance that two reads meet: Σ p²
    ...     def of(self, part):
    ...         return (part.weights**2).sum(-1)
    >>> q = torch.zeros(1, 1, 2, 4)
    >>> attlas.attention(q, q, q).weights.evaluate(Gini())
    tensor([[[0.5000, 0.5000]]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .block_weights import BlockWeights, MeanBlockWeights
from .blocks import Block
from .checks import FLOATS
from .masks import Positions
from .spec import is_finite, weighted_values

State = tuple[Tensor, ...]


class Part:
    """One block of weights, as `update` sees it.

    Attributes:
        log_weights: `[b, h, q, k]`, the natural log of the weights, -inf where masked.
        weights: `[b, h, q, k]`.
        queries: `[q, 1]`, the positions of its queries among the keys.
        keys: `[k]`, its key positions.
        operands: the slices of the statistic's `operands` for this block.
        block: the rectangle of the matrix that it is.
        offset: the position of query 0 among the keys.
        block_weights: what computes `weights` and `log_weights`.
    """

    def __init__(
        self, block: Block, block_weights: BlockWeights, operands: State, offset: int
    ) -> None:
        self.block, self.block_weights = block, block_weights
        self.operands, self.offset = operands, offset

    @property
    def log_weights(self) -> Tensor:
        return self.block_weights.log_weights

    @property
    def weights(self) -> Tensor:
        return self.block_weights.weights

    def read(self, *slices: Any) -> BlockWeights:
        """The values of a block of other weights, read in the way of these."""
        return self.block_weights.like(*slices)

    @property
    def queries(self) -> Tensor:
        part, device = self.block.queries, self.block_weights.device
        return torch.arange(part.start, part.stop, device=device)[:, None] + self.offset

    @property
    def keys(self) -> Tensor:
        part = self.block.keys
        return torch.arange(part.start, part.stop, device=self.block_weights.device)


class Statistic:
    """A function of attention weights that can be computed block by block.

    Attributes:
        keeps: "q" for one result per query, "k" for one per key.
        scans: "k" or "q", the axis that may be cut; None to be given whole rows.
        multiple: queries per result (`pool`).
        operands: further tensors that blocks read; differentiable.
        axes: for each operand, its axes in letters, as in `blocks.take`.
        queries: the slice of queries that a statistic of keys looks at; None for all.
        skips: False to be given the blocks too that the mask leaves empty.
        whole_heads: True to be given all heads of a block together.
        planes: how many numbers `update` holds for each weight; blocks are that much smaller.
        linear: True where the result for a mean of weights is the mean of their results.
    """

    keeps = "q"
    scans: str | None = "k"
    multiple = 1
    operands: tuple[Tensor, ...] = ()
    axes: tuple[str, ...] = ()
    queries: slice | None = None
    skips = True
    whole_heads = False
    planes = 1
    linear = False

    def init(self, block: Block, like: Tensor) -> State:
        """The state before any block; `like` has the dtype and the device."""
        raise NotImplementedError

    def update(self, state: State, part: Part) -> State:
        """The state with one more block counted."""
        raise NotImplementedError

    def merge(self, a: State, b: State) -> State:
        """The state of two disjoint sets of blocks."""
        raise NotImplementedError

    def finalize(self, state: State) -> State:
        """The results, `[b, h, queries or keys, ...]` each."""
        return state

    def shapes(self, block: Block, like: Tensor) -> list[Tensor]:
        """Results of the right shapes and dtypes, for a block that is the whole matrix."""
        results = list(self.finalize(self.init(block, like)))
        if not results:  # torch.compile leaves its graph then, and calls it in Python
            got, mend = type(self).__name__, "call it with real tensors, outside of the graph"
            rule = "know the shapes of its results to be traced"
            checks.fail(NotImplementedError, "statistic", rule, got, mend)
        return results

    def numbers(self) -> tuple[float, ...] | None:
        """The numbers that, with the operands, make it `again`: first floats, then integers.

        None where they do not do.
        """
        return ()

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        """The statistic of these numbers and operands."""
        return cls(*numbers, *operands)


class Sum(Statistic):
    """A statistic that is a sum over keys (or queries): only `of` is to be written."""

    def of(self, part: Part) -> Tensor:
        """The sum over one block, `[b, h, q]` (or `[b, h, k]`)."""
        raise NotImplementedError

    def init(self, block: Block, like: Tensor) -> State:
        return (like.new_zeros(block.sizes("bh" + self.keeps)),)

    def update(self, state: State, part: Part) -> State:
        return (state[0] + self.of(part),)

    def merge(self, a: State, b: State) -> State:
        return (a[0] + b[0],)


class Entropy(Sum):
    """-Σ_j p_ij log p_ij, in nats."""

    def of(self, part: Part) -> Tensor:
        log = part.log_weights.clamp(min=-1e30)  # 0 * -inf is NaN; the clamp has no gradient there
        return -(part.weights * log).sum(-1)


class MeanDistance(Sum):
    """Σ_j p_ij |i - j|, in keys."""

    linear = True

    def of(self, part: Part) -> Tensor:
        distance = (part.keys - part.queries).abs().to(part.weights.dtype)
        return (part.weights * distance).sum(-1)


class Guided(Sum):
    """Σ_j p_ij c_ij, for a penalty c(batch, head, query, key) of positions."""

    def __init__(self, penalty: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.penalty = penalty

    def numbers(self) -> tuple[int, ...] | None:
        return None

    def of(self, part: Part) -> Tensor:
        with torch.no_grad():
            cost = self.penalty(*Positions.of(part.block, part.log_weights.device)[:4])
        rule, shape = "return a tensor that broadcasts to [b, h, q, k]", part.weights.shape
        if not isinstance(cost, Tensor):
            got, mend = type(cost).__name__, "compute it from the index tensors that it is given"
            checks.fail(TypeError, "penalty", rule, got, mend)
        pairs = zip(reversed(cost.shape), reversed(shape), strict=False)
        if cost.ndim > 4 or not all(size in (1, full) for size, full in pairs):
            mend = f"it is called for a block of {list(shape)}"
            checks.fail(ValueError, "penalty", rule, list(cost.shape), mend)
        cost = cost.to(part.weights.dtype)
        # What is masked is never read: there the penalty may be NaN or inf.
        return (part.weights * torch.where(part.log_weights == -math.inf, 0.0, cost)).sum(-1)


class Mass(Sum):
    """Σ_j p_ij x_j, for x `[B or 1, H or 1, S]`: of 0 and 1, the weight of a set of keys."""

    linear = True
    axes = ("bhk",)

    def __init__(self, x: Tensor) -> None:
        self.operands = (x,)

    def of(self, part: Part) -> Tensor:
        return (part.weights @ part.operands[0].unsqueeze(-1)).squeeze(-1)


class TopK(Statistic):
    """The k largest weights of each row, in falling order, and their keys."""

    def __init__(self, k: int) -> None:
        self.k = k

    def numbers(self) -> tuple[int, ...]:
        return (self.k,)

    def init(self, block: Block, like: Tensor) -> State:
        logs = like.new_full((*block.sizes("bhq"), self.k), -math.inf)
        return logs, torch.zeros_like(logs), torch.full_like(logs, -1, dtype=torch.long)

    def update(self, state: State, part: Part) -> State:
        # Ranked by logarithms: weights that underflow keep their order, masked keys stay -inf.
        count = min(self.k, part.log_weights.shape[-1])
        logs, found = part.log_weights.topk(count, dim=-1)
        keys = found + part.block.keys.start
        return self.merge(state, (logs, part.weights.gather(-1, found), keys))

    def merge(self, a: State, b: State) -> State:
        logs, place = torch.cat([a[0], b[0]], -1).topk(self.k, dim=-1)
        return logs, *(
            torch.cat([x, y], -1).gather(-1, place) for x, y in zip(a[1:], b[1:], strict=True)
        )

    def finalize(self, state: State) -> State:
        logs, weights, keys = state
        return weights, keys.masked_fill(logs == -math.inf, -1)


class Max(TopK):
    """The largest weight of each row, and its key."""

    def __init__(self) -> None:
        super().__init__(1)

    def numbers(self) -> tuple[int, ...]:
        return ()

    def update(self, state: State, part: Part) -> State:
        logs, found = part.log_weights.max(-1, keepdim=True)
        keys = found + part.block.keys.start
        return self.merge(state, (logs, part.weights.gather(-1, found), keys))

    def finalize(self, state: State) -> State:
        values, keys = super().finalize(state)
        return values.squeeze(-1), keys.squeeze(-1)


class Received(Sum):
    """Σ_i w_i p_ij, what each key is given by queries of weight `[1, 1, L]` (None: all 1)."""

    keeps, scans, linear = "k", "q", True
    axes = ("bhq",)

    def __init__(self, queries: slice | None = None, query_weights: Tensor | None = None) -> None:
        self.queries = queries
        self.operands = () if query_weights is None else (query_weights,)

    def numbers(self) -> tuple[int, ...]:
        return () if self.queries is None else (self.queries.start, self.queries.stop)

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        return cls(slice(*numbers) if numbers else None, *operands)

    def of(self, part: Part) -> Tensor:
        if not part.operands:
            return part.weights.sum(-2)
        return (part.weights * part.operands[0].unsqueeze(-1)).sum(-2)


class ReceivedMax(Received):
    """max_i p_ij over queries of a weight other than 0."""

    linear = False

    def update(self, state: State, part: Part) -> State:
        weights = part.weights
        if part.operands:
            weights = weights.masked_fill(part.operands[0].unsqueeze(-1) == 0, 0.0)
        return (torch.maximum(state[0], weights.amax(-2)),)

    def merge(self, a: State, b: State) -> State:
        return (torch.maximum(a[0], b[0]),)


class TransposedProduct(Sum):
    """Σ_i p_ij x_i, weightsᵀ @ x, for x `[B or 1, H or 1, L, D]`."""

    keeps, scans, linear = "k", "q", True
    axes = ("bhqd",)

    def __init__(self, x: Tensor) -> None:
        self.operands = (x,)

    @cached_property
    def guard(self) -> bool:
        """True when NaN or inf in a query must reach the keys that it reads, and no other."""
        return not is_finite(*self.operands)

    def init(self, block: Block, like: Tensor) -> State:
        return (like.new_zeros(*block.sizes("bhk"), self.operands[0].shape[-1]),)

    def of(self, part: Part) -> Tensor:
        return weighted_values(part.weights.mT, part.operands[0], self.guard)


class Pool(Statistic):
    """The maximum or the sum of each cell of (queries, keys) weights."""

    scans = "q"

    def __init__(self, cell: tuple[int, int], how: str) -> None:
        self.cell, self.how, self.multiple = cell, how, cell[0]
        self.linear = how == "mass"

    def numbers(self) -> tuple[int, ...]:
        return (*self.cell, int(self.how == "max"))

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        return cls((numbers[0], numbers[1]), "max" if numbers[2] else "mass")

    def init(self, block: Block, like: Tensor) -> State:
        batch, heads, queries = block.sizes("bhq")
        rows, columns = -(-queries // self.cell[0]), -(-block.shape.keys // self.cell[1])
        return (like.new_zeros(batch, heads, rows, columns),)

    def update(self, state: State, part: Part) -> State:
        sizes = part.weights.shape[2:]
        cell = [min(c, max(n, 1)) for c, n in zip(self.cell, sizes, strict=True)]  # torch's are int
        if self.how == "max":
            cells = F.max_pool2d(part.weights, cell, ceil_mode=True)
        else:
            cells = _sums(_sums(part.weights, cell[1]).mT, cell[0]).mT
        return self.merge(state, (cells,))

    def merge(self, a: State, b: State) -> State:
        return (torch.maximum(a[0], b[0]) if self.how == "max" else a[0] + b[0],)


def _sums(weights: Tensor, size: int) -> Tensor:
    """The sums over `size` neighbours of the last dimension; torch's own pooling rounds more."""
    count = weights.shape[-1] // size
    whole, rest = weights.tensor_split((count * size,), -1)
    sums = whole.unflatten(-1, (count, size)).sum(-1)
    return torch.cat([sums, rest.sum(-1, keepdim=True)], -1) if rest.shape[-1] else sums


class Through(Statistic):
    """A statistic of other weights, that are made of these block by block."""

    def __init__(self, of: Statistic) -> None:
        self.of = of
        self.keeps, self.scans, self.multiple = of.keeps, of.scans, of.multiple
        self.operands, self.axes, self.queries = of.operands, of.axes, of.queries
        self.skips, self.planes, self.whole_heads = of.skips, of.planes, of.whole_heads

    def block(self, block: Block) -> Block:
        """The block of the other weights."""
        return block

    def weights_of(self, part: Part) -> BlockWeights:
        """The other weights of a block, made of these."""
        raise NotImplementedError

    def shapes(self, block: Block, like: Tensor) -> list[Tensor]:
        return self.of.shapes(_one_head(block), like)

    def init(self, block: Block, like: Tensor) -> State:
        return self.of.init(self.block(block), like)

    def update(self, state: State, part: Part) -> State:
        made = Part(self.block(part.block), self.weights_of(part), part.operands, part.offset)
        return self.of.update(state, made)

    def merge(self, a: State, b: State) -> State:
        return self.of.merge(a, b)

    def finalize(self, state: State) -> State:
        return self.of.finalize(state)


class OverHeads(Through):
    """A statistic of the mean of all heads of the weights; its results have one head."""

    def __init__(self, of: Statistic) -> None:
        super().__init__(of)
        self.whole_heads = True

    def block(self, block: Block) -> Block:
        return _one_head(block)

    def weights_of(self, part: Part) -> BlockWeights:
        return MeanBlockWeights(part.block_weights)


def _one_head(block: Block) -> Block:
    shape = block.shape._replace(heads=1, kv_heads=1)
    return block._replace(shape=shape, heads=slice(0, 1))


class Quantile(Statistic):
    """The smallest number of keys that hold a share of the weight of each row."""

    scans = None
    planes = 4  # rows are sorted, with their places, and summed in float64

    def __init__(self, share: float) -> None:
        self.share = share

    def numbers(self) -> tuple[float, ...]:
        return (self.share,)

    def init(self, block: Block, like: Tensor) -> State:
        return (like.new_zeros(block.sizes("bhq"), dtype=torch.long),)

    def update(self, state: State, part: Part) -> State:
        weights = part.weights.detach().sort(-1, descending=True).values
        held = weights.cumsum(-1, dtype=torch.float64)
        total = held[..., -1:].sum(-1, keepdim=True)  # what is held at last; 0 without a key
        # A share that is reached but for the rounding of the weights is reached.
        want = self.share * (1 - 8 * torch.finfo(weights.dtype).eps) * total
        return (((held < want).sum(-1) + 1).masked_fill(total.squeeze(-1) == 0, 0),)


class MapRows(Statistic):
    """fn of whole rows of weights, `[b, h, q, S] -> [b, h, q, ...]`."""

    scans = None

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def numbers(self) -> tuple[int, ...] | None:
        return None

    def init(self, block: Block, like: Tensor) -> State:
        return ()

    def update(self, state: State, part: Part) -> State:
        result = self.fn(part.weights)
        want = part.weights.shape[:3]
        if not isinstance(result, Tensor) or result.shape[:3] != want:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            mend = "map each row on its own and keep the rows"
            checks.fail(ValueError, "fn", f"return a tensor {list(want)} + [...]", got, mend)
        return (result,)


class Dense(MapRows):
    """The weights themselves, `[b, h, q, S]`, in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(lambda rows: rows.to(dtype))
        self.dtype = dtype

    def shapes(self, block: Block, like: Tensor) -> list[Tensor]:
        return [like.new_empty(block.sizes("bhqk"), dtype=self.dtype)]

    def numbers(self) -> tuple[int, ...]:
        return (FLOATS.index(self.dtype),)

    @classmethod
    def again(cls, numbers: Sequence[Any], operands: Sequence[Tensor]) -> Statistic:
        return cls(FLOATS[numbers[0]])
