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

import math

import torch
from torch import Tensor

from ...spec import Inputs, ScoreSpec
from . import library
from .call import Call, Part, parts
from .readout import read as read


def unsupported_reason(spec: ScoreSpec, query: Tensor) -> str | None:
    """Why it cannot compute a call, or None."""
    if query.device.type != "cpu":
        return f"it runs on CPU tensors, got {query.device.type}"
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
    """What a forward gives, by name, over all parts of the call."""
    totals: list[Tensor] = []
    for part in parts(spec):
        results = _forward(spec, part, inputs, names)
        if part.full:
            return results
        if not totals:
            shapes = [(*r.shape[:2], spec.shape.queries, *r.shape[3:]) for r in results]
            totals = [library.buffer(s, r.dtype) for s, r in zip(shapes, results, strict=True)]
        for total, result in zip(totals, results, strict=True):
            total[:, :, part.rows].copy_(result)
    return totals


def _forward(spec: ScoreSpec, part: Part, inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    call, out = Call(spec, part, *inputs), library.Forward()
    results = [call.write(out, name) for name in names]
    if not spec.shape.empty:
        call.run("forward", out)
        return results
    return [r.fill_(-math.inf if n == "lse" else 0) for n, r in zip(names, results, strict=True)]


def backward(
    spec: ScoreSpec,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks (None where not there)."""
    *_, bias, sinks = inputs
    wants_bias = bias is not None and bias.requires_grad
    totals = [
        None
        if t is None or (t is bias and not wants_bias)
        else torch.zeros_like(t, dtype=lse.dtype)
        for t in inputs
    ]
    for part in parts(spec, dense_bias=wants_bias) if not spec.shape.empty else ():
        call, args = Call(spec, part, *inputs), library.Backward()
        call.read(args, "lse", part.cut(lse))
        if grad_lse is not None:
            call.read(args, "d_lse", part.cut(grad_lse))
        if grad_output is not None:
            call.read(args, "output", part.cut(output))
            call.read(args, "d_output", part.cut(grad_output))
        wanted = (True, True, grad_output is not None, wants_bias, sinks is not None)
        names = ("dq", "dk", "dv", "dbias", "dsinks")
        found = [
            call.write(args, name) if want else None
            for name, want in zip(names, wanted, strict=True)
        ]
        call.run("backward", args)
        if part.full and not wants_bias and sinks is None:
            return tuple(found)
        for total, grad, axes in zip(totals, found, ("q", "k", "k", "q", "h"), strict=True):
            if total is None or grad is None:
                continue
            if axes == "h":
                total.add_(grad.sum((0, 2)))
            else:
                target = part.cut(total) if axes == "q" else total
                target.add_(grad.sum_to_size(target.shape))
    return tuple(
        None if total is None or t is None else total.to(t.dtype)
        for total, t in zip(totals, inputs, strict=True)
    )
