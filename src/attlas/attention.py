"""The two functions: `scaled_dot_product_attention`, as taught, and `attention`, with every option.

output = softmax(Q Kᵀ · scale) V
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, compute, dense, ops
from .blocks import Shape, whole
from .dropout import Dropout
from .kernels import native
from .masks import Mask, causal, from_tensor, sliding_window
from .spec import Inputs, ScoreSpec
from .weights import AttentionWeights


class AttentionResult(NamedTuple):
    """What `attention` returns."""

    output: Tensor
    weights: AttentionWeights


def scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | Mask | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / sqrt(E)) V and the weights softmax(Q Kᵀ / sqrt(E)), two tensors.

    The function exactly as taught. A query that may attend to no key has weights 0 and output
    0. The weights are dense, O(L·S) memory; `attention` gives them without.

    Args:
        Q: `[..., L, E]`, floating.
        K: `[..., S, E]`.
        V: `[..., S, Ev]`.
        mask: 1 or True where a query may attend, 0 or False where not; bool, integer or
            floating, broadcastable to `[..., L, S]`, so that `[batch, 1, S]` masks keys
            (padding) and `[batch, L, S]` masks pairs (a causal decoder). Or a rule from
            `attlas.masks`.

    Returns:
        output `[..., L, Ev]` and weights `[..., L, S]`, in the dtype of Q.

    Raises:
        TypeError: an input is not a tensor.
        ValueError: shapes, dtypes or devices do not fit, or the mask holds other values.

    Example:
        >>> import torch, attlas
        >>> _ = torch.manual_seed(0)
        >>> Q, K, V = (torch.randn(2, 3, 4) for _ in range(3))
        >>> output, weights = attlas.scaled_dot_product_attention(Q, K, V)
        >>> output[0, 0]
        tensor([0.2957, 0.3332, 0.0674, 0.2081])
        >>> weights[0, 0]
        tensor([0.4537, 0.3877, 0.1586])

    References:
        Vaswani et al., Attention Is All You Need, 2017, equation 1.
    """
    checks.qkv(Q, K, V, False, ("Q", "K", "V"))
    if mask is None:
        return dense.attention(Q, K, V)
    lead = Q.shape[:-2]
    if isinstance(mask, Mask):
        batch, heads = (*lead, 1, 1)[:2] if len(lead) < 3 else (lead.numel(), 1)
        shape = Shape(batch, heads, heads, Q.shape[-2], K.shape[-2])
        mask.check(shape)
        allowed = mask.block(whole(shape), Q.device).expand(batch, heads, *shape[3:])
        allowed = allowed.reshape(*lead, *shape[3:])
    else:
        allowed = _checked(mask, (*lead, Q.shape[-2], K.shape[-2]), Q.device)
    return dense.attention(Q, K, V, allowed)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Mask | None = None,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> AttentionResult:
    """softmax(scores) V, and the weights softmax(scores) without materialising them.

    scores = softcap(scale * Q Kᵀ) + bias, where the mask allows. A query that may attend to no
    key has output 0, weights 0, lse -inf and gradients 0. Memory is O(L), forward and backward.

        causal, L = 3, S = 5      upper_left      lower_right
                                  1 0 0 0 0       1 1 1 0 0
                                  1 1 0 0 0       1 1 1 1 0
                                  1 1 1 0 0       1 1 1 1 1

    B batch, Hq query heads, Hkv key and value heads, L queries, S keys, E and Ev head sizes.

    Args:
        query: `[B, Hq, L, E]`, `[B, L, E]` or `[L, E]`; float16, bfloat16, float32 or float64.
        key: `[B, Hkv, S, E]`, with as many dimensions as query.
        value: `[B, Hkv, S, Ev]`.
        mask: True or 1 where a query may attend; broadcastable to `[B, Hq, L, S]`. Or a rule
            from `attlas.masks`, which needs no L x S memory.
        bias: added to the scaled scores; floating, broadcastable like mask; may need a gradient.
            Where it is -inf it is a mask: what is behind it is not read.
        is_causal: a query sees its own position and those before it; combines with mask.
        causal_alignment: "upper_left" or "lower_right": the own position of query i is key i or
            key i + S - L. It holds for is_causal and window_size, and matters when L != S.
        window_size: (left, right), how many keys before and after the own position are seen,
            None for all of them.
        softcap: cap * tanh(score / cap), before bias and mask.
        sinks: `[Hq]` logits that take part in the softmax and give nothing to the output.
        scale: what scores are multiplied with; default 1 / sqrt(E).
        enable_gqa: query heads in groups share a key head, Hkv divides Hq.
        dropout_p: the chance from 0 to 1 that a weight is dropped, as in training: the output is
            (weights * keep / (1 - dropout_p)) V. Which are kept follows from a seed of torch's
            default generator and from positions, and is the same in every implementation.
            `weights`, lse and statistics are those before, `weights.dropped` those after it.
        impl: "auto", or "native" (C++, CPU), "blocked" (PyTorch, any device), "reference" (dense,
            the specification). An explicit choice never falls back.

    Returns:
        output `[B, Hq, L, Ev]` in the dtype of query, and `AttentionWeights`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes, dtypes, devices or values do not fit.
        NotImplementedError: the chosen implementation cannot do this.

    Example:
        >>> import torch, attlas
        >>> q = torch.randn(1, 8, 100, 64)
        >>> output, weights = attlas.attention(q, q, q, is_causal=True)
        >>> weights
        AttentionWeights(shape=[1, 8, 100, 100], dtype=torch.float32, lazy, 320 kB if dense)
        >>> weights[0, 3, 10:20].shape, weights.entropy().shape
        (torch.Size([10, 100]), torch.Size([1, 8, 100]))

    References:
        Vaswani et al., 2017, equation 1. Dao et al., FlashAttention, 2022, algorithms 1 and 4:
        weights are recovered from the log-sum-exp. Srivastava et al., Dropout, 2014.
    """
    return _attention(
        query,
        key,
        value,
        mask,
        (),
        bias=bias,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        impl=impl,
    )


