"""What a call of torch's attention reads, as `attlas.attention` takes it.

    in_heads(...)        multi-head attention: in-projection, extra keys, both masks
    of_attention(...)    F.scaled_dot_product_attention

torch.nn masks hold True where a query may NOT attend, those of F.scaled_dot_product_attention
where it may: this is the one place where they are turned. Nothing here is of size L x S but the
masks that the caller gave.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

import attlas
from attlas import masks


def fail(kind: type[Exception], argument: str, rule: str, got: object, mend: str) -> NoReturn:
    """Raises `kind` in the grammar of all messages of attlas."""
    raise kind(f"{argument} must {rule}, got {got}; {mend}")


class Heads(NamedTuple):
    """The tensors of a call, `[B, H, L or S, E]`, whatever dimensions its caller gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: tuple[Tensor, ...] = ()  # bool, True = attend; all broadcast to [B, H, L, S]
    bias: Tensor | None = None  # broadcasts to [B, H, L, S]
    is_causal: bool = False
    scale: float | None = None
    ndim: int = 4  # 3 where the caller had no batch: the weights are [H, L, S]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weights."""
        full = (*self.query.shape[:3], self.key.shape[2])
        return torch.Size(full[4 - self.ndim :])

    def attend(self, dropout_p: float = 0.0) -> attlas.AttentionResult:
        """Output and lazy weights. Heads without a batch go where attlas has the batch."""
        query, key, value = (self._lead(t) for t in (self.query, self.key, self.value))
        allowed = [t.transpose(0, 1) if self.ndim == 3 else t for t in self.allowed]
        rules = [masks.from_tensor(tensor) for tensor in allowed]
        return attlas.attention(
            query,
            key,
            value,
            reduce(operator.and_, rules) if rules else None,
            bias=None if self.bias is None else self._lead(self.bias),
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.ndim == 4 and self.query.shape[1] != self.key.shape[1],
            dropout_p=dropout_p,
        )

    def _lead(self, tensor: Tensor) -> Tensor:
        return tensor[(0,) * (4 - self.ndim)]

    def select(self, chosen: Sequence[int]) -> Heads:
        """The same call for some of its query heads."""
        heads = self.query.shape[1]
        if not all(head < heads for head in chosen):
            mend = "count them from 0, or capture other layers only"
            fail(ValueError, "heads", f"be below the {heads} of the layer", list(chosen), mend)
        group = heads // self.key.shape[1]

        def pick(tensor: Tensor, group: int = 1) -> Tensor:
            index = torch.tensor([head // group for head in chosen], device=tensor.device)
            return tensor if tensor.shape[1] == 1 < heads else tensor.index_select(1, index)

        return self._replace(
            query=pick(self.query),
            key=pick(self.key, group),
            value=pick(self.value, group),
            allowed=tuple(map(pick, self.allowed)),
            bias=None if self.bias is None else pick(self.bias),
        )


# --- multi-head attention ---------------------------------------------------------------------


def in_heads(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    batch_first: bool,
) -> Heads:
    """A call of torch.nn.MultiheadAttention.

    `layer` has the parameters by their names in that module. is_causal is a hint, and means
    what it means to torch: attn_mask is causal and need not be read, where there is no other
    mask and no dense weights are wanted. Without attn_mask it is the causal mask.
    """
    batched = _check(layer, query, key, value, batch_first)
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    elif not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    count, batch, queries, keys = layer.num_heads, *query.shape[:2], key.shape[1]
    causal = is_causal and (attn_mask is None or (key_padding_mask is None and not need_weights))
    both: list[Tensor] = []
    if key_padding_mask is not None:
        full = (batch, keys) if batched else (keys,)
        _check_mask("key_padding_mask", key_padding_mask, query, full)
        both.append(key_padding_mask.view(batch, 1, 1, keys))
    if attn_mask is not None and not causal:
        stack = (batch * count, queries, keys)
        _check_mask("attn_mask", attn_mask, query, (queries, keys), stack)
        shape = (1, 1) if attn_mask.ndim == 2 else (batch, count)
        both.append(attn_mask.view(*shape, queries, keys))

    q, k, v = _project(layer, query, key, value)
    if layer.bias_k is not None:
        k, v = (
            torch.cat([t, extra.to(t.dtype).expand(batch, 1, -1)], dim=1)
            for t, extra in ((k, layer.bias_k), (v, layer.bias_v))
        )
    if layer.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    more = k.shape[1] - keys  # keys of the layer itself, which no mask of the caller hides
    both = [F.pad(mask, (0, more)) for mask in both] if more else both
    causal_mask: tuple[Tensor, ...] = ()
    if causal and more:
        own = torch.arange(queries, device=q.device).unsqueeze(-1)
        other = torch.arange(keys + more, device=q.device)
        causal_mask = (((other <= own) | (other >= keys))[None, None],)
    bias = [mask for mask in both if mask.is_floating_point()]
    return Heads(
        *(t.unflatten(-1, (count, -1)).transpose(1, 2) for t in (q, k, v)),
        allowed=(*(~mask for mask in both if mask.dtype == torch.bool), *causal_mask),
        bias=sum(bias[1:], bias[0]) if bias else None,
        is_causal=causal and not more,
        ndim=4 if batched else 3,
    )


def _project(layer: Any, *inputs: Tensor) -> list[Tensor]:
    """Query, key and value `[B, L or S, E]` of all heads."""
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    return [F.linear(*three) for three in zip(inputs, weights, biases, strict=True)]


def _check(layer: Any, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> bool:
    """Checks the inputs of multi-head attention; True where they have a batch."""
    letters = "[N, L, E]" if batch_first else "[L, N, E]"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            fail(
                TypeError,
                name,
                "be a torch.Tensor",
                kind,
                f"convert it with torch.as_tensor({name})",
            )
        if tensor.is_nested:
            mend = f"pad it with {name}.to_padded_tensor(0.0) and pass key_padding_mask"
            fail(NotImplementedError, name, "be a dense tensor", "a nested tensor", mend)
        if tensor.ndim not in (2, 3) or tensor.ndim != query.ndim:
            mend = "give query, key and value the same dimensions, all with a batch or none"
            fail(ValueError, name, f"be {letters} or [L, E]", list(tensor.shape), mend)
    sizes = (layer.embed_dim, layer.kdim, layer.vdim)
    for name, tensor, size in zip(
        ("query", "key", "value"), (query, key, value), sizes, strict=True
    ):
        if tensor.shape[-1] != size:
            mend = "it is the embed_dim, kdim or vdim that the layer was made with"
            fail(ValueError, name, f"have a last dimension of {size}", list(tensor.shape), mend)
    if key.shape[:-1] != value.shape[:-1]:
        mend = "key and value come from the same sequence"
        fail(
            ValueError,
            "value",
            f"have the length and batch of key, {list(key.shape[:-1])}",
            list(value.shape),
            mend,
        )
    at = 0 if batch_first else 1
    if query.ndim == 3 and query.shape[at] != key.shape[at]:
        mend = f"inputs are {letters}: check batch_first"
        fail(
            ValueError, "key", f"have the batch of query, {query.shape[at]}", list(key.shape), mend
        )
    return query.ndim == 3


def _check_mask(name: str, mask: Tensor, query: Tensor, *shapes: tuple[int, ...]) -> None:
    """Checks a mask of multi-head attention: its kind, and one of the shapes."""
    floating = isinstance(mask, Tensor) and mask.is_floating_point()
    if not isinstance(mask, Tensor) or not (floating or mask.dtype == torch.bool):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        rule = "be bool (True = not allowed) or floating (added to the scores)"
        fail(TypeError, name, rule, got, f"convert it with {name}.bool() if 1 means not allowed")
    if tuple(mask.shape) not in shapes:
        rule = f"have shape {' or '.join(str(list(shape)) for shape in shapes)}"
        mend = "[N, S] are keys to ignore, [L, S] or [N * num_heads, L, S] pairs"
        fail(ValueError, name, rule, list(mask.shape), mend)
    if floating and mask.dtype == torch.float64 != query.dtype:
        mend = f"convert it with {name}.to(query.dtype)"
        fail(ValueError, name, f"not be wider than query, {query.dtype}", mask.dtype, mend)


# --- scaled dot-product attention -------------------------------------------------------------


def of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Heads:
    """A call of F.scaled_dot_product_attention, which torch has found right, before dropout.

    Dimensions before the heads become one; without heads, the first dimension counts as heads.
    """
    if query.is_nested:
        mend = "choose layers without, or capture the model with padded inputs"
        fail(NotImplementedError, "query", "be a dense tensor", "a nested tensor", mend)
    lead = query.shape[:-3]
    heads = query.shape[-3] if query.ndim > 2 else 1

    def four(tensor: Tensor) -> Tensor:
        own = tensor.shape[-3] if enable_gqa else heads
        return tensor.expand(*lead, own, *tensor.shape[-2:]).reshape(-1, own, *tensor.shape[-2:])

    q, k, v = four(query), four(key), four(value)
    allowed, bias = (), None
    if attn_mask is not None:
        mask = attn_mask[(None,) * (max(query.ndim, 4) - attn_mask.ndim)]
        if mask.ndim > 4:
            mask = mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
        allowed, bias = ((mask,), None) if mask.dtype == torch.bool else ((), mask)
    ndim = 3 if query.ndim <= 3 and not enable_gqa else 4
    return Heads(q, k, v, allowed, bias, is_causal, scale, ndim)
