"""The specification: dense attention in plain PyTorch, written for the reader.

    scores  = cap * tanh(scale * Q Kᵀ / cap) + bias       [B, H, L, S]
    scores  = -inf where the mask is False, or the bias -inf
    m       = max(scores, sink)                           [B, H, L], -inf on an empty row
    l       = Σ_j exp(scores_j - m) + exp(sink - m)       [B, H, L], 1 on an empty row
    weights = exp(scores - m) / l, 0 on an empty row      [B, H, L, S]
    output  = dropout(weights) V                          [B, H, L, Ev]

It holds all L x S scores, runs in the dtype that it is given (float64 for an oracle; half
precision is computed in float32), and is differentiable any number of times by autograd.
Every other implementation must equal it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import whole
from ..spec import ScoreSpec, accumulate_dtype, normaliser_of


class Dense(NamedTuple):
    """All that attention computes, dense; weights are those before dropout."""

    output: Tensor  # [B, H, L, Ev], in the dtype of query
    weights: Tensor  # [B, H, L, S], in the accumulation dtype
    normaliser: Tensor  # [B, H, L, 2], m and l, in the accumulation dtype
    log_weights: Tensor  # [B, H, L, S]; -inf where the weight is 0


def attention(
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    top: Tensor | None = None,
) -> Dense:
    """softmax(scores) V, and everything on the way, of 4-D query, key and value.

    `top` `[B, H, L]` is the m of the normaliser, where it is not the largest score.
    """
    spec, dtype = spec.guarded(query, key, value, bias=bias), accumulate_dtype(query.dtype)
    group = spec.shape.group
    q, k, v = (
        query.to(dtype),
        key.to(dtype).repeat_interleave(group, dim=1),
        value.to(dtype).repeat_interleave(group, dim=1),
    )
    allowed = _allowed(spec, query.device)
    if bias is not None:
        allowed = allowed & (bias != -math.inf)

    scores = _products(q, k, spec.guard, allowed) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias
    scores = torch.where(allowed, scores, -math.inf)

    # An empty row: the softmax of nothing. 0 stands in for its scores.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    logits = scores.masked_fill(empty, 0.0)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    if logits.shape[-1] == 0:
        logits = logits.new_zeros(*logits.shape[:-1], 1)  # no keys at all: every row is empty
    none = empty.squeeze(-1)
    top = logits.detach().amax(-1) if top is None else top.masked_fill(none, 0.0)
    total = (logits - top.unsqueeze(-1)).exp().sum(-1)
    pair = normaliser_of(top.masked_fill(none, -math.inf), total.masked_fill(none, 1.0))
    log_weights = logits.log_softmax(-1)[..., : spec.shape.keys]
    log_weights = torch.where(allowed & ~empty, log_weights, -math.inf)
    weights = torch.where(allowed & ~empty, logits.softmax(-1)[..., : spec.shape.keys], 0.0)
    read, dropout = weights, spec.dropout
    if dropout is not None:
        read = dropout.apply(weights, dropout.keep(whole(spec.shape)))
    output = _weighted_sum(read, v, spec.guard)
    return Dense(output.to(query.dtype), weights, pair, log_weights)


def _allowed(spec: ScoreSpec, device: torch.device) -> Tensor:
    """bool [B, H, L, S]: the conjunction of all masks."""
    shape = spec.shape
    allowed = torch.ones((), dtype=torch.bool, device=device)
    for mask in spec.masks:
        allowed = allowed & mask.block(whole(shape), device)
    return allowed.expand(shape.batch, shape.heads, shape.queries, shape.keys)


def _products(q: Tensor, k: Tensor, guard: bool, allowed: Tensor) -> Tensor:
    """Q Kᵀ; where an input may be NaN or inf, pair by pair, so that 0 is put for masked ones."""
    if not guard:
        return q @ k.mT
    pair = allowed[..., None]
    return (torch.where(pair, q[..., :, None, :], 0.0) * torch.where(pair, k[:, :, None], 0.0)).sum(
        -1
    )


def _weighted_sum(weights: Tensor, v: Tensor, guard: bool) -> Tensor:
    """weights V; where a value may be NaN or inf, pair by pair, without those of weight 0."""
    if not guard:
        return weights @ v
    return (weights[..., None] * torch.where(weights[..., None] != 0, v[:, :, None], 0.0)).sum(-2)
