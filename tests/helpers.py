"""What several test files need: inputs, the plain computation, and a tolerance derived from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attlas
from attlas.kernels import native

# Every implementation: the specification, and those that must equal it.
_reason = native.unsupported_reason(torch.zeros(1))
NATIVE = pytest.param("native", marks=pytest.mark.skipif(_reason is not None, reason=str(_reason)))
KERNELS = ["blocked", NATIVE]
IMPLS = ["reference", *KERNELS]


def qkv(
    batch: int = 2,
    heads: int = 2,
    queries: int = 5,
    keys: int | None = None,
    size: int = 4,
    value_size: int | None = None,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, `[B, H, L, E]`."""
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = (
        (batch, heads, queries, size),
        (batch, kv_heads, keys, size),
        (batch, kv_heads, keys, size if value_size is None else value_size),
    )
    return tuple(torch.randn(s, dtype=torch.float32).to(dtype).requires_grad_(grad) for s in shapes)


def allowed_pairs(queries: int, keys: int, is_causal, alignment, window) -> Tensor:
    """The band of is_causal and window_size as a bool matrix, pair by pair from its definition."""
    offset = keys - queries if alignment == "lower_right" else 0
    left, right = (None, None) if window is None else window
    rows = []
    for i in range(queries):
        own = i + offset
        rows.append(
            [
                (not is_causal or j <= own)
                and (left is None or j >= own - left)
                and (right is None or j <= own + right)
                for j in range(keys)
            ]
        )
    return torch.tensor(rows, dtype=torch.bool).view(queries, keys)


def plain_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scores in a few plain lines, in the dtype of query, -inf where masked."""
    queries, keys = query.shape[-2], key.shape[-2]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    allowed = allowed_pairs(queries, keys, is_causal, causal_alignment, window_size)
    if mask is not None:
        allowed = allowed & (mask != 0)
    return scores.masked_fill(~allowed, -math.inf)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, weights, lse) in a few plain lines, all in the dtype of query: no attlas inside."""
    if options.get("enable_gqa"):
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = plain_scores(query, key, mask, **options)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    logits = scores.masked_fill(empty, 0.0)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column.to(logits.dtype)], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[-2]].masked_fill(empty, 0.0)
    lse = logits.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights @ value, weights, lse


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities differ by 0, and NaN by infinity."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"shapes differ: {list(a.shape)} and {list(b.shape)}"
    if not a.numel():
        return 0.0
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(math.inf).max())


def rounding(dtype: torch.dtype, value: Tensor) -> float:
    """One rounding of a dtype, at the largest magnitude of `value`."""
    finite = value.detach()[value.isfinite()].abs()
    return torch.finfo(dtype).eps * (float(finite.max()) if finite.numel() else 0.0)


def rms(*tensors: Tensor) -> float:
    """The root of the mean square of all elements, NaN counted as infinite.

    Errors of two computations are compared by it: with n elements it is known to a share of about
    sqrt(1 / 2n), where the largest error of each is a matter of chance. On the models and layers of
    these tests, over 40 seeds, the largest errors of two computations that are equally exact differ
    by factors of up to 4, either way; their rms by less than 1.9, and in whole models 1.3.
    """
    squares = torch.cat([t.detach().double().square().flatten() for t in tensors])
    return float(squares.nan_to_num(math.inf, math.inf).mean().sqrt())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN like NaN, with one shape and dtype."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a == b) | a.isnan()).all())
    )


def grads(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the tensors, zeros where loss does not depend on one."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return tuple(
        torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)
    )


