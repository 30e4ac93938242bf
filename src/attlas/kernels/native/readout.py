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
from .call import Call, parts

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


def read_backward(*_: object) -> None:
    """None: gradients are streamed by `streaming.stream_backward`."""


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
