"""How a statistic is streamed over blocks of the weights, and differentiated.

Blocks tile the axis that the statistic keeps; along the other one its state is carried from
block to block, so at most `blocks.ELEMENTS` weights are held at a time. The backward carries
the gradient of the state through the same blocks in reverse order, and computes each again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_weights import ScoredBlockWeights
from .blocks import ELEMENTS, SPAN, Block, blocks, split, take, whole
from .masks import Bounds
from .spec import BoundMask, ScoreSpec, key_runs
from .statistics import Part, State, Statistic
from .vjp import pull


class Source(NamedTuple):
    """The tensors that blocks read, each with its axes."""

    spec: ScoreSpec  # guarded
    statistic: Statistic
    tensors: Sequence[Tensor | None]  # query, key, bias, normaliser, then the operands
    block_weights: Any = ScoredBlockWeights  # the kind of `BlockWeights` that computes a block

    @classmethod
    def of(
        cls,
        statistic: Statistic,
        spec: ScoreSpec,
        tensors: Sequence[Tensor | None],
        block_weights: Any = ScoredBlockWeights,
    ) -> Source:
        """The source of a statistic."""
        query, key, bias = tensors[:3]
        guarded = spec.guarded(query, key, bias=bias)  # type: ignore[arg-type]
        return cls(guarded, statistic, tensors, block_weights)

    @property
    def axes(self) -> tuple[str, ...]:
        return ("bhqe", "bhke", "bhqk", "bhqn", *self.statistic.axes)

    @property
    def like(self) -> Tensor:
        normaliser = self.tensors[3]
        assert normaliser is not None
        return normaliser.new_empty(())

    def cut(self, block: Block) -> list[Tensor | None]:
        """The slices for one block."""
        pairs = zip(self.tensors, self.axes, strict=False)
        return [None if t is None else take(t, block, axes) for t, axes in pairs]

    def allowed(self, mask: BoundMask | None, block: Block) -> Tensor | Bounds | None:
        """bool, broadcastable to the block, or key intervals; None when all of it is allowed."""
        if mask is not None and mask.bounds.exact and self.block_weights.takes_bounds:
            return mask.within(block)
        return None if mask is None else mask.allowed(block, self.like.device)

    def part(self, block: Block, allowed: Tensor | Bounds | None, slices: Sequence[Any]) -> Part:
        """The weights of one block, from its slices."""
        query, key, bias, normaliser, *operands = slices
        made = self.block_weights(self.spec, query, key, bias, allowed, normaliser)
        return Part(block, made, tuple(operands), self.spec.offset)

    def full(self) -> Block:
        """The block of all that the statistic looks at."""
        block = whole(self.spec.shape)
        rows = self.statistic.queries
        return block if rows is None else block._replace(queries=rows)

    def chunks(self) -> Iterator[Block]:
        """Blocks that tile the axis that the statistic keeps, and span the other one."""
        statistic, shape, full = self.statistic, self.spec.shape, self.full()
        rows = full.queries.stop - full.queries.start
        across = shape.keys if statistic.keeps == "q" else rows
        if statistic.scans is not None and statistic.scans != statistic.keeps:
            across = min(across, SPAN)
        if not rows:
            return
        for chunk in blocks(
            shape,
            statistic.keeps,
            across=across,
            multiple=statistic.multiple,
            planes=statistic.planes,
            whole_heads=statistic.whole_heads,
        ):
            yield chunk._replace(queries=full.queries) if statistic.keeps == "k" else chunk

    def steps(self, chunk: Block, mask: BoundMask | None) -> Iterator[Block]:
        """The blocks of one chunk in order, without those that the mask leaves empty."""
        device = self.like.device
        mask = mask if self.statistic.skips else None
        if self.statistic.scans is None:
            yield chunk
        elif self.statistic.keeps == "k":
            part = chunk if mask is None else mask.query_run(chunk)
            if part is not None:
                for queries in split(part.queries, SPAN):
                    yield part._replace(queries=queries)
        elif self.statistic.scans == "q":
            batch, heads, _, keys = chunk.sizes("bhqk")
            size = max(ELEMENTS // (batch * heads * keys * self.statistic.planes), 1)
            if size >= self.statistic.multiple:
                yield chunk
            else:
                for queries in split(chunk.queries, size):
                    yield chunk._replace(queries=queries)
        else:
            for run in key_runs(mask, chunk, device):
                for keys in split(run.keys, SPAN):
                    yield run._replace(keys=keys)


def stream(
    statistic: Statistic,
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    block_weights: Any = ScoredBlockWeights,
) -> tuple[Tensor, ...]:
    """The statistic, block by block, without a graph."""
    source, mask = Source.of(statistic, spec, tensors, block_weights), spec.bind()
    totals: list[Tensor] = []
    for chunk in source.chunks():
        state = statistic.init(chunk, source.like)
        for block in source.steps(chunk, mask):
            state = statistic.update(
                state, source.part(block, source.allowed(mask, block), source.cut(block))
            )
        results = statistic.finalize(state)
        if not totals:
            totals = [_room(statistic, spec, result) for result in results]
        for total, result in zip(totals, results, strict=True):
            _place(statistic, total, chunk).copy_(result)
    return tuple(totals) if totals else dense(statistic, spec, tensors)


def dense(
    statistic: Statistic, spec: ScoreSpec, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The statistic of the whole matrix as one block: O(L·S), and plain autograd."""
    source = Source.of(statistic, spec, tensors)
    block, mask = source.full(), spec.mask
    allowed = None if mask is None else mask.block(block, source.like.device)
    part = source.part(block, allowed, source.cut(block))
    state = statistic.init(block, source.like)
    if part.weights.numel() or statistic.scans is None:
        state = statistic.update(state, part)
    return statistic.finalize(state)


