"""Attention rollout over layers: a chain of products with the weights, never a matrix.

R = A_n ⋯ A_2 A_1,    A_l = residual I + (1 - residual) mean over heads of W_l
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import checks
from .dropped import DroppedWeights
from .heads import HeadMean
from .matrix import LazyMatrix
from .weights import AttentionWeights


def rollout(
    weights: Sequence[LazyMatrix], *, start: int | Sequence[int] | Tensor, residual: float = 0.5
) -> Tensor:
    """start @ A_n ⋯ A_1: how much of each input position reaches some positions of the output.

    A_l = residual I + (1 - residual) W_l, where W_l is the mean over heads of the weights of
    layer l, and I the residual connection. One pass over the weights of each layer, O(L) memory
    for each row of `start`, differentiable. A row of A_l sums to 1 where that of W_l does; one
    without keys (or with sinks) keeps what the residual connection brings, and is not rescaled.

    Args:
        weights: lazy weights of each layer, in the order in which the layers run; square, of the
            same number of tokens (`[B, H, L, L]`, or `[B, L, L]`: a head mean, or one head). Of
            `weights.dropped` it is the head mean of the weights after dropout.
        start: where the rollout is read, a position of the output (0 for a class token in front,
            -1 for the last token), or several; or a floating tensor of weights of the positions,
            `[L]`, `[n, L]` or `[B, n, L]`.
        residual: the share of the residual connection, from 0 to 1.

    Returns:
        `[B, L]` for one position or an `[L]`, else `[B, n, L]`: rows of R, or of start @ R.

    Raises:
        TypeError: weights is no sequence of lazy weights, or start no position and no tensor.
        ValueError: shapes do not fit, or residual is not from 0 to 1.
        IndexError: a position is out of range.

    Example:
        >>> import torch, attlas
        >>> layers = torch.randn(12, 2, 4, 50, 16)
        >>> weights = [attlas.attention(x, x, x).weights for x in layers]
        >>> relevance = attlas.rollout(weights, start=0)
        >>> relevance.shape, relevance.sum(-1)
        (torch.Size([2, 50]), tensor([1.0000, 1.0000]))

    References:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, equation 1 (their
        rows are rescaled; where nothing is masked away and without sinks, that changes nothing).
    """
    layers = layers_of(weights)
    check_residual(residual)
    rows, single = _start(start, layers[-1])
    for layer in reversed(layers):  # (row Aᵀ...)ᵀ: the transposed weights, from the last layer
        moved = layer._transposed_matmul(rows.mT)
        rows = residual * rows + (1 - residual) * moved.mT
    return rows.squeeze(-2) if single else rows


def check_residual(residual: Any) -> None:
    """Checks the share of the residual connection."""
    mend = "it is the share of the identity in each layer"
    checks.number("residual", residual, positive=False, mend=mend)
    if not 0 <= residual <= 1:
        checks.fail(ValueError, "residual", "be from 0 to 1", residual, mend)


def layers_of(weights: Any) -> list[LazyMatrix]:
    """The weights of each layer, without heads."""
    rule, mend = "be a sequence of lazy weights", "pass [layer_1.weights, layer_2.weights, ...]"
    if isinstance(weights, LazyMatrix | Tensor) or not isinstance(weights, Sequence):
        checks.fail(TypeError, "weights", rule, type(weights).__name__, mend)
    if not weights:
        checks.fail(ValueError, "weights", "have a layer", "none", mend)
    layers: list[LazyMatrix] = []
    for place, layer in enumerate(weights):
        if not isinstance(layer, LazyMatrix):
            checks.fail(
                TypeError, f"weights[{place}]", "be lazy weights", type(layer).__name__, mend
            )
        heads = layer.ndim == 4 and isinstance(layer, AttentionWeights | DroppedWeights)
        # Of a mean only products and evaluate(Dense) are read, which dropped weights have, too.
        mean = HeadMean(cast(AttentionWeights, layer)) if heads else layer
        *_, queries, keys = mean.shape
        if queries != keys or (layers and mean.shape != layers[0].shape):
            rule = "be square" if queries != keys else f"have the shape {list(layers[0].shape)}"
            mend = "all layers read the same tokens (self-attention)"
            checks.fail(ValueError, f"weights[{place}]", rule, list(layer.shape), mend)
        layers.append(mean)
    return layers


def _start(start: Any, layer: LazyMatrix) -> tuple[Tensor, bool]:
    """start as rows `[..., n, L]`, and whether it was one row."""
    size, dtype = layer.shape[-1], layer._like.dtype
    if isinstance(start, Tensor) and start.is_floating_point():
        if start.ndim not in (1, 2, layer.ndim) or start.shape[-1] != size:
            rule = f"be [L], [n, L] or [B, n, L], L={size}"
            mend = "pass a position, or weights of the positions"
            checks.fail(ValueError, "start", rule, list(start.shape), mend)
        checks.same_device("start", start, layer.device)
        return (start[None] if start.ndim == 1 else start).to(dtype), start.ndim == 1
    positions, single = positions_of(start, size, "be a position, positions or a floating tensor")
    rows = torch.zeros(len(positions), size, dtype=dtype, device=layer.device)
    at = torch.tensor(positions, dtype=torch.long, device=layer.device)
    return rows.scatter(1, at[:, None], 1.0), single


def positions_of(start: Any, size: int, rule: str) -> tuple[list[int], bool]:
    """start as positions from 0 to size - 1, and whether it was one."""
    single = isinstance(start, int) and not isinstance(start, bool)
    positions = start.tolist() if isinstance(start, Tensor) else [start] if single else start
    if not isinstance(positions, list | tuple | range) or not all(
        isinstance(p, int) and not isinstance(p, bool) for p in positions
    ):
        checks.fail(TypeError, "start", rule, type(start).__name__, "write start=0")
    if any(not -size <= p < size for p in positions):
        mend = "check it against the number of tokens"
        checks.fail(IndexError, "start", f"be from {-size} to {size - 1}", start, mend)
    return [p % size for p in positions], single
