"""Attention on CPUs in C++: output, lse, dense weights and statistics, at fused speed.

    lse = log Σ_j exp(s_ij) ,  output = Σ_j exp(s_ij - lse) v_j ,  dS = P (dP - rowsum(P dP) + dlse)

Keys are packed once per head; a block of query rows is scored into a buffer that stays in the
L2 cache, turned into weights there, multiplied with V, and streamed out where dense weights are
wanted. A row's bits depend neither on the threads nor on the batch. Sums are float32 (float64
for float64). Masks come as one key interval for each query, and a dense mask where intervals
do not say it all; masks that are neither are evaluated for a few rows at a time. Equals
`reference.attention`. The C++ sources lie beside this file; `library` loads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import statistics
from ...blocks import even, split, whole
from ...masks import _Dense
from ...spec import Inputs, ScoreSpec, accumulate_dtype
from . import library

MASK_ELEMENTS = 1 << 24  # bytes of a dense mask made at a time
MOST = 64  # the largest k of a native top-k


def unsupported_reason(spec: ScoreSpec, query: Tensor) -> str | None:
    """Why it cannot compute a call, or None."""
    if query.device.type != "cpu":
        return f"it runs on CPU tensors, got {query.device.type}; use impl='auto'"
    handle, why = library.load()
    return None if handle is not None else why


def available(query: Tensor) -> bool:
    """True where the library is there for this tensor."""
    return query.device.type == "cpu" and library.load()[0] is not None


def forward(spec: ScoreSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(output `[B, H, L, Ev]`, lse `[B, H, L]`)."""
    output, lse = _each(spec, inputs, ("output", "lse"))
    return output, lse


def dense(spec: ScoreSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(output, weights `[B, H, L, S]`), both in the dtype of query, in one pass."""
    output, weights = _each(spec, inputs, ("output", "weights"))
    return output, weights


def _each(spec: ScoreSpec, inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """What a forward gives, by name, over all parts of the mask."""
    totals: list[Tensor] = []
    for part in _parts(spec):
        results = _forward(spec, part, inputs, names)
        if part.full:
            return results
        if not totals:
            totals = [
                library.buffer((*t.shape[:2], spec.shape.queries, *t.shape[3:]), t.dtype)
                for t in results
            ]
        for total, result in zip(totals, results, strict=True):
            total[:, :, part.rows].copy_(result)
    return totals


def _forward(spec: ScoreSpec, part: _Part, inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    call = _Call(spec, part, inputs)
    batch, heads, queries = call.sizes
    out, results = library.Forward(), []
    shapes = {"output": (inputs.value.shape[-1],), "weights": (spec.shape.keys,), "lse": ()}
    for name in names:
        dtype = accumulate_dtype(inputs.query.dtype) if name == "lse" else inputs.query.dtype
        results.append(library.buffer((batch, heads, queries, *shapes[name]), dtype))
        library.fill(out, name, results[-1], 0 if name == "lse" else 3)
    call.run("forward", out)
    return results


def backward(
    spec: ScoreSpec,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks (None where not there)."""
    query, key, value, bias, sinks = inputs
    dtype = lse.dtype
    wants_bias = bias is not None and bias.requires_grad
    grads: list[Tensor] = []
    grad_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
    grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=dtype)
    for part in _parts(spec, rows_of_bias=wants_bias):
        call = _Call(spec, part, inputs)
        args = library.Backward()
        call.read(args, "lse", part.cut(lse).contiguous())
        if grad_lse is not None:
            call.read(args, "d_lse", part.cut(grad_lse).to(dtype).contiguous())
        if grad_output is not None:
            call.read(args, "output", _unit(part.cut(output)), 3)
            call.read(args, "d_output", _unit(part.cut(grad_output)), 3)
        found = [
            call.write(args, "dq", call.inputs.query.shape, query.dtype),
            call.write(args, "dk", key.shape, key.dtype),
            call.write(args, "dv", value.shape, value.dtype),
        ]
        if grad_output is None:
            args.dv = None
            found[2].zero_()
        if grad_bias is not None:
            over = call.write(args, "dbias", (*call.sizes, spec.shape.keys), dtype)
        if grad_sinks is not None:
            sunk = call.write(args, "dsinks", call.sizes, dtype)
        call.run("backward", args)
        if grad_bias is not None:
            target = grad_bias if grad_bias.shape[2] == 1 else grad_bias[:, :, part.rows]
            target.add_(over.sum_to_size(target.shape))
        if grad_sinks is not None:
            grad_sinks.add_(sunk.sum((0, 2)))
        if part.full:
            grads = found
        else:
            if not grads:
                grads = [torch.zeros_like(t, dtype=dtype) for t in (query, key, value)]
            grads[0][:, :, part.rows].copy_(found[0])
            grads[1].add_(found[1])
            grads[2].add_(found[2])
    options = ((grad_bias, bias), (grad_sinks, sinks))
    return (
        *(grad.to(query.dtype) for grad in grads),
        *(None if g is None or t is None else g.to(t.dtype) for g, t in options),
    )