def stream_backward(
    statistic: Statistic,
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the tensors where wanted: each block is computed again, in reverse."""
    source, mask = Source.of(statistic, spec, tensors), spec.bind()
    places = [i for i, want in enumerate(wanted) if want and tensors[i] is not None]
    totals = {i: torch.zeros_like(tensors[i], dtype=source.like.dtype) for i in places}  # type: ignore[arg-type]
    for chunk in source.chunks():
        steps = list(source.steps(chunk, mask))
        states = [statistic.init(chunk, source.like)]
        for block in steps[:-1]:
            part = source.part(block, source.allowed(mask, block), source.cut(block))
            states.append(statistic.update(states[-1], part))
        flow: list[Tensor | None] = [
            None if g is None else _place(statistic, g, chunk) for g in grads
        ]
        for step, block in reversed(list(enumerate(steps))):
            state, last = states[step], step == len(steps) - 1
            carry = partial(_carry, source, mask, block, places, last)
            leaves = source.cut(block)
            found = pull(carry, (*state, *(leaves[i] for i in places)), flow)
            flow = found[: len(state)]
            for i, grad in zip(places, found[len(state) :], strict=True):
                if grad is not None:
                    take(totals[i], block, source.axes[i]).add_(grad)
    return [
        totals[i].to(t.dtype) if t is not None and i in totals else None
        for i, t in enumerate(tensors)
    ]


def _carry(
    source: Source,
    mask: BoundMask | None,
    block: Block,
    places: list[int],
    last: bool,
    *tensors: Any,
) -> State:
    """One step of a stream, as a function of its state and of the slices at some places."""
    statistic, slices = source.statistic, source.cut(block)
    count = len(tensors) - len(places)
    for place, leaf in zip(places, tensors[count:], strict=True):
        slices[place] = leaf
    state = statistic.update(
        tuple(tensors[:count]), source.part(block, source.allowed(mask, block), slices)
    )
    return statistic.finalize(state) if last else state


def _room(statistic: Statistic, spec: ScoreSpec, result: Tensor) -> Tensor:
    """An empty tensor for all of a result, of which one chunk is given."""
    shape = spec.shape
    length = shape.keys if statistic.keeps == "k" else -(-shape.queries // statistic.multiple)
    heads = result.shape[1] if statistic.whole_heads else shape.heads
    return result.new_empty(shape.batch, heads, length, *result.shape[3:])


def _place(statistic: Statistic, total: Tensor, chunk: Block) -> Tensor:
    """The part of a result that one chunk gives."""
    kept = chunk.keys if statistic.keeps == "k" else chunk.queries
    first = kept.start // statistic.multiple
    last = -(-kept.stop // statistic.multiple)
    return total[chunk.batch, chunk.heads, first:last]
