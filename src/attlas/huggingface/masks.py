"""Masks of transformers as one interval of keys for each query, in O(L) memory.

transformers describes a mask by a function of positions and a padding mask `[B, S]`, and asks
the attention implementation to make of them what it wants: the mask function registered here. Its
own `sdpa_mask` evaluates the function a few rows at a time, once for a forward. Nearly always the
keys of a query are an interval (causal, sliding windows, chunks, packed sequences, padding on the
left or right, static caches); of those only the ends are kept. Where they are not, such as holes
in the padding, the mask is a bool tensor `[B, 1, L, S]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

import attlas

ELEMENTS = 1 << 22  # pairs that are evaluated at a time


@dataclass(frozen=True, eq=False)
class KeyIntervals(attlas.masks.Mask):
    """Keys start <= j < stop of each query; passes for a mask tensor where transformers asks.

    It is no tensor, so that a model that computes with its mask, instead of giving it to the
    attention function, fails with a TypeError.
    """

    start: Tensor  # int64 [B or 1, 1, L or 1], on the CPU
    stop: Tensor
    shape: torch.Size  # [B, 1, L, S]
    device: torch.device

    ndim = 4
    dtype = torch.bool

    @property
    def per_query(self) -> bool:
        """False when the same keys are allowed to every query."""
        return self.start.shape[2] != 1

    def allowed(self, at: attlas.masks.Positions) -> Tensor:
        """True between start and stop."""

        def of_query(bound: Tensor) -> Tensor:
            batch, _, queries = bound.shape
            b = at.b if batch > 1 else torch.zeros_like(at.b)
            q = at.q if queries > 1 else torch.zeros_like(at.q)
            return bound[:, 0].to(at.k.device)[b, q]

        return (at.k >= of_query(self.start)) & (at.k < of_query(self.stop))

    def bounds(self, shape: Any) -> attlas.masks.Bounds:
        """The intervals themselves."""
        return attlas.masks.Bounds(self.start, self.stop, True)

    def check(self, shape: Any) -> None:
        """Raises ValueError when it was made for other sizes."""
        sizes = (shape.batch, 1, shape.queries, shape.keys)
        if self.shape != sizes:
            raise ValueError(
                f"attention_mask must be {list(sizes)}, got {list(self.shape)}; "
                "make it anew for these inputs"
            )

    # What `generate` does to a mask that it makes ahead, for static caches.

    def contiguous(self) -> KeyIntervals:
        """Itself."""
        return self

    def to(self, *_: Any, **__: Any) -> KeyIntervals:
        """Itself: it is small, and moves where it is used."""
        return self


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
    **_: Any,
) -> KeyIntervals | Tensor | None:
    """The mask function of `attn_implementation="attlas"`; its arguments are transformers'.

    Args:
        batch_size, q_length, kv_length: the sizes B, L and S.
        q_offset, kv_offset: the position of the first query, and of the first key.
        mask_function: (batch, head, query, key) -> bool.
        attention_mask: padding, bool `[B, at least S]`; or a mask that was made here before.
        allow_is_causal_skip: None may stand for a mask that allows all to one query.
        allow_is_bidirectional_skip: None may stand for a mask that allows everything.
        use_vmap: mask_function takes numbers, not tensors.
        device: where the model is.
        cache_position: the positions of the queries, in place of q_length and q_offset
            (transformers before 5.4).

    Returns:
        `KeyIntervals`; a bool tensor `[B, 1, L, S]` where they do not do, and in a graph that
        is traced, which knows no values; or None.
    """
    if isinstance(attention_mask, KeyIntervals):
        return attention_mask
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
        return rows(0, q_length)
    q_offset = int(q_offset if cache_position is None else cache_position[0])
    shape = torch.Size((batch_size, 1, q_length, kv_length))
    if mask_function is causal_mask_function and not padded:
        seen = 1 + q_offset - kv_offset  # keys, by the first query
        if q_length == 1 and seen >= kv_length and allow_is_causal_skip:
            return None
        stop = (torch.arange(q_length, device="cpu") + seen).clamp(0, kv_length).view(1, 1, -1)
        return KeyIntervals(torch.zeros_like(stop), stop, shape, device)

    return _intervals(rows, shape, device, 1 if every_row_alike else q_length)


def _intervals(
    rows: Callable[[int, int], Tensor], shape: torch.Size, device: torch.device, count: int
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
    return KeyIntervals(start, stop, shape, device)