def read(
    statistic: statistics.Statistic, spec: ScoreSpec, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """The results of a statistic, or None where it is one that PyTorch streams."""
    query, key, bias, lse, *operands = tensors
    assert query is not None
    assert key is not None
    assert lse is not None
    names = _names(statistic)
    parts = list(_parts(spec)) if names else []
    if len(parts) != 1 or not parts[0].full or spec.shape.empty:
        return None
    call = _Call(spec, parts[0], Inputs(query, key, None, bias, None))
    args = library.Readout(row0=0, row1=spec.shape.queries, key0=0, key1=spec.shape.keys)
    call.read(args, "lse", lse.contiguous())
    rows = statistic.queries
    if rows is not None:
        args.row0, args.row1 = rows.start, rows.stop
    batch, heads, queries, keys = (
        spec.shape.batch,
        spec.shape.heads,
        spec.shape.queries,
        spec.shape.keys,
    )
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


class _Part(NamedTuple):
    """Some rows of a call, with its mask as intervals and, where they do not do, a tensor."""

    rows: slice
    full: bool
    start: Tensor | None = None  # int64 [B or 1, H or 1, L or 1]
    stop: Tensor | None = None
    mask: Tensor | None = None  # bool [B or 1, H or 1, rows or 1, S or 1]

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [B, H, L, ...]; size 1 broadcasts."""
        whole_rows = self.full or tensor.shape[2] == 1
        return tensor if whole_rows else tensor[:, :, self.rows]


def _parts(spec: ScoreSpec, rows_of_bias: bool = False) -> Iterator[_Part]:
    """The call in one part, or a few rows at a time where the mask or dbias would be dense."""
    shape, every = spec.shape, slice(0, spec.shape.queries)
    bound = spec.bind()
    start = stop = mask = None
    size = shape.queries
    if bound is not None:
        start, stop = bound.bounds.start, bound.bounds.stop
        loose = [] if bound.bounds.exact else [m for m in spec.masks if not m.bounds(shape).exact]
        if len(loose) == 1 and isinstance(loose[0], _Dense):
            mask = loose[0].tensor
        elif loose:
            size = min(size, max(MASK_ELEMENTS // (shape.batch * shape.heads * shape.keys or 1), 1))
    if rows_of_bias:
        size = min(
            size, max(MASK_ELEMENTS // 4 // (shape.batch * shape.heads * shape.keys or 1), 1)
        )
    evaluated = bound is not None and not bound.bounds.exact and mask is None
    for rows in split(every, even(shape.queries, size)) if shape.queries else (every,):
        full = rows == every
        part = _Part(rows, full)
        here = mask
        if evaluated and bound is not None:
            here = bound.mask.block(whole(shape)._replace(queries=rows), torch.device("cpu"))
        elif mask is not None:
            here = part.cut(mask)
        cuts = (None if t is None else part.cut(t) for t in (start, stop))
        yield _Part(rows, full, *cuts, here)


class _Call:
    """One call of the library: the problem, and the tensors that must outlive it."""

    def __init__(self, spec: ScoreSpec, part: _Part, inputs: Inputs) -> None:
        query, key, value, bias, sinks = inputs
        query = part.cut(query)
        self.inputs = inputs._replace(query=query)
        self.sizes = tuple(query.shape[:3])
        self.keep: list[Tensor] = []
        self.problem = problem = library.Problem()
        problem.B, problem.Hq, problem.L, problem.E = query.shape
        problem.Hkv, problem.S = key.shape[1:3]
        problem.Ev = 0 if value is None else value.shape[-1]
        problem.dtype = library.DTYPES[query.dtype]
        problem.num_threads = torch.get_num_threads()
        problem.parallel_for = library.parallel_for()
        problem.scale, problem.softcap = spec.scale, spec.softcap or 0.0
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            if tensor is not None:
                self.read(problem, name, _unit(tensor), 3)
        full = (*self.sizes, spec.shape.keys)
        for name, bound in (("start", part.start), ("stop", part.stop)):
            if bound is not None:
                self.read(problem, name, bound.expand(self.sizes), 3)
        if part.mask is not None:
            self.read(problem, "mask", part.mask.view(torch.uint8).expand(full), 4)
        dtype = accumulate_dtype(query.dtype)
        if bias is not None:
            self.read(problem, "bias", part.cut(bias.detach()).to(dtype).expand(full), 4)
        if sinks is not None:
            self.read(problem, "sinks", sinks.detach().to(dtype).contiguous())

    def read(self, struct: Any, name: str, tensor: Tensor, strides: int = 0) -> None:
        """Gives a tensor to the call."""
        self.keep.append(tensor)
        library.fill(struct, name, tensor, strides)

    def write(
        self,
        struct: Any,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: int = 0,
    ) -> Tensor:
        """A fresh tensor for the call to write into."""
        tensor = library.buffer(tuple(shape), dtype)
        library.fill(struct, name, tensor, strides)
        return tensor

    def run(self, name: str, struct: Any) -> None:
        """Makes the call."""
        library.call(name, self.problem, struct)


def _unit(tensor: Tensor) -> Tensor:
    """The tensor with a last dimension of stride 1."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
