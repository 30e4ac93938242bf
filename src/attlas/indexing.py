"""Exact indexing of weights that are not there: `read(index)` equals `dense[index]`.

Where the native kernels compute the weights, it does so bit for bit: a weight is the same number
whatever is read beside it. In plain PyTorch products of other sizes may be rounded otherwise.

An index is turned into what it selects along each of [B, H, L, S], the weights of that
selection are computed, and PyTorch's own indexing of the small result gives the layout. Index
tensors that are paired, `weights[0, 0, i, j]`, are read pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .block_weights import log_mean, mean_of
from .blocks import ELEMENTS, split
from .masks import Bounds, Positions
from .spec import ScoreSpec, full_precision, is_traced

Kind = Literal["weights", "logs", "rounded"]
Selection = slice | range | Tensor  # a slice of step 1, a range of another, or positions


class Matrix(NamedTuple):
    """What an index reads: the tensors of the weights, and what computes a block of them."""

    spec: ScoreSpec
    query: Tensor
    key: Tensor
    bias: Tensor | None
    normaliser: Tensor
    block_weights: Any  # a kind of `BlockWeights`, or what makes one


def expand(index: Any, shape: Sequence[int]) -> tuple[Any, ...]:
    """The index as one entry per dimension (int, slice, or 1-D+ int64 tensor), and Nones.

    Raises:
        IndexError: too many indices, a position out of range, a bool tensor of another size.
        TypeError: an index of another kind.
    """
    items = [_tensor(item) for item in (index if isinstance(index, tuple) else (index,))]
    used = sum(
        item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        for item in items
        if item is not None and item is not Ellipsis
    )
    if used > len(shape):
        raise IndexError(
            f"index must have at most {len(shape)} entries, got {used}; "
            f"weights have the dimensions {list(shape)}"
        )
    if sum(item is Ellipsis for item in items) > 1:
        raise IndexError("index must have at most one ..., got more; write slices for the others")
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    result: list[Any] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            result += [slice(None)] * (len(shape) - used)
            dim += len(shape) - used
        elif isinstance(item, Tensor) and item.dtype == torch.bool:
            if item.shape != tuple(shape[dim : dim + item.ndim]):
                raise IndexError(
                    f"index must have the shape {list(shape[dim : dim + item.ndim])} where it is "
                    f"bool, got {list(item.shape)}; use positions instead"
                )
            result += item.nonzero(as_tuple=True)
            dim += item.ndim
        else:
            result.append(item if item is None else _in_range(item, shape[dim], dim))
            dim += item is not None
    return tuple(result)


@full_precision
def read(
    index: tuple[Any, ...],
    shape: Sequence[int],
    matrix: Matrix,
    *,
    kind: Kind = "weights",
    mean: bool = False,
) -> Tensor:
    """The weights at an expanded index; differentiable.

    As `kind` they are "weights" or "logs", their logarithms, in the accumulation dtype, or
    "rounded", in the dtype of query; with `mean` those of the mean of the heads, which `shape` and
    the index then leave out.
    """
    device = matrix.query.device
    entries = [item for item in index if item is not None]
    paired = [d for d, item in enumerate(entries) if isinstance(item, Tensor)]
    picks: list[Selection] = []
    layout: list[Any] = []
    for item, size in zip(entries, shape, strict=True):
        if isinstance(item, Tensor):
            picks.append(item.flatten())
            layout.append(torch.arange(item.numel(), device=device).view(item.shape))
        elif isinstance(item, int | torch.SymInt):
            picks.append(slice(item, item + 1))
            layout.append(0)
        else:
            picks.append(_range(item, size))
            layout.append(slice(None))
    lead = 4 - len(shape)
    if lead:  # [L, S] has neither batch nor heads, [B, L, S] has no heads
        picks = [*picks[:-2], *[slice(0, 1)] * lead, *picks[-2:]]
    grid = True
    if len(paired) > 1:
        together = torch.broadcast_tensors(*(entries[d] for d in paired))
        count = together[0].numel()
        for d, item in zip(paired, together, strict=True):
            picks[d + lead * (d >= len(shape) - 2)] = item.reshape(-1)
            layout[d] = torch.zeros_like(item)
        layout[paired[0]] = torch.arange(count, device=device).view(together[0].shape)
        grid = False
    values = _grid if grid else _pairs
    if not mean:
        weights = values(matrix, picks, kind)
    else:
        heads = (slice(h, h + 1) for h in range(matrix.spec.shape.heads))
        some = "logs" if kind == "logs" else "weights"
        planes = (values(matrix, [picks[0], one, *picks[2:]], some) for one in heads)
        # Without logarithms one head at a time.
        weights = log_mean(torch.cat(list(planes), dim=1)) if kind == "logs" else mean_of(planes)
        weights = weights.to(matrix.query.dtype) if kind == "rounded" else weights
    if lead:
        weights = weights.reshape(*weights.shape[: 2 - lead], *weights.shape[2:])
    full = iter(layout)
    return weights[tuple(None if item is None else next(full) for item in index)]


def _range(item: slice, size: int) -> Selection:
    """A slice within the size: itself where its step is 1, or a range."""
    if item == slice(None):  # whose `indices` would fix a symbolic size
        return slice(0, size)
    start, stop, step = item.indices(size)
    if step == 1:
        return slice(start, max(stop, start))
    return range(start, max(stop, start), step)


def _tensor(item: Any) -> Any:
    """Lists, ranges and arrays as tensors; the rest as it is."""
    if item is None or item is Ellipsis or isinstance(item, slice | Tensor):
        if isinstance(item, Tensor):
            kinds = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
            if item.dtype not in kinds:
                mend = "convert it with index.long()"
                checks.fail(TypeError, "an index tensor", "be integer or bool", item.dtype, mend)
            if item.ndim == 0 and item.dtype == torch.bool:
                mend = "write None for a dimension of size 1"
                checks.fail(TypeError, "a bool index", "have a dimension", "one value", mend)
            if item.ndim == 0:
                return int(item)  # as torch does: one position, not a list of one
            return item if item.dtype == torch.bool else item.long()
        return item
    if isinstance(item, list | range) or getattr(item, "ndim", 0):
        found = torch.as_tensor(list(item) if isinstance(item, range) else item, device="cpu")
        return _tensor(found if found.numel() else found.long())
    if hasattr(item, "__index__") and not isinstance(item, bool):
        return int(item)
    mend = "use ints, slices, ..., None, or integer and bool tensors"
    checks.fail(TypeError, "index", "be a valid index", type(item).__name__, mend)


def _in_range(item: Any, size: int, dim: int) -> Any:
    """The int or index tensor with negative positions counted from the end."""
    if isinstance(item, slice):
        if item.step is not None and item.step < 1:
            mend = "flip the result instead"
            checks.fail(ValueError, "a slice", "have a positive step", item.step, mend)
        return item
    low, high = (item, item) if isinstance(item, int) else (0, -1)
    if isinstance(item, Tensor):
        rule = f"lie within dimension {dim}"
        if not checks.later("index", rule, (item >= -size) & (item < size)) and item.numel():
            low, high = int(item.min()), int(item.max())
    if low < -size or high >= size:
        wrong = low if low < -size else high
        raise IndexError(
            f"index must be from {-size} to {size - 1} in dimension {dim}, got {wrong}; "
            "check it against weights.shape"
        )
    if isinstance(item, int):
        return item + size if item < 0 else item
    return torch.where(item < 0, item + size, item)


def _grid(matrix: Matrix, picks: Sequence[Selection], kind: Kind) -> Tensor:
    """The weights where selected rows and columns cross, `[b, h, q, k]`, or their logarithms."""
    spec, shape = matrix.spec, matrix.spec.shape
    columns = picks[3]
    keys = _select(matrix.key, (picks[0], _key_heads(picks[1], shape.group), columns))
    normaliser = _select(matrix.normaliser, picks[:3])
    queries = _select(matrix.query, picks[:3])
    bias = None if matrix.bias is None else _select(matrix.bias, picks)
    allowed = None
    if spec.masks:
        bound = spec.bind() if _takes_bounds(matrix) else None
        if bound is not None and bound.bounds.exact and isinstance(columns, slice):
            start, stop = (_select(end, picks[:3]) for end in bound.bounds[:2])
            allowed = Bounds(start - columns.start, stop - columns.start, True)
        else:
            at = [_positions(pick, queries.device) for pick in picks]
            b, h, q, k = (p.view([-1 if i == d else 1 for i in range(4)]) for d, p in enumerate(at))
            allowed = _allowed(spec, Positions(b, h, q, k, shape))
    return _values(matrix, queries, keys, bias, allowed, normaliser, kind)


def _pairs(matrix: Matrix, picks: Sequence[Selection], kind: Kind) -> Tensor:
    """As `_grid`, with index tensors read side by side; they lie along the first of their dims."""
    spec, query, key, bias = matrix.spec, matrix.query, matrix.key, matrix.bias
    device = query.device
    count = next(pick.numel() for pick in picks if isinstance(pick, Tensor))
    sizes = [1 if isinstance(p, Tensor) else _size(p) for p in picks]
    group = spec.shape.group
    size = query.shape[-1]
    weight = sizes[0] * sizes[1] * sizes[3] * (size + sizes[2])
    step = max(ELEMENTS // max(weight, 1), 1)
    results = []
    # A graph that is traced may not know how many pairs there are: it reads them at once.
    for some in (slice(None),) if is_traced() else split(slice(0, count), step):
        at, n = [], 0
        for d, pick in enumerate(picks):
            if isinstance(pick, Tensor):
                part = pick[some].to(device)
                n = part.shape[0]
                at.append(part.view(-1, 1, 1, 1, 1))
            else:
                view = [-1 if i == d + 1 else 1 for i in range(5)]
                at.append(_positions(pick, device).view(view))
        b, h, q, k = at
        flat = (n * sizes[0], *sizes[1:])
        rows = (b[..., 0], h[..., 0], q[..., 0])
        columns = (b[..., 0, :], h[..., 0, :] // group, k[..., 0, :])
        allowed, added = None, None
        if spec.masks:
            allowed = _allowed(spec, Positions(b, h, q, k, spec.shape))
            allowed = allowed.expand(n, *sizes).reshape(flat)
        if bias is not None:
            where = (i if s != 1 else i * 0 for i, s in zip(at, bias.shape, strict=True))
            added = bias[tuple(where)].expand(n, *sizes).reshape(flat)
        values = _values(
            matrix,
            query[rows].expand(n, *sizes[:3], size).reshape(*flat[:3], size),
            key[columns].expand(n, *sizes[:2], sizes[3], size).reshape(*flat[:2], sizes[3], size),
            added,
            allowed,
            matrix.normaliser[rows].expand(n, *sizes[:3], 2).reshape(*flat[:3], 2),
            kind,
        )
        results.append(values.view(n, *sizes))
    weights = torch.cat(results) if results else _nothing(matrix, sizes, kind)
    along = next(d for d, pick in enumerate(picks) if isinstance(pick, Tensor))
    return weights.transpose(0, along + 1).squeeze(0)


def _nothing(matrix: Matrix, sizes: Sequence[int], kind: Kind) -> Tensor:
    """No pair at all."""
    like = matrix.query if kind == "rounded" else matrix.normaliser
    return like.new_zeros(0, *sizes)


def _values(
    matrix: Matrix,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    allowed: Tensor | Bounds | None,
    normaliser: Tensor,
    kind: Kind,
) -> Tensor:
    """The weights of all these queries and keys, or their logarithms."""
    spec = matrix.spec if _takes_bounds(matrix) else matrix.spec.guarded(query, key, bias=bias)
    block = matrix.block_weights(spec, query, key, bias, allowed, normaliser)
    if kind == "rounded":
        return block.rounded(matrix.query.dtype)
    return block.log_weights if kind == "logs" else block.weights


def _takes_bounds(matrix: Matrix) -> bool:
    return getattr(matrix.block_weights, "takes_bounds", False)


def _allowed(spec: ScoreSpec, at: Positions) -> Tensor:
    """bool, broadcastable to the positions: where all masks allow."""
    return reduce(torch.logical_and, (mask.allowed(at) for mask in spec.masks))


def _key_heads(heads: Selection, group: int) -> Selection:
    """The key heads of some query heads: one for each, one for all, or whole groups of them."""
    if group == 1:
        return heads
    if isinstance(heads, Tensor):
        return heads // group
    if isinstance(heads, range):
        return torch.arange(heads.start, heads.stop, heads.step) // group
    first, last = heads.start // group, -(-heads.stop // group)
    if last - first == 1 or not (heads.start % group or heads.stop % group):
        return slice(first, last)
    return torch.arange(heads.start, heads.stop) // group


def _positions(pick: Selection, device: torch.device) -> Tensor:
    if isinstance(pick, Tensor):
        return pick.to(device)
    return torch.arange(pick.start, pick.stop, pick.step or 1, device=device)


def _size(pick: slice | range) -> int:
    return len(pick) if isinstance(pick, range) else pick.stop - pick.start


def _select(tensor: Tensor, picks: Sequence[Selection]) -> Tensor:
    """The tensor at the selected positions of its first dimensions; size 1 broadcasts."""
    for dim, pick in enumerate(picks):
        single = tensor.shape[dim] == 1
        if isinstance(pick, Tensor | range):
            at = _positions(pick, tensor.device)
            tensor = tensor.index_select(dim, at * 0 if single else at)
        elif pick.start == pick.stop:
            tensor = tensor.narrow(dim, 0, 0)
        elif not single:
            tensor = tensor.narrow(dim, pick.start, pick.stop - pick.start)
    return tensor
