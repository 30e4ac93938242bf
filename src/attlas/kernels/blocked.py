"""Streaming attention in plain PyTorch, on any device, in O(L) memory.

    l_i = Σ_j exp(s_ij - m_i)                 output_i = Σ_j exp(s_ij - m_i) v_j / l_i
    dP  = dO Vᵀ                               dS = P * (dP - rowsum(dO * O) + dlse)

With dropout, P that meets V, and dP, are dropped and scaled; l, and P elsewhere, are not.
One step owns a few whole rows of the scores (`blocks.ELEMENTS` of them), skips the keys that
the mask leaves empty, and keeps nothing; the backward computes each block again. On a
CPU the forward and the backward are PyTorch's own fused operators wherever they are right
(`attlas.fused`). Sums are in float32, in float64 for float64. Equals `reference.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import fused
from ..block_weights import ScoredBlockWeights
from ..blocks import Block, blocks, take
from ..spec import (
    Attended,
    BoundMask,
    Cotangents,
    Inputs,
    ScoreSpec,
    accumulate_dtype,
    clean,
    finite,
    is_finite,
    key_runs,
    logsumexp,
    normalised,
    normaliser_of,
    product,
    product_over_queries,
    sink_weights,
    weighted_values,
)

BlockWeights = ScoredBlockWeights  # how a block of weights is computed
LARGE_BIAS = 100.0  # a log-sum-exp of this size still tells keys apart to 1e-5
DIFFERENTIATES: tuple[str, ...] = ()  # statistics of the forward: `streaming` does them


def read(*_: object) -> None:
    """None: every statistic is streamed by `streaming.stream`."""


def read_backward(*_: object) -> None:
    """None: every statistic is streamed by `streaming.stream_backward`."""


def forward(spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = ()) -> Attended:
    """Output and normaliser; no statistics."""
    query, key, value, bias, sinks = inputs
    spec = spec.guarded(query, key, value, bias=bias)
    if _is_for_fused(spec, query, key, bias):
        output, lse = fused.forward(spec, query, key, value, bias)
        normaliser = normaliser_of(lse, torch.ones_like(lse))  # the operator gives no more
    else:
        output, normaliser = _stream(spec, inputs)
    if sinks is None:
        return Attended(output, normaliser, {})
    normaliser, share = _with_sinks(normaliser, sinks)
    return Attended((output * share.unsqueeze(-1)).to(output.dtype), normaliser, {})


def _with_sinks(normaliser: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The normaliser with the sinks in it, and the share of each row that is left for the keys."""
    top, total = normaliser.unbind(-1)
    sink = sinks.to(top.dtype).view(1, -1, 1)
    highest = torch.where(top == -math.inf, top, torch.maximum(top, sink))
    kept = total * (top - finite(highest)).exp()
    whole = kept + (sink - highest).exp()
    empty = highest == -math.inf
    return normaliser_of(highest, whole.masked_fill(empty, 1.0)), (kept / whole).masked_fill(
        empty, 0.0
    )


