"""Masks of transformers as one interval of keys for each query, in O(L) memory.

transformers describes a mask by a function of positions and a padding mask `[B, S]`, and asks
the attention implementation to make of them what it wants: the mask function registered here. Its
own `sdpa_mask` evaluates the function a few rows at a time, once for a forward. Nearly always the
keys of a query are an interval (causal, sliding windows, chunks, packed sequences, padding on the
left or right, static caches); of those only the ends are kept. Where they are not, such as holes
in the padding, a bool tensor `[B, 1, L, S]` is kept.

Some models compute with their mask: they add it to scores of their own, join it to another, slice
it. What they are given is therefore a tensor, the mask of eager attention, that is not made unless
somebody computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

import attlas

ELEMENTS = 1 << 22  # pairs that are evaluated at a time


# What may be asked of a lazy mask without making it.
KNOWN = frozenset(
    getattr(Tensor, name) if callable(getattr(Tensor, name)) else getattr(Tensor, name).__get__
    for name in ("device", "dim", "dtype", "is_floating_point", "ndim", "shape", "size")
)


class LazyMask(Tensor):
    """The mask of eager attention: 0 where a query may attend, else the least number of the dtype.

    `rule` says where. The tensor itself is one NaN `[B, 1, L, S]`; what computes with it computes
    with the real one, which is made for the first that does, and kept.
    """

    rule: KeyIntervals | Tensor
    made: Tensor | None

    @staticmethod
    def of(rule: KeyIntervals | Tensor, dtype: torch.dtype, device: torch.device | str) -> LazyMask:
        """The mask of a rule: intervals, or a bool tensor `[B, 1, L, S]`."""
        nothing = torch.full((), math.nan, dtype=dtype, device=device).expand(rule.shape)
        mask = nothing.as_subclass(LazyMask)
        mask.rule, mask.made = rule, None
        return mask

    @property
    def changed(self) -> bool:
        """True where the model may have written to it, so that the rule no longer holds."""
        made = self.made
        return made is not None and (made.is_inference() or made._version > 0)

    def make(self) -> Tensor:
        """The mask of eager attention, an ordinary tensor."""
        if self.made is None:
            allowed = self.rule
            if isinstance(allowed, KeyIntervals):
                batch, _, queries, keys = allowed.shape
                allowed = allowed.to_dense(queries=queries, keys=keys, batch=batch)
            self.made = additive(allowed.to(self.device), self.dtype)
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Asks what is known; itself where nothing would change; else with the real mask."""
        kwargs = kwargs or {}
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # What `generate` does to a mask that it makes ahead, for static caches.
        places = (torch.device, str, bool)
        moved = func is Tensor.to and all(
            isinstance(value, places) for value in (*args[1:], *kwargs.values())
        )
        if func is Tensor.contiguous or moved:
            return args[0]  # the rule is small, and moves where it is used
        made: Any = tree_map_only(LazyMask, LazyMask.make, (args, kwargs))
        return func(*made[0], **made[1])


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, else the least number of the dtype, as eager attention has it."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


@dataclass(frozen=True, eq=False)
class KeyIntervals(attlas.masks.Intervals):
    """Keys start <= j < stop of each query, on the CPU, for one size; of all heads, or of each."""

    shape: torch.Size  # [B, H or 1, L, S]

    def bounds(self, shape: Any) -> attlas.masks.Bounds:
        """The intervals themselves, which lie within the keys."""
        return attlas.masks.Bounds(self.start, self.stop, True)

    def check(self, shape: Any) -> None:
        """Raises ValueError when it was made for other sizes."""
        heads = shape.heads if self.shape[1] == shape.heads else 1
        sizes = (shape.batch, heads, shape.queries, shape.keys)
        if self.shape != sizes:
            raise ValueError(
                f"attention_mask must be {list(sizes)}, got {list(self.shape)}; "
                "make it anew for these inputs"
            )


def attention_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Tensor | None:
    """The mask function of `attn_implementation="attlas"`; its arguments are transformers'.

    Args:
        batch_size, q_length, kv_length: the sizes B, L and S.
        q_offset, kv_offset: the position of the first query, and of the first key.
        mask_function: (batch, head, query, key) -> bool.
        attention_mask: padding, bool `[B, at least S]`.
        allow_is_causal_skip: None may stand for a mask that allows all to one query.
        allow_is_bidirectional_skip: None may stand for a mask that allows everything.
        use_vmap: mask_function takes numbers, not tensors.
        device: where the model is.
        cache_position: the positions of the queries, in place of q_length and q_offset
            (transformers before 5.4).
        dtype: that of the model.

    Returns:
        `LazyMask`; what it stands for, dense, in a graph that is traced, which knows no values;
        or None.
    """
    arguments: dict[str, Any] = {}
    if cache_position is not None:
        q_length, device = len(cache_position), cache_position.device
    elif device is not None:
        arguments["device"] = device
    device = torch.device(device or "cpu")
    traced = torch.compiler.is_compiling()
    # A padding mask that is too short stands for padding at its end.
    padded = attention_mask is not None and (
        traced or attention_mask.shape[-1] < kv_length + kv_offset or not bool(attention_mask.all())
    )
    every_row_alike = mask_function is bidirectional_mask_function
    if every_row_alike and not padded and allow_is_bidirectional_skip:
        return None

    def rows(first: int, count: int) -> Tensor:
        """The mask of a few queries, `[B, 1, count, S]`."""
        if cache_position is None:
            place: dict[str, Any] = {"q_length": count, "q_offset": q_offset + first}
        else:
            place = {"cache_position": cache_position[first : first + count]}
        allowed = sdpa_mask(
            batch_size=batch_size,
            **place,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            **arguments,
        )
        assert allowed is not None  # no skip is allowed
        return allowed.expand(batch_size, 1, count, kv_length)

    if traced:
        return additive(rows(0, q_length), dtype)
    q_offset = int(q_offset if cache_position is None else cache_position[0])
    shape = torch.Size((batch_size, 1, q_length, kv_length))
    if mask_function is causal_mask_function and not padded:
        seen = 1 + q_offset - kv_offset  # keys, by the first query
        if q_length == 1 and seen >= kv_length and allow_is_causal_skip:
            return None
        stop = (torch.arange(q_length, device="cpu") + seen).clamp(0, kv_length).view(1, 1, -1)
        rule = KeyIntervals(torch.zeros_like(stop), stop, shape)
    else:
        rule = _intervals(rows, shape, 1 if every_row_alike else q_length)
    return LazyMask.of(rule, dtype, device)


def _intervals(
    rows: Callable[[int, int], Tensor], shape: torch.Size, count: int
) -> KeyIntervals | Tensor:
    """The ends of the intervals of `count` rows, or the dense mask where they are none."""
    batch, _, _, keys = shape
    size = max(ELEMENTS // max(batch * keys, 1), 1)
    starts, stops = [], []
    for first in range(0, count, size):
        allowed = rows(first, min(size, count - first))[:, 0].to(torch.uint8)
        total = allowed.sum(-1)
        start = allowed.argmax(-1)
        stop = torch.where(total > 0, keys - allowed.flip(-1).argmax(-1), start)
        if not bool((stop - start == total).all()):
            return rows(0, count).expand(shape)
        starts.append(start)
        stops.append(stop)
    start, stop = (torch.cat(found, dim=1)[:, None].cpu() for found in (starts, stops))
    return KeyIntervals(start, stop, shape)