def penalty(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A penalty that differs between all pairs, for `guided`."""
    return torch.cos(batch + 2.0 * head + 3.0 * query - key)


def statistics_of(weights: attlas.AttentionWeights, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Every readout of lazy weights that is a floating tensor; x is `[S, D]` and y `[L, D]`."""
    keys = weights.shape[-1]
    return {
        "entropy": weights.entropy(),
        "max": weights.max().values,
        "topk": weights.topk(min(3, keys)).values,
        "mass": weights.mass(slice(1, None, 2)),
        "sink_mass": weights.sink_mass(),
        "mean_distance": weights.mean_distance(),
        "expected_position": weights.expected_position(),
        "windowed_mass": weights.windowed_mass(2, 1),
        "windowed_mass left": weights.windowed_mass(None, 0),
        "guided": weights.guided(penalty),
        "received sum": weights.received(),
        "received mean": weights.received("mean", queries=slice(0, None, 2)),
        "received max": weights.received("max"),
        "received weighted": weights.received(query_weights=y[:, 0]),
        "top_keys": weights.top_keys(min(3, keys)).values,
        "pool max": weights.pool((2, 3), how="max"),
        "pool mass": weights.pool((5, 2), how="mass"),
        "weights @ x": weights @ x,
        "weights.T @ y": weights.T @ y,
        "map_rows": weights.map_rows(lambda rows: rows.square().sum(-1)),
        "to_dense": weights.to_dense(),
        "row": weights[..., -1, :],
    }


def dense_statistics(
    weights: Tensor, lse: Tensor, sinks: Tensor | None, x: Tensor, y: Tensor, offset: int
) -> dict[str, Tensor]:
    """The same readouts in plain PyTorch from dense weights `[B, H, L, S]`."""
    queries, keys = weights.shape[-2:]
    own = torch.arange(queries)[:, None] + offset
    ahead = torch.arange(keys) - own
    distance = ahead.abs()
    batch, heads = (
        torch.arange(n).view(-1, *[1] * d) for n, d in zip(weights.shape[:2], (3, 2), strict=True)
    )
    cost = penalty(batch, heads, own - offset, torch.arange(keys)).to(weights.dtype)
    sink = torch.zeros_like(lse)
    if sinks is not None:
        sink = (sinks.view(1, -1, 1) - lse).exp().masked_fill(lse == -math.inf, 0.0)
    return {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "max": weights.amax(-1),
        "topk": weights.topk(min(3, keys), -1).values,
        "mass": weights[..., 1::2].sum(-1),
        "sink_mass": sink,
        "mean_distance": (weights * distance).sum(-1),
        "expected_position": (weights * torch.arange(keys)).sum(-1),
        "windowed_mass": (weights * ((ahead >= -2) & (ahead <= 1))).sum(-1),
        "windowed_mass left": (weights * (ahead <= 0)).sum(-1),
        "guided": (weights * cost).sum(-1),
        "received sum": weights.sum(-2),
        "received mean": weights[..., ::2, :].mean(-2),
        "received max": weights.amax(-2),
        "received weighted": (weights * y[:, :1]).sum(-2),
        "top_keys": weights.sum(-2).topk(min(3, keys), -1).values,
        "pool max": cells(weights, 2, 3, "max"),
        "pool mass": cells(weights, 5, 2, "mass"),
        "weights @ x": weights @ x,
        "weights.T @ y": weights.mT @ y,
        "map_rows": weights.square().sum(-1),
        "to_dense": weights,
        "row": weights[..., -1, :],
    }


def cells(weights: Tensor, rows: int, columns: int, how: str) -> Tensor:
    """`pool` by loops over the cells."""
    lines = []
    for line in weights.split(rows, dim=-2):
        parts = line.split(columns, dim=-1)
        lines.append([p.amax((-2, -1)) if how == "max" else p.sum((-2, -1)) for p in parts])
    return torch.stack([torch.stack(line, -1) for line in lines], -2)


class Watch(TorchDispatchMode):
    """Records which operators run, and the most elements of any tensor that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                # What a tensor holds, not what it shows: an expanded view holds little.
                self.largest = max(self.largest, tensor.untyped_storage().size() // tensor.itemsize)
        return result

    @property
    def products(self) -> list[str]:
        """The operators that multiply matrices."""
        return [n for n in self.names if "mm" in n or "matmul" in n or "attention" in n]
