"""Attention with dense weights: the teaching function, in one buffer of L x S.

    weights = softmax(Q Kᵀ / sqrt(E))        output = weights V

On a CPU, where no gradient is wanted, the native kernel writes both in one pass. Else plain
PyTorch operators do, so that autograd differentiates any number of times: scores are scaled
inside of the matrix product and, without a gradient, the softmax overwrites them: one L x S
buffer is touched where three plain lines touch three. With a mask, an output that is not finite
tells that a row is empty or that NaN or inf was given; only then is it computed again, with
care for what is behind the mask.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .blocks import Shape
from .kernels import native
from .masks import from_tensor
from .spec import (
    Inputs,
    ScoreSpec,
    full_precision,
    is_finite,
    weighted_values,
)

FULL = (torch.float32, torch.float64)  # what sums have, too
SMALL = 1 << 14  # scores below which calls are what costs time, and the fewest are best
NATIVE_SCORES = 1 << 20  # scores above which one call of the native kernel is faster


@full_precision
def attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output, weights) of `[..., L, E]`, `[..., S, E]` and `[..., S, Ev]`.

    `allowed` is bool, broadcastable to `[..., L, S]`.
    """
    *lead, _, size = query.shape
    scores = query.numel() * key.shape[-2] // size
    if allowed is None and scores < SMALL and query.dtype in FULL:
        weights = (query @ key.mT).mul_(size**-0.5).softmax(-1)
        return weights @ value, weights
    large = scores >= NATIVE_SCORES and not _graph(query, key, value)
    if large and native.is_available(query):
        return _native(query, key, value, allowed, lead)
    if len(lead) != 1:
        query, key, value = _three(query), _three(key), _three(value)
    if allowed is None:
        weights = _softmax(_scores(query, key), query)
        output = torch.bmm(weights, value)
    else:
        output, weights = _masked(query, key, value, allowed, lead)
    if len(lead) != 1:
        return output.view(*lead, *output.shape[1:]), weights.view(*lead, *weights.shape[1:])
    return output, weights


def _graph(*inputs: Tensor) -> bool:
    """True when autograd records."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _native(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, lead: list[int]
) -> tuple[Tensor, Tensor]:
    heads = lead[-1] if len(lead) > 1 else 1
    four = (math.prod(lead) // max(heads, 1), heads)
    q, k, v = (t.reshape(*four, *t.shape[-2:]) for t in (query, key, value))
    if allowed is not None and allowed.ndim > 2 and len(lead) != 2:
        rows = allowed.shape[-2:]
        allowed = allowed.expand(*lead, *rows).reshape(*four, *rows)
    masks = () if allowed is None else (from_tensor(allowed),)
    shape = Shape(*four, heads, q.shape[2], k.shape[2])
    spec = ScoreSpec(shape, 1 / math.sqrt(q.shape[-1]), masks=masks)
    output, weights = native.dense(spec, Inputs(q, k, v, None, None))
    return output.view(*lead, *output.shape[2:]), weights.view(*lead, *weights.shape[2:])


def _three(tensor: Tensor) -> Tensor:
    """[..., L, E] as [N, L, E]."""
    return tensor.flatten(0, -3) if tensor.ndim > 3 else tensor.unsqueeze(0)


def _masked(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, lead: list[int]
) -> tuple[Tensor, Tensor]:
    inputs = (query, key, value)
    if key.shape[1] and (not _graph(*inputs) or is_finite(*inputs)):
        scores = _scores(query, key)
        full = scores.view(*lead, *scores.shape[1:])
        weights = _softmax(full.masked_fill_(~allowed, -math.inf).view_as(scores), query)
        output = torch.bmm(weights, value)
        if output.numel() and is_finite(output):
            return output, weights
    return _careful(*inputs, allowed.expand(*lead, query.shape[1], key.shape[1]))


def _careful(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """As `_masked`, right for empty rows, and for NaN and inf behind the mask."""
    q, k, v = (t.unsqueeze(1) for t in (query, key, value))
    shape = Shape(len(q), 1, 1, q.shape[2], k.shape[2])
    allowed = allowed.reshape(len(q), 1, *shape[3:])
    guard = not is_finite(query, key, value)
    spec = ScoreSpec(shape, 1 / math.sqrt(q.shape[-1]), guard=guard)
    scores = spec.scores(q, k, None, allowed)
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~allowed, 0.0)
    output = weighted_values(weights, v.to(weights.dtype), guard)
    return output.squeeze(1).to(query.dtype), weights.squeeze(1).to(query.dtype)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What baddbmm adds with beta=0, which it does not read."""
    return torch.zeros((), dtype=dtype, device=device)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Q Kᵀ / sqrt(E) of 3-D tensors, in the accumulation dtype, as a new buffer."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    scale = 1 / math.sqrt(query.shape[-1])
    if torch.compiler.is_compiling():
        return torch.bmm(query, key.mT) * scale  # which the compiler fuses
    nothing = _nothing(query.dtype, query.device)
    return torch.baddbmm(nothing, query, key.mT, beta=0, alpha=scale)


def _softmax(scores: Tensor, query: Tensor) -> Tensor:
    """The softmax over keys in the dtype of query; in place where autograd does not look."""
    if scores.dtype != query.dtype:
        return scores.softmax(-1).to(query.dtype)
    if scores.requires_grad:
        return scores.softmax(-1)
    return torch.softmax(scores, -1, out=scores)