def _is_for_fused(spec: ScoreSpec, query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """True where the fused operators are right: they give the log-sum-exp alone, and not of NaN.

    Of a row of NaN they make an empty one, and of one whose every bias is large they lose how many
    keys it has.
    """
    if fused.unsupported_reason(spec, query, bias) is not None:
        return False
    if bias is None:  # where there is one, or a mask, a guard is set for the other inputs
        return bool(spec.masks) or is_finite(query, key)
    largest = bias.detach().amax(-1)
    return bool((largest.masked_fill(largest == -math.inf, 0.0).abs() <= LARGE_BIAS).all())


def _stream(spec: ScoreSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    query, key, value, bias, _ = inputs
    mask, dtype = spec.bind(), accumulate_dtype(query.dtype)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    normaliser = query.new_ones(*query.shape[:3], 2, dtype=dtype)
    normaliser[..., 0] = -math.inf
    for rows in blocks(spec.shape):
        runs = list(key_runs(mask, rows, query.device))
        if not runs:
            continue
        scores = torch.cat([_scores(spec, mask, run, query, key, bias) for run in runs], dim=-1)
        values = torch.cat([take(value, run, "bhke") for run in runs], dim=-2).to(dtype)
        top = scores.amax(-1)
        weights = (scores - finite(top).unsqueeze(-1)).exp_()
        total = weights.sum(-1)
        if spec.dropout is not None:
            keep = torch.cat([spec.dropout.keep(run) for run in runs], dim=-1)
            weights = spec.dropout.apply(weights, keep)
        out = weighted_values(weights, values, spec.guard)
        out = out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        take(output, rows, "bhqe").copy_(out)
        take(normaliser, rows, "bhqn").copy_(normaliser_of(top, total))
    return output, normaliser


def _scores(
    spec: ScoreSpec,
    mask: BoundMask | None,
    block: Block,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return spec.scores(
        take(query, block, "bhqe"),
        take(key, block, "bhke"),
        None if bias is None else take(bias, block, "bhqk"),
        None if mask is None else mask.allowed(block, query.device),
    )


def backward(
    spec: ScoreSpec, inputs: Inputs, done: Attended, grads: Cotangents, bias_grad: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias and sinks (None where not there or not wanted)."""
    query, key, value, bias, sinks = inputs
    output, normaliser = done.output, done.normaliser
    grad_output, grad_lse = grads.output, grads.lse
    spec = spec.guarded(query, key, value, bias=bias)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    dtype = normaliser.dtype
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(-1)  # rowsum(P * dP)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_sinks = None
    if sinks is not None:
        share = sink_weights(sinks, normaliser)
        grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    if not bias_grad and _is_for_fused(spec, query, key, bias):
        lse = logsumexp(normaliser)
        three = fused.backward(spec, query, key, value, bias, output, lse, grad_output, grad_lse)
        return *three, None, grad_sinks
    *three, grad_bias = _stream_backward(spec, inputs, normaliser, grad_output, delta)
    return *three, grad_bias if bias_grad else None, grad_sinks


def _stream_backward(
    spec: ScoreSpec, inputs: Inputs, normaliser: Tensor, grad_output: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value, bias, _ = inputs
    mask, dtype = spec.bind(), normaliser.dtype
    sources = [(query, "bhqe"), (key, "bhke")]
    if bias is not None:
        sources.append((bias, "bhqk"))
    totals = [torch.zeros_like(tensor, dtype=dtype) for tensor, _ in sources]
    grad_value = torch.zeros_like(value, dtype=dtype)
    for rows in blocks(spec.shape):
        for run in key_runs(mask, rows, query.device):
            allowed = None if mask is None else mask.allowed(run, query.device)
            pair = take(normaliser, run, "bhqn")
            centred, back, *_ = torch.func.vjp(
                partial(_centred, spec, allowed, pair),
                *(take(t, run, axes) for t, axes in sources),
            )
            weights = normalised(centred, pair)
            grad = take(grad_output, run, "bhqe").to(dtype)
            values = take(value, run, "bhke").to(dtype)
            values = clean(values) if spec.guard else values
            grad_weights, read = product(grad, values.mT), weights
            if spec.dropout is not None:
                keep = spec.dropout.keep(run)
                grad_weights, read = (spec.dropout.apply(t, keep) for t in (grad_weights, weights))
            grad_scores = weights * (grad_weights - take(delta, run, "bhq").unsqueeze(-1))
            for total, (_, axes), part in zip(totals, sources, back(grad_scores), strict=True):
                take(total, run, axes).add_(part)
            part = product_over_queries(read, grad, values.shape[1])
            take(grad_value, run, "bhke").add_(part)
    grad_query, grad_key, *rest = (
        total.to(tensor.dtype) for total, (tensor, _) in zip(totals, sources, strict=True)
    )
    return grad_query, grad_key, grad_value.to(value.dtype), rest[0] if rest else None


def _centred(
    spec: ScoreSpec,
    allowed: Tensor | None,
    normaliser: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    return spec.centred(query, key, bias, allowed, normaliser)
