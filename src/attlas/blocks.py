"""How a computation over an L x S matrix is cut into blocks that fit a fixed budget.

    [B, H, L, S]  ->  blocks of (batch, heads, queries, keys) slices

A tensor names its axes by letters ("bhqe" for a query, "bhke" for a key, "bhqk" for a
bias), and `take` cuts out of it what a block needs: a dimension of size 1 broadcasts and is
kept, unless the block is empty there; a tensor with fewer heads (grouped-query attention) gives
the heads of that group.
Everything that streams (the forward, the backward, every statistic) uses these two functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

ELEMENTS = 1 << 20  # scores held at a time: 4 MB in fp32, what two cores' L2 caches hold
SPAN = 1 << 13  # keys (or queries) of one step along the axis that is summed away
ROWS = 64  # rows below which a matrix product loses its speed


class Shape(NamedTuple):
    """The sizes of an attention problem."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def empty(self) -> bool:
        """True when the matrix of weights has no element."""
        return 0 in self


class Block(NamedTuple):
    """A rectangle of the weights: slices of batch, query heads, queries and keys."""

    shape: Shape
    batch: slice
    heads: slice
    queries: slice
    keys: slice

    def slice_of(self, axis: str, size: int) -> slice:
        """The slice of an axis ("b", "h", "q" or "k") for a dimension of `size` elements."""
        match axis:
            case "b":
                return self.batch
            case "h":
                group = max(self.shape.heads // max(size, 1), 1)
                return slice(self.heads.start // group, -(-self.heads.stop // group))
            case "q":
                return self.queries
            case _:
                return self.keys

    def sizes(self, axes: str) -> tuple[int, ...]:
        """How many batch items, heads, queries or keys it has, for letters of "bhqk"."""
        parts = (self.slice_of(axis, self.shape.heads) for axis in axes)
        return tuple(part.stop - part.start for part in parts)


def whole(shape: Shape) -> Block:
    """The block that is the whole matrix."""
    return Block(
        shape,
        slice(0, shape.batch),
        slice(0, shape.heads),
        slice(0, shape.queries),
        slice(0, shape.keys),
    )


def take(tensor: Tensor, block: Block, axes: str) -> Tensor:
    """The view of `tensor` that `block` needs; letters other than b, h, q, k stay whole."""
    for dim, axis in enumerate(axes):
        size = tensor.shape[dim]
        if axis in "bhqk":
            part = block.slice_of(axis, size)
            count = part.stop - part.start
            if size != 1 and count != size:
                tensor = tensor.narrow(dim, part.start, count)
            elif count == 0:
                tensor = tensor.narrow(dim, 0, 0)
    return tensor


def split(part: slice, size: int) -> Iterator[slice]:
    """`part` cut into pieces of at most `size`."""
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))


def even(length: int, size: int, multiple: int = 1) -> int:
    """The piece size of a fair cut of `length`: at most `size`, in steps of `multiple`."""
    size = max(size // multiple, 1) * multiple
    pieces = max(-(-length // size), 1)
    return max(-(-length // (pieces * multiple)), 1) * multiple


def blocks(
    shape: Shape,
    axis: str = "q",
    *,
    across: int | None = None,
    multiple: int = 1,
    planes: int = 1,
    whole_heads: bool = False,
) -> Iterator[Block]:
    """Blocks that tile `axis` ("q" or "k") and span the other one, at most ELEMENTS each.

    `across` is how much of the other axis is held at a time (default: all of it), `multiple`
    what the pieces of `axis` are a multiple of, and `planes` how many numbers are held for each
    element; with `whole_heads` each block has every head.
    """
    full, budget = whole(shape), ELEMENTS // planes
    if shape.empty:
        return
    along, other = full.slice_of(axis, 0), shape.keys if axis == "q" else shape.queries
    across = min(other, across or other)
    fits = budget // (across * min(along.stop, ROWS))  # heads held at a time
    batches = max(fits // shape.heads, 1)
    whole_heads = whole_heads or fits >= shape.heads
    heads = shape.heads if whole_heads else max(fits // shape.group, 1) * shape.group
    held = min(batches, shape.batch) * heads
    size = even(along.stop, max(budget // (across * held), 1), multiple)
    for batch in split(full.batch, batches):
        for head in split(full.heads, heads):
            for piece in split(along, size):
                block = full._replace(batch=batch, heads=head)
                yield block._replace(**{"queries" if axis == "q" else "keys": piece})
