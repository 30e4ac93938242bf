"""Attention on CPUs in C++: output, normaliser, dense weights and statistics, at fused speed.

    l = Σ_j exp(s_ij - m) ,  output = Σ_j exp(s_ij - m) v_j / l ,  dS = P (dP - rowsum(P dP) + dlse)

Keys are packed once per head; a block of query rows is scored into a buffer that stays in the
L2 cache, turned into weights there, multiplied with V, and streamed out where dense weights are
wanted. A row's bits depend neither on the threads nor on the batch. Sums are float32 (float64
for float64). Where the CPU has AVX512-BF16, that sums the scores of bfloat16 inputs, and takes
denormals for 0. Masks come as one key interval for each query, and a dense mask where intervals
do not say it all; masks that are neither are evaluated for a few rows at a time. Equals
`reference.attention`. The C++ sources lie beside this file; `library` loads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from ...spec import Attended, Cotangents, Inputs, ScoreSpec
from . import library
from .call import Call, Part, parts
from .readout import NativeBlockWeights
from .readout import read as read
from .readout import read_backward as read_backward


def unsupported_reason(query: Tensor) -> str | None:
    """Why it cannot compute a call, or None."""
    if not query.is_cpu:
        return f"it runs on CPU tensors, got {query.device.type}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace does not record it; torch.export does"
    return library.missing()


def is_available(query: Tensor) -> bool:
    """True when it computes a call. Where its library is what is missing, that is said once."""
    reason = unsupported_reason(query)
    if reason is not None and reason == library.missing():
        library.warn_missing()
    return reason is None


def instructions() -> str | None:
    """The instruction set that the loaded library was compiled for, None without a library."""
    return library.instructions()


def release() -> int:
    """Gives the memory that is kept for the next call to the system; the bytes of it."""
    return library.release()


BlockWeights = NativeBlockWeights  # how a block of weights is computed
DIFFERENTIATES = ("entropy", "received")  # statistics of the forward that `backward` takes

# What the library calls the statistics of the forward pass.
STATISTICS = {"entropy": ("entropy",), "received": ("received",), "max": ("max_value", "max_key")}


def forward(spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = ()) -> Attended:
    """Output `[B, H, L, Ev]`, normaliser, and the statistics in `also`, in one pass."""
    names = [name for kind in also for name in STATISTICS[kind]]
    output, normaliser, *rest = _each(spec, inputs, ("output", "normaliser", *names))
    tensors = iter(rest)
    found = {kind: tuple(islice(tensors, len(STATISTICS[kind]))) for kind in also}
    return Attended(output, normaliser, found)


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
            totals = [
                r.new_zeros(r.shape)
                if name == "received"
                else library.fresh(name, (*r.shape[:2], spec.shape.queries, *r.shape[3:]), r.dtype)
                for name, r in zip(names, results, strict=True)
            ]
        for name, total, result in zip(names, totals, results, strict=True):
            if name == "received":
                total.add_(result)
            else:
                total[:, :, part.rows].copy_(result)
    return totals


def _forward(spec: ScoreSpec, part: Part, inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    call, out = Call(spec, part, *inputs), library.Forward()
    call.drop(spec.dropout, part)
    results = [call.write(out, name) for name in names]
    if not spec.shape.empty:
        call.run("forward", out)
        return results
    for name, result in zip(names, results, strict=True):
        result.fill_({"normaliser": 1, "max_key": -1}.get(name, 0))
        if name == "normaliser":  # of rows without keys
            result[..., 0] = -math.inf
    return results


def backward(
    spec: ScoreSpec, inputs: Inputs, done: Attended, grads: Cotangents, bias_grad: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks (None where not there or not wanted)."""
    *_, bias, sinks = inputs
    dbias, dsinks = bias is not None and bias_grad, sinks is not None
    names = {"dq": True, "dk": True, "dv": grads.output is not None}
    names |= {"dbias": dbias, "dsinks": dsinks}
    wanted, sums = (True, True, True, dbias, dsinks), done.normaliser.dtype
    totals: list[Tensor | None] = []
    for part in parts(spec, dense_bias=dbias) if not spec.shape.empty else ():
        call, args = Call(spec, part, *inputs), library.Backward()
        call.drop(spec.dropout, part)
        call.read(args, "normaliser", part.cut(done.normaliser))
        if grads.lse is not None:
            call.read(args, "d_lse", part.cut(grads.lse))
        if grads.entropy is not None:
            call.read(args, "entropy", part.cut(done.found["entropy"][0]))
            call.read(args, "d_entropy", part.cut(grads.entropy))
        if grads.received is not None:
            call.read(args, "d_received", grads.received)
        if grads.output is not None:
            call.read(args, "output", part.cut(done.output))
            call.read(args, "d_output", part.cut(grads.output))
        found = [call.write(args, name) if want else None for name, want in names.items()]
        call.run("backward", args)
        if part.full and not dbias and not dsinks:
            return tuple(found)
        if not totals:
            totals = _zeros(inputs, wanted, sums)
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
        for total, t in zip(totals or _zeros(inputs, wanted, sums), inputs, strict=True)
    )


def _zeros(tensors: Inputs, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    return [
        torch.zeros_like(t, dtype=dtype) if t is not None and want else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
