"""The one adapter to PyTorch's private fused operators that give (output, lse).

    aten::_scaled_dot_product_flash_attention_for_cpu            (torch 2.2 and later)
    aten::_scaled_dot_product_flash_attention_for_cpu_backward

Traps that are dealt with here, and nowhere else:
- lse is 0.0 on a row without keys, and 0 is a legal lse: emptiness is read off the mask;
- a block of NaN scores counts as one without keys: the caller does not come here with NaN;
- a size of 0 ends the process (SIGFPE), a value longer than key is read past its end;
- Ev must equal E: the smaller one is padded with zeros;
- the last dimension is read with stride 1, whatever its stride is: others are copied;
- masks are additive, in the dtype of query: they are made for a few rows at a time;
- NaN behind a mask reaches the output: the caller does not come here then (`spec.guard`);
- the backward ignores the gradient of lse: one more column carries it, see `backward`;
- is_causal masks before it scales, and -inf * 0 is NaN: it is for positive scales only.

On CUDA the operators differ and this adapter declines; `kernels.blocked` streams there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import Block, even, split, take, whole
from .masks import Band
from .spec import ScoreSpec, accumulate_dtype, key_runs

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MASK_ELEMENTS = 1 << 22  # elements of an additive mask held at a time
ROWS = 512  # rows of one call: enough for the operator's speed, few enough to skip blocks


def unsupported_reason(spec: ScoreSpec, query: Tensor, bias: Tensor | None) -> str | None:
    """Why the fused operators cannot compute this, or None."""
    if query.device.type != "cpu":
        return f"they are for CPU tensors, got {query.device.type}"
    if spec.shape.empty:
        return "they cannot take a size of 0"
    if spec.softcap is not None:
        return "they have no softcap"
    if spec.dropout is not None:
        return "they drop other weights"
    if spec.guard:
        return "they read NaN and inf behind a mask"
    if query.dtype in (torch.float16, torch.bfloat16):
        return "their log-sum-exp of half precision is not exact to float32"
    if bias is not None and bias.dtype != query.dtype:
        return "they take a bias in the dtype of query only"
    return None


def forward(
    spec: ScoreSpec, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(output, lse) without sinks; lse is -inf on a row without keys."""
    size = value.shape[-1]
    width = max(query.shape[-1], size)
    q, k, v = (_widen(t, width) for t in (query, key, value))
    plan = _Plan(spec, bias)
    if plan.single:
        mask = plan.additive(whole(spec.shape), query)
        output, lse = _forward(q, k, v, 0.0, plan.is_causal, attn_mask=mask, scale=spec.scale)
        return output[..., :size], _mark_empty(lse, mask, plan.is_causal)
    output = query.new_zeros(*query.shape[:3], width)
    lse = query.new_full(query.shape[:3], -math.inf, dtype=accumulate_dtype(query.dtype))
    for rows in plan.rows(query):
        out_rows, lse_rows = take(output, rows, "bhqe"), take(lse, rows, "bhq")
        for run in key_runs(plan.mask, rows, query.device):
            mask = plan.additive(run, query)
            out, part = _forward(
                take(q, run, "bhqe"),
                take(k, run, "bhke"),
                take(v, run, "bhke"),
                attn_mask=mask,
                scale=spec.scale,
            )
            _merge(out_rows, lse_rows, out, _mark_empty(part, mask))
    return output[..., :size], lse


