"""Attention with dense weights: the teaching function, in one buffer of L x S.

    weights = softmax(Q Kᵀ / sqrt(E))        output = weights V

Plain PyTorch operators, so that autograd differentiates it any number of times. Scores are
scaled inside of the matrix product and, where no gradient is wanted, the softmax overwrites
them: one L x S buffer is touched where three plain lines touch three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import Shape, whole
from .kernels import reference
from .masks import Mask
from .spec import ScoreSpec, accumulate_dtype, is_finite


def plain(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(output, weights) of `[..., L, E]`, `[..., S, E]` and `[..., S, Ev]` without a mask."""
    lead = query.shape[:-2]
    if len(lead) != 1:
        query, key, value = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    weights = _softmax(_scores(query, key), query)
    output = torch.bmm(weights, value)
    if len(lead) != 1:
        return output.view(*lead, *output.shape[1:]), weights.view(*lead, *weights.shape[1:])
    return output, weights


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """(output, weights) of 4-D query, key and value, with weights 0 where masked."""
    shape = Shape(*query.shape[:2], key.shape[1], query.shape[2], key.shape[2])
    if shape.empty or not is_finite(query, key, value):
        spec = ScoreSpec(shape, 1 / math.sqrt(query.shape[-1]), masks=(mask,), guard=True)
        result = reference.attention(spec, query, key, value)
        return result.output, result.weights.to(query.dtype)
    q, k, v = (t.flatten(0, 1) for t in (query, key, value))
    masked_out = ~mask.block(whole(shape), query.device)
    scores = _scores(q, k).view(*shape[:2], *shape[3:]).masked_fill_(masked_out, -math.inf)
    empty = masked_out.all(-1, keepdim=True)
    if bool(empty.any()):  # the softmax of nothing is 0, and so is its gradient
        weights = _softmax(scores.masked_fill(empty, 0.0), query).masked_fill(empty, 0.0)
    else:
        weights = _softmax(scores, query)
    output = torch.bmm(weights.flatten(0, 1), v)
    return output.view(*shape[:2], *output.shape[1:]), weights


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Q Kᵀ / sqrt(E) of 3-D tensors, in the accumulation dtype, as a new buffer."""
    dtype = accumulate_dtype(query.dtype)
    if query.dtype != dtype:
        query, key = query.to(dtype), key.to(dtype)
    scale = 1 / math.sqrt(query.shape[-1])
    return torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)


def _softmax(scores: Tensor, query: Tensor) -> Tensor:
    """The softmax over keys in the dtype of query; in place where autograd does not look."""
    if scores.dtype != query.dtype:
        return scores.softmax(-1).to(query.dtype)
    if scores.requires_grad:
        return scores.softmax(-1)
    return torch.softmax(scores, -1, out=scores)
