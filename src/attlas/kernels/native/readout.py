"""Statistics of the weights by the library, from query, key and lse.

Those that it knows are computed in one pass of C++; `read` gives None for the others, which
`attlas.streaming` computes from any implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import statistics
from ...spec import ScoreSpec
from . import library
from .call import Call, parts, unit

MOST = 64  # the largest k of a top-k that is kept in registers and the L1 cache


def read(
    statistic: statistics.Statistic, spec: ScoreSpec, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """The results of a statistic, or None where it is one that PyTorch streams."""
    query, key, bias, lse, *operands = tensors
    assert query is not None
    assert key is not None
    assert lse is not None
    names = _names(statistic)
    part = next(parts(spec)) if names and not spec.shape.empty else None
    if part is None or not part.full:
        return None
    call = Call(spec, part, query, key, None, bias, None)
    args = library.Readout(row0=0, row1=spec.shape.queries, key0=0, key1=spec.shape.keys)
    call.read(args, "lse", lse.contiguous())
    rows = statistic.queries
    if rows is not None:
        args.row0, args.row1 = rows.start, rows.stop
    batch, heads, _, queries, keys = spec.shape
    dtype, tail = lse.dtype, (queries,)
    match statistic:
        case statistics.Max():
            pass
        case statistics.TopK():
            args.k, tail = statistic.k, (queries, statistic.k)
        case statistics.Mass() | statistics.TransposedProduct():
            given = operands[0]
            assert given is not None
            mass = isinstance(statistic, statistics.Mass)
            given = given.unsqueeze(-1) if mass else given
            size = keys if mass else queries
            given = given.to(dtype).expand(batch, heads, size, given.shape[-1]).contiguous()
            args.F = given.shape[-1]
            call.read(args, "x" if mass else "y", given)
            tail = (queries, 1) if mass else (keys, args.F)
        case statistics.Received():
            tail = (keys,)
            if operands and operands[0] is not None:
                weights = operands[0].to(dtype).expand(batch, heads, queries).contiguous()
                call.read(args, "row_weight", weights)
        case statistics.Dense():
            tail = (queries, keys)
        case statistics.Pool():
            args.cell_rows, args.cell_keys = statistic.cell
            tail = tuple(-(-n // c) for n, c in zip((queries, keys), statistic.cell, strict=True))
        case _:
            pass
    results = []
    for name in names:
        kind = torch.int64 if name.endswith("_key") else query.dtype if name == "weights" else dtype
        strides = 3 if name == "weights" else 0
        results.append(call.write(args, name, (batch, heads, *tail), kind, strides))
    call.run("read", args)
    if isinstance(statistic, statistics.Mass):
        results[0] = results[0].squeeze(-1)
    return tuple(results)


def read_backward(
    statistic: statistics.Statistic,
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """The gradients of query, key, bias, lse and the operands; None where PyTorch streams them.

    lse counts as a variable of its own: dS = P dP, dlse = -rowsum(P dP).
    """
    query, key, bias, lse, *operands = tensors
    grad, given = grads[0], operands[0] if operands else None
    assert query is not None
    assert key is not None
    assert lse is not None
    product = isinstance(statistic, statistics.TransposedProduct)
    if (
        type(statistic).__name__ not in ("Entropy", "Received", "TransposedProduct")
        or not _names(statistic)
        or grad is None
        or spec.shape.empty
        or statistic.queries not in (None, slice(0, spec.shape.queries))
        or wanted[2]  # the gradient of a bias is not of this readout alone: it is streamed
        or (any(wanted[4:]) and not product)
        or (product and (spec.shape.group > 1 or query.dtype != lse.dtype))
    ):
        return None
    leading, dtype = spec.shape[:2], lse.dtype
    grad = grad.to(dtype)
    if given is not None:
        given = given.to(dtype).expand(*leading, *given.shape[2:])
    total: list[Tensor] = []
    for part in parts(spec):
        value = unit(grad) if product else None  # P^T x: dP = x grad^T, as of an output
        call, args = Call(spec, part, query, key, value, bias, None), library.Backward()
        call.read(args, "lse", part.cut(lse).contiguous())
        if isinstance(statistic, statistics.Entropy):
            call.read(args, "d_entropy", part.cut(grad).contiguous())
        elif given is not None and product:
            call.read(args, "d_output", unit(part.cut(given)), 3)
        else:
            call.read(args, "d_received", grad.contiguous())
            if given is not None:
                call.read(args, "row_weight", part.cut(given).contiguous())
        found = [
            call.write(args, "dq", (*call.sizes, query.shape[-1]), query.dtype),
            call.write(args, "dk", key.shape, key.dtype),
            call.write(args, "minus_rowsum", call.sizes, dtype),
        ]
        call.run("backward", args)
        if part.full:
            total = found
            break
        if not total:
            total = [torch.zeros_like(query), torch.zeros_like(key, dtype=dtype), lse.clone()]
        part.cut(total[0]).copy_(found[0])
        total[1].add_(found[1])
        part.cut(total[2]).copy_(found[2])
    rest: list[Tensor | None] = [None] * len(operands)
    if product and wanted[4] and operands[0] is not None:
        weighted = _product(spec, query, key, bias, lse, grad)
        rest[0] = weighted.sum_to_size(operands[0].shape)
    return [total[0], total[1].to(key.dtype), None, total[2], *rest]


def _product(
    spec: ScoreSpec, query: Tensor, key: Tensor, bias: Tensor | None, lse: Tensor, x: Tensor
) -> Tensor:
    """weights @ x, `[B, H, L, F]`, for x `[B, H, S, F]` in the dtype of lse."""
    total = lse.new_empty(*lse.shape, x.shape[-1])
    for part in parts(spec):
        call = Call(spec, part, query, key, None, bias, None)
        rows = call.sizes[2]
        args = library.Readout(row0=0, row1=rows, key0=0, key1=spec.shape.keys, F=x.shape[-1])
        call.read(args, "lse", part.cut(lse).contiguous())
        call.read(args, "x", x.contiguous())
        result = call.write(args, "wx", (*call.sizes, x.shape[-1]), lse.dtype)
        call.run("read", args)
        if part.full:
            return result
        part.cut(total).copy_(result)
    return total


def _names(statistic: statistics.Statistic) -> tuple[str, ...]:
    """What the C++ readout calls the results of a statistic; none where it has no such thing."""
    kinds: dict[type, tuple[str, ...]] = {
        statistics.Entropy: ("entropy",),
        statistics.Max: ("max_value", "max_key"),
        statistics.Mass: ("wx",),
        statistics.TransposedProduct: ("wty",),
        statistics.Received: ("received",),
        statistics.Dense: ("weights",),
    }
    if not type(statistic).__module__.startswith(statistics.__name__):
        return ()  # a user's subclass may mean something else
    match statistic:
        case statistics.Pool(how="max"):
            return ("pool_max",)
        case statistics.Pool(how="mass"):
            return ("pool_mass",)
        case statistics.ReceivedMax(operands=()):
            return ("received_max",)
        case statistics.TopK(k=k) if type(statistic) is statistics.TopK and k <= MOST:
            return ("topk_value", "topk_key")
    return kinds.get(type(statistic), ())