def attention_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Mask | None = None,
    *,
    statistics: Sequence[str] = ("entropy", "received", "max"),
    **options: Any,
) -> AttentionResult:
    """As `attention`, with statistics of the weights found in the same pass as the output.

    `weights.entropy()`, `weights.received()` (also its mean) and `weights.max()` are then there
    already, for a few percent of the time of the output, where each would be a pass of its own.

    Args:
        query, key, value, mask: as of `attention`.
        statistics: some of "entropy", "received" and "max".
        options: the options of `attention`.

    Returns:
        output `[B, Hq, L, Ev]` in the dtype of query, and `AttentionWeights`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`; or a statistic is another.

    Example:
        >>> import torch, attlas
        >>> q = torch.zeros(1, 1, 3, 4)
        >>> output, weights = attlas.attention_statistics(q, q, q, is_causal=True)
        >>> weights.entropy(), weights.received()
        (tensor([[[0.0000, 0.6931, 1.0986]]]), tensor([[[1.8333, 0.8333, 0.3333]]]))
    """
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    for name in names:
        checks.choice("statistics", name, compute.FOUND)
    known = [name for name in compute.FOUND if name in names]
    return _attention(query, key, value, mask, known, **options)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Mask | None,
    also: Sequence[str],
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> AttentionResult:
    """`attention`, with the statistics in `also` of the same pass."""
    checks.flag("enable_gqa", enable_gqa)
    checks.qkv(query, key, value, enable_gqa, ("query", "key", "value"))
    checks.dimensions(query)
    q, k, v = _four_dimensions(query), _four_dimensions(key), _four_dimensions(value)
    (batch, heads, queries, size), (_, kv_heads, keys, _) = q.shape, k.shape
    shape, lead = Shape(batch, heads, kv_heads, queries, keys), tuple(query.shape[:-2])
    full = (*lead, *shape[3:])
    checks.flag("is_causal", is_causal)
    checks.choice("causal_alignment", causal_alignment, ("upper_left", "lower_right"))
    if softcap is not None:
        checks.number("softcap", softcap, positive=True, mend="pass None for no cap")
        checks.in_range("softcap", softcap, q, positive=True)
    if scale is not None:
        checks.number("scale", scale, positive=False, mend="pass None for 1 / sqrt(E)")
        checks.in_range("scale", scale, q, positive=False)
    checks.probability("dropout_p", dropout_p)
    if sinks is not None:
        checks.sinks(sinks, q, shape.heads)
    if bias is not None:
        bias = _bias(bias, query, full)
    masks = [] if mask is None else [_mask(mask, full, shape, q.device)]
    if is_causal:
        masks.append(causal(causal_alignment))
    if window_size is not None:
        checks.window("window_size", window_size)
        masks.append(sliding_window(*window_size, alignment=causal_alignment))
    spec = ScoreSpec(
        shape=shape,
        scale=1 / math.sqrt(size) if scale is None else float(scale),
        softcap=softcap,
        masks=tuple(masks),
        alignment=causal_alignment,
    )
    impl = _choose(impl, q)
    inputs = Inputs(q, k, v, bias, sinks)
    dropout = Dropout.draw(dropout_p, q.device) if dropout_p else None
    drawn = spec if dropout is None else replace(spec, dropout=dropout)
    output, normaliser, found = ops.attend(impl, drawn, inputs, also)
    weights = AttentionWeights(q, k, bias, sinks, normaliser, spec, impl, lead, found, dropout)
    if not normaliser.requires_grad and any(t is not None and t.requires_grad for t in inputs):
        weights = weights.detach()  # a gradient without the normaliser's would be half of it
    if query.ndim != 4:
        output = output.reshape(*lead, *output.shape[2:])
    return AttentionResult(output, weights)


