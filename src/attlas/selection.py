"""The gradient of a few weights of each row, at known keys, in O(L·k) operations and memory.

    weights[i, keys[i, n]] = exp(score - m[i]) / l[i]

What `topk` and `max` find: which keys they are does not change with the inputs, their weights do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import ELEMENTS, split
from .spec import ScoreSpec, normaliser_gradient


def backward(
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    keys: Tensor,
    values: Tensor,
    grad: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query, key, bias and normaliser, where wanted.

    Args:
        tensors: query, key, bias and normaliser of the readout.
        keys: `[B, H, L, n]`, -1 where a row had fewer.
        values: the weights at the keys. grad: their gradient.
    """
    query, key, bias, normaliser = tensors[:4]
    assert query is not None
    assert key is not None
    assert normaliser is not None
    batch, heads, kv_heads, queries, length = spec.shape
    size, dtype, device, there = query.shape[-1], normaliser.dtype, query.device, keys >= 0
    rise = (grad.to(dtype) * values.to(dtype)).masked_fill(~there, 0.0)  # d loss / d score
    b, h, i = (torch.arange(n, device=device) for n in (batch, heads, queries))
    b, h, i, at = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), keys.clamp(min=0)
    grad_bias = None
    if bias is not None and wanted[2]:
        grad_bias = torch.zeros_like(bias, dtype=dtype)
        place = zip((b, h, i, at), bias.shape, strict=True)
        grad_bias.index_put_(tuple(x * 0 if n == 1 else x for x, n in place), rise, accumulate=True)
        grad_bias = grad_bias.to(bias.dtype)
    # The pairs as rows of all queries and rows of all keys, and the slope between them.
    row = ((b * heads + h) * queries + i).expand_as(at)[there]
    column = ((b * kv_heads + h // spec.shape.group) * length + at)[there]
    slope = rise[there] * spec.scale
    q, k = query.reshape(-1, size).to(dtype), key.reshape(-1, size).to(dtype)
    if spec.softcap is not None:
        for some in split(slice(0, len(slope)), max(ELEMENTS // size, 1)):
            scores = (q[row[some]] * k[column[some]]).sum(-1) * spec.scale
            slope[some] *= 1 - torch.tanh(scores / spec.softcap).square()
    grad_query = _sparse_product(row, column, slope, k, len(q)).view_as(query).to(query.dtype)
    grad_key = _sparse_product(column, row, slope, q, len(k)).view_as(key).to(key.dtype)
    return [grad_query, grad_key, grad_bias, normaliser_gradient(-rise.sum(-1), normaliser)]


def _sparse_product(row: Tensor, column: Tensor, values: Tensor, x: Tensor, size: int) -> Tensor:
    """A @ x `[size, E]` for the sparse matrix A of these values."""
    where, shape = torch.stack([row, column]), (size, len(x))
    return torch.sparse_coo_tensor(where, values, shape, check_invariants=False) @ x
