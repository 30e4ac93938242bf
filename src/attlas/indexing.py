"""Exact indexing of weights that are not there: `read(index)` equals `dense[index]`.

An index is turned into what it selects along each of [B, H, L, S], the weights of that
selection are computed, and PyTorch's own indexing of the small result gives the layout. Index
tensors that are paired, `weights[0, 0, i, j]`, are read pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import checks
from .blocks import ELEMENTS, split
from .masks import Positions
from .spec import ScoreSpec, full_precision, is_traced
from .statistics import log_mean

Selection = slice | Tensor  # a range of step 1, or positions


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
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    *,
    log: bool = False,
    mean: bool = False,
) -> Tensor:
    """The weights at an expanded index, in the accumulation dtype; differentiable.

    With `log` their logarithms; with `mean` those of the mean of the heads, which `shape` and
    the index then leave out.
    """
    entries = [item for item in index if item is not None]
    paired = [d for d, item in enumerate(entries) if isinstance(item, Tensor)]
    picks: list[Selection] = []
    layout: list[Any] = []
    for item, size in zip(entries, shape, strict=True):
        if isinstance(item, Tensor):
            picks.append(item.flatten())
            layout.append(torch.arange(item.numel(), device=query.device).view(item.shape))
        elif isinstance(item, int | torch.SymInt):
            picks.append(slice(item, item + 1))
            layout.append(0)
        else:
            every = item == slice(None)  # whose `indices` would fix a symbolic size
            start, stop, step = (0, size, 1) if every else item.indices(size)
            picks.append(slice(start, max(stop, start)))
            layout.append(slice(None, None, step))
    lead = 4 - len(shape)
    if lead:  # [L, S] has neither batch nor heads, [B, L, S] has no heads
        picks = [*picks[:-2], *[slice(0, 1)] * lead, *picks[-2:]]
    tensors = (spec, query, key, bias, lse)
    kind = _grid
    if len(paired) > 1:
        together = torch.broadcast_tensors(*(entries[d] for d in paired))
        count = together[0].numel()
        for d, item in zip(paired, together, strict=True):
            picks[d + lead * (d >= len(shape) - 2)] = item.reshape(-1)
            layout[d] = torch.zeros_like(item)
        layout[paired[0]] = torch.arange(count, device=query.device).view(together[0].shape)
        kind = _pairs
    if not mean:
        log_weights = kind(picks, *tensors)
        weights = log_weights if log else log_weights.exp()
    else:
        heads = (slice(h, h + 1) for h in range(spec.shape.heads))
        planes = (kind([picks[0], one, *picks[2:]], *tensors) for one in heads)
        if log:
            weights = log_mean(torch.cat(list(planes), dim=1))
        else:  # one head at a time
            weights = reduce(torch.add, (plane.exp() for plane in planes)) / spec.shape.heads
    if lead:
        weights = weights.reshape(*weights.shape[: 2 - lead], *weights.shape[2:])
    full = iter(layout)
    return weights[tuple(None if item is None else next(full) for item in index)]


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


def _grid(
    picks: Sequence[Selection],
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """The log weights where selected rows and columns cross, `[b, h, q, k]`."""
    device = query.device
    at = [_positions(pick, device) for pick in picks]
    b, h, q, k = (p.view([-1 if i == d else 1 for i in range(4)]) for d, p in enumerate(at))
    group = spec.shape.group
    keys = _select(key, (picks[0], picks[1] if group == 1 else at[1] // group, picks[3]))
    allowed = None
    if spec.masks:
        allowed = torch.ones((), dtype=torch.bool, device=device)
        for mask in spec.masks:
            allowed = allowed & mask.allowed(Positions(b, h, q, k, spec.shape))
    queries = _select(query, picks[:3])
    scores = spec.guarded(queries, keys, bias=bias).scores(
        queries,
        keys,
        None if bias is None else _select(bias, picks),
        allowed,
        _select(lse, picks[:3]),
    )
    return scores


def _pairs(
    picks: Sequence[Selection],
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """As `_grid`, with index tensors read side by side; they lie along the first of their dims."""
    device = query.device
    count = next(pick.numel() for pick in picks if isinstance(pick, Tensor))
    sizes = [1 if isinstance(p, Tensor) else p.stop - p.start for p in picks]
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
                at.append(torch.arange(pick.start, pick.stop, device=device).view(view))
        b, h, q, k = at
        flat = (n * sizes[0], *sizes[1:])
        rows = (b[..., 0], h[..., 0], q[..., 0])
        columns = (b[..., 0, :], h[..., 0, :] // group, k[..., 0, :])
        allowed = None
        for mask in spec.masks:
            one = mask.allowed(Positions(b, h, q, k, spec.shape)).expand(n, *sizes)
            allowed = one if allowed is None else allowed & one
        added = None
        if bias is not None:
            where = (i if s != 1 else i * 0 for i, s in zip(at, bias.shape, strict=True))
            added = bias[tuple(where)].expand(n, *sizes).reshape(flat)
        queries, keys = query[rows], key[columns]
        scores = spec.guarded(queries, keys, bias=bias).scores(
            queries.expand(n, *sizes[:3], size).reshape(*flat[:3], size),
            keys.expand(n, *sizes[:2], sizes[3], size).reshape(*flat[:2], sizes[3], size),
            added,
            None if allowed is None else allowed.reshape(flat),
            lse[rows].expand(n, *sizes[:3]).reshape(flat[:3]),
        )
        results.append(scores.view(n, *sizes))
    weights = torch.cat(results) if results else lse.new_zeros(0, *sizes)
    along = next(d for d, pick in enumerate(picks) if isinstance(pick, Tensor))
    return weights.transpose(0, along + 1).squeeze(0)


def _positions(pick: Selection, device: torch.device) -> Tensor:
    if isinstance(pick, Tensor):
        return pick.to(device)
    return torch.arange(pick.start, pick.stop, device=device)


def _select(tensor: Tensor, picks: Sequence[Selection]) -> Tensor:
    """The tensor at the selected positions of its first dimensions; size 1 broadcasts."""
    for dim, pick in enumerate(picks):
        single = tensor.shape[dim] == 1
        if isinstance(pick, Tensor):
            at = pick.to(tensor.device)
            tensor = tensor.index_select(dim, at * 0 if single else at)
        elif pick.start == pick.stop:
            tensor = tensor.narrow(dim, 0, 0)
        elif not single:
            tensor = tensor.narrow(dim, pick.start, pick.stop - pick.start)
    return tensor