def _choose(impl: str, query: Tensor) -> str:
    """The implementation: the first that can for "auto", else the one that is named."""
    match impl:
        case "auto":
            return "native" if native.is_available(query) else "blocked"
        case "native":
            reason = native.unsupported_reason(query)
        case "blocked" | "reference":
            reason = None
        case "triton":
            reason = "this version has no Triton kernels"
        case _:
            names = ("auto", "reference", "blocked", "native")
            checks.fail(ValueError, "impl", f"be one of {names}", repr(impl), "choose one of these")
    if reason is not None:
        mend = f"{reason}; choose 'auto' to take what there is"
        checks.fail(NotImplementedError, "impl", "be able to do this call", repr(impl), mend)
    return impl


def _four_dimensions(tensor: Tensor) -> Tensor:
    """[B, H, L, E]: one head for [B, L, E], one batch item and one head for [L, E]."""
    if tensor.ndim == 4:
        return tensor
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor[None, None]


def _align(tensor: Tensor, ndim: int) -> Tensor:
    """What broadcasts to [..., L, S] of `ndim` dimensions, with four: [B or 1, H or 1, ...]."""
    tensor = tensor[(None,) * (ndim - tensor.ndim)] if tensor.ndim < ndim else tensor
    return _four_dimensions(tensor)


def _mask(mask: Tensor | Mask, full: tuple[int, ...], shape: Shape, device: torch.device) -> Mask:
    """The mask, checked against [..., L, S], as a rule over [B, H, L, S]."""
    if isinstance(mask, Mask):
        mask.check(shape)
        return mask
    allowed = _checked(mask, full, device)
    return from_tensor(_align(allowed, len(full)))


def _checked(mask: Tensor, full: tuple[int, ...], device: torch.device) -> Tensor:
    """The mask as bool, checked against [..., L, S]."""
    allowed = checks.zero_one("mask", mask)
    checks.same_device("mask", mask, device)
    checks.mask_dimensions("mask", mask.shape, ndim=len(full))
    checks.broadcastable("mask", mask.shape, full)
    return allowed


def _bias(bias: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    """The bias, checked against [..., L, S], with four dimensions."""
    checks.float_tensor("bias", bias, query, "a mask of 1 and 0 goes in mask=")
    checks.mask_dimensions("bias", bias.shape, ndim=len(full))
    checks.broadcastable("bias", bias.shape, full)
    return _align(bias, len(full))