def backward(
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the gradients of output and lse, sinks included.

    The operator forms dS = P (dO Vᵀ - rowsum(dO * O)). One more column, 0 in Q, K and V, 1 in O
    and -grad_lse in dO, turns the last term into rowsum(dO * O) - grad_lse and nothing else.
    """
    e, ev = query.shape[-1], value.shape[-1]
    width = max(e, ev)
    if grad_lse is not None:
        one = output.new_ones(*output.shape[:3], 1)
        output = torch.cat([_widen(output, width), one], dim=-1)
        column = -grad_lse.unsqueeze(-1).to(grad_output.dtype)
        grad_output = torch.cat([_widen(grad_output, width), column], dim=-1)
        width = -(-(width + 1) // 8) * 8
    q, k, v, o, do = (_widen(t, width) for t in (query, key, value, output, grad_output))
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # its scores are all -inf: weights 0
    plan = _Plan(spec, bias)
    if plan.single:
        mask = plan.additive(whole(spec.shape), query)
        grads = _backward(
            do, q, k, v, o, lse, 0.0, plan.is_causal, attn_mask=mask, scale=spec.scale
        )
        return grads[0][..., :e], grads[1][..., :e], grads[2][..., :ev]
    dtype = accumulate_dtype(query.dtype)
    dq, dk, dv = (torch.zeros_like(t, dtype=dtype) for t in (q, k, v))
    for rows in plan.rows(query):
        for run in key_runs(plan.mask, rows, query.device):
            parts = _backward(
                *(take(t, run, "bhqe") for t in (do, q)),
                *(take(t, run, "bhke") for t in (k, v)),
                take(o, run, "bhqe"),
                take(lse, run, "bhq"),
                0.0,
                False,
                attn_mask=plan.additive(run, query),
                scale=spec.scale,
            )
            for total, axes, part in zip(
                (dq, dk, dv), ("bhqe", "bhke", "bhke"), parts, strict=True
            ):
                take(total, run, axes).add_(part)
    dq, dk, dv = (t.to(query.dtype) for t in (dq, dk, dv))
    return dq[..., :e], dk[..., :e], dv[..., :ev]


class _Plan:
    """How a call is cut into calls of the operator: in one, or a few rows at a time."""

    def __init__(self, spec: ScoreSpec, bias: Tensor | None) -> None:
        self.shape, self.bias = spec.shape, bias
        rest = tuple(m for m in spec.masks if not _is_plain_causal(m, spec))
        per_query = any(m.per_query for m in rest) or (bias is not None and bias.shape[2] != 1)
        self.single = not per_query
        self.is_causal = self.single and len(rest) < len(spec.masks)
        self.mask = replace(spec, masks=rest if self.single else spec.masks).bind()

    def rows(self, query: Tensor) -> Iterator[Block]:
        """Blocks of rows, so few that their additive mask fits."""
        full = whole(self.shape)
        row = self.additive(full._replace(queries=slice(0, 1)), query)
        planes = 1 if row is None else row.shape[0] * row.shape[1]
        size = min(max(MASK_ELEMENTS // (self.shape.keys * planes), 1), ROWS)
        for piece in split(full.queries, even(self.shape.queries, size)):
            yield full._replace(queries=piece)

    def additive(self, block: Block, query: Tensor) -> Tensor | None:
        """Bias, and -inf where masked, in the dtype of query, broadcastable to the block."""
        allowed = None if self.mask is None else self.mask.allowed(block, query.device)
        bias = None if self.bias is None else take(self.bias, block, "bhqk")
        if bias is None and allowed is None:
            return None
        if bias is None:
            bias = query.new_zeros(())
        if allowed is not None:
            bias = torch.where(allowed, bias, -math.inf)
        mask = bias.expand(-1, -1, -1, block.keys.stop - block.keys.start)
        return mask if mask.stride(-1) == 1 else mask.contiguous()


def _is_plain_causal(mask: object, spec: ScoreSpec) -> bool:
    """True for what the operator's own is_causal means: causal, aligned upper left."""
    if spec.scale < torch.finfo(torch.float32).tiny:  # it scales what it has masked already
        return False
    return isinstance(mask, Band) and mask.is_causal and mask.offset(spec.shape) == 0


def _widen(tensor: Tensor, width: int) -> Tensor:
    """The tensor with its last dimension padded to `width`, and of stride 1."""
    if tensor.shape[-1] < width:
        return pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mark_empty(lse: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """lse as a contiguous [B, H, L], -inf where the additive mask leaves no key."""
    if mask is None:
        return lse.contiguous()
    seen = mask != -math.inf
    if is_causal:  # the keys up to the query's own; the mask is [B or 1, H or 1, 1, S]
        own = torch.arange(lse.shape[2], device=mask.device).clamp(max=mask.shape[3] - 1)
        seen = (seen.cumsum(-1) > 0)[:, :, 0, own].unsqueeze(-1)
    return torch.where(seen.any(-1), lse, -math.inf)


def _merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges the result over more keys into (output, lse), in place."""
    total = torch.logaddexp(lse, part_lse)
    safe = total.masked_fill(total == -math.inf, 0.0)
    old, new = (lse - safe).exp().unsqueeze(-1), (part_lse - safe).exp().unsqueeze(-1)
    output.copy_(output * old + part * new)
    lse.copy_(total)
