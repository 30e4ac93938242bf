"""The attention function that transformers calls for `attn_implementation="attlas"`.

It maps the names of transformers to those of `attlas.attention`, and gives the lazy weights
where other implementations give None or a dense tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attlas

from .masks import KeyIntervals, LazyMask
from .recording import lasting, record

# What a model passes when its attention is another than that of `attlas.attention`: to do without
# would change the result.
UNKNOWN = ("indices", "block_indices", "cache")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, attlas.AttentionWeights | Tensor]:
    """softmax(scores) V and its lazy weights, for a module of transformers.

    A query that may attend to no key, as padding on the left may, has output and weights 0. With
    dropout in training the weights are those before it; `weights.dropped` are those after it.

    Args:
        module: the module that calls.
        query: `[B, Hq, L, E]`.
        key: `[B, Hkv, S, E]`.
        value: `[B, Hkv, S, Ev]`.
        attention_mask: what `attention_mask` of `masks` gives; or bool (True where attended); or
            floating (added to the scores). None: all keys, as in eager attention, which asks no
            module whether it is causal.
        dropout: the chance that a weight is dropped.
        scaling: what scores are multiplied with.
        is_causal: without a mask, whether a query sees only the keys up to its own.
        position_bias: `[1 or B, Hq, L, S or more]`, added to the scores.
        softcap: the cap of scores.
        s_aux: `[Hq]`, sinks.
        others: what does not change the result; `sinks` is another name of s_aux.

    Returns:
        output `[B, L, Hq, Ev]`, contiguous, and weights `[B, Hq, L, S]`: `AttentionWeights`, or
        a tensor where L is 1, as in decoding.

    Raises:
        NotImplementedError: the model's attention is of another kind, or torch.jit traces it.
    """
    given = [name for name in UNKNOWN if others.get(name) is not None]
    if given:
        raise NotImplementedError(
            f"{type(module).__name__} must call dense attention, got {given[0]}=; load the model "
            "with attn_implementation='eager'"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise NotImplementedError(
            "attn_implementation must be 'eager' or 'sdpa' for torch.jit.trace, got 'attlas', "
            "which it cannot record; torch.export can"
        )
    sinks = others.get("sinks") if s_aux is None else s_aux
    if sinks is not None and sinks.ndim != 1:
        raise NotImplementedError(
            f"{type(module).__name__} must call attention with one sink for each head, got sinks "
            f"of shape {list(sinks.shape)}; load the model with attn_implementation='eager'"
        )
    bias = position_bias
    mask: Tensor | KeyIntervals | None = attention_mask
    if isinstance(attention_mask, LazyMask):
        mask = attention_mask.make() if attention_mask.changed else attention_mask.rule
    if bias is not None:
        bias = bias[..., : key.shape[2]]
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        added = mask if bias is None else bias + mask
        # In a graph a mask is dense; where nothing may be read is still told from a bias.
        traced = torch.compiler.is_compiling()
        bias, mask = added, mask > torch.finfo(mask.dtype).min if traced else None
    elif isinstance(mask, Tensor) and mask.stride(2) == 0:
        mask = mask[:, :, :1]  # of one row
    alignment = "upper_left"
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if scaling is None and hasattr(module, "scale_attn_weights"):
        # GPT-2 before 5.4, whose eager attention asks its module, and applies a causal mask itself.
        old: Any = module
        layer = old.layer_idx + 1 if old.scale_attn_by_inverse_layer_idx else 1
        scaling = (query.shape[-1] ** -0.5 if old.scale_attn_weights else 1.0) / layer
        is_causal, alignment = not old.is_cross_attention, "lower_right"
    output, weights = attlas.attention(
        query,
        key,
        value,
        mask,
        bias=bias,
        is_causal=is_causal,
        causal_alignment=alignment,
        softcap=softcap,
        sinks=sinks,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        dropout_p=dropout,
    )
    record(module, weights)
    return output.transpose(1, 2).contiguous(), lasting(weights)
