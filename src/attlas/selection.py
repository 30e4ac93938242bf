"""The gradient of a few weights of each row, at known keys, in O(L·k) operations.

    weights[i, keys[i, n]] = exp(score - lse[i])

What `topk` and `max` find: which keys they are does not change with the inputs, their weights do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import ELEMENTS, split
from .spec import ScoreSpec


def backward(
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    keys: Tensor,
    values: Tensor,
    grad: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query, key, bias and lse, where wanted.

    Args:
        tensors: query, key, bias and lse of the readout.
        keys: `[B, H, L, n]`, -1 where a row had fewer.
        values: the weights at the keys. grad: their gradient.
    """
    query, key, bias, lse = tensors[:4]
    assert query is not None
    assert key is not None
    assert lse is not None
    batch, heads, kv_heads, queries, length = spec.shape
    count, size, dtype = keys.shape[-1], query.shape[-1], lse.dtype
    there = keys >= 0
    rise = (grad.to(dtype) * values.to(dtype)).masked_fill(~there, 0.0)  # d loss / d score
    totals = [torch.zeros_like(t, dtype=dtype) for t in (query, key)]
    grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None
    grad_keys = totals[1].flatten(0, 2)
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
    b, h = b.to(query.device), h.to(query.device)
    step = max(ELEMENTS // max(batch * heads * count * size, 1), 1)
    for rows in split(slice(0, queries), step):
        at, some = keys[:, :, rows].clamp(min=0), there[:, :, rows, :, None]
        q = query[:, :, rows, None].to(dtype).where(some, 0.0)
        k = key[b, h // spec.shape.group, at].to(dtype).where(some, 0.0)
        slope = rise[:, :, rows]
        if grad_bias is not None:
            place = (b, h, torch.arange(rows.start, rows.stop, device=at.device)[:, None], at)
            place = [i * 0 if n == 1 else i for i, n in zip(place, grad_bias.shape, strict=True)]
            grad_bias.index_put_(tuple(place), slope, accumulate=True)
        if spec.softcap is not None:
            capped = torch.tanh((q * k).sum(-1) * spec.scale / spec.softcap)
            slope = slope * (1 - capped.square())
        slope = (slope * spec.scale).unsqueeze(-1)
        totals[0][:, :, rows] = (slope * k).sum(-2)
        flat = (b * kv_heads + h // spec.shape.group) * length + at
        grad_keys.index_add_(0, flat.flatten(), (slope * q).flatten(0, 3))
    grads = [totals[0].to(query.dtype), grad_keys.view_as(key).to(key.dtype)]
    grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
    return [*grads, grad_bias, -rise.sum(-1)]
