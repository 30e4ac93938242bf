"""Masks that say where a query may attend, in O(L) memory.

    mask[b, h, i, j] = True where query i may attend to key j

A mask is a rule, not a matrix: it is evaluated block by block, and each one knows, per
query, the interval of keys outside of which nothing is allowed, so blocks that are empty
are skipped. `&`, `|` and `~` combine masks. The position of query i among the keys is i
with alignment "upper_left" and i + S - L with "lower_right"; it matters only when L != S.

Example:
    >>> import torch, attlas
    >>> mask = attlas.masks.causal() & attlas.masks.padding(torch.tensor([4, 2]))
    >>> mask.to_dense(queries=4, keys=4, batch=2)[1, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .blocks import Block, Shape, take, whole

FAR = 1 << 62  # further than any key, and added to a position it stays in int64


class Positions(NamedTuple):
    """Index tensors that broadcast together, and the sizes they index."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    shape: Shape

    @classmethod
    def of(cls, block: Block, device: torch.device) -> Positions:
        """The positions of a block, [b, 1, 1, 1], [1, h, 1, 1], [1, 1, q, 1], [1, 1, 1, k]."""

        def arange(part: slice, dim: int) -> Tensor:
            view = [1, 1, 1, 1]
            view[dim] = -1
            return torch.arange(part.start, part.stop, device=device).view(view)

        return cls(
            arange(block.batch, 0),
            arange(block.heads, 1),
            arange(block.queries, 2),
            arange(block.keys, 3),
            block.shape,
        )


class Bounds(NamedTuple):
    """Per query, the keys [start, stop) outside of which nothing is allowed.

    Both are int64 on the CPU, [B or 1, H or 1, L or 1]; `exact` when all inside is allowed.
    """

    start: Tensor
    stop: Tensor
    exact: bool


class Mask:
    """A rule that says where a query may attend. Combine with `&`, `|` and `~`."""

    per_query = True  # False when the same keys are allowed to every query

    def allowed(self, at: Positions) -> Tensor:
        """bool, broadcastable to the positions: True where a query may attend."""
        raise NotImplementedError

    def bounds(self, shape: Shape) -> Bounds:
        """The interval of keys that each query can attend to; all of them unless narrowed."""
        return Bounds(_row(0), _row(shape.keys), False)

    def check(self, shape: Shape) -> None:
        """Raises ValueError when the mask does not fit a problem of this shape."""

    def block(self, block: Block, device: torch.device) -> Tensor:
        """`allowed` for a rectangle of the matrix, broadcastable to [b, h, q, k]."""
        return self.allowed(Positions.of(block, device))

    def of_heads(self, heads: Tensor) -> Mask:
        """The mask for a selection of the heads, given as positions."""
        return OfHeads(self, heads)

    def to_dense(self, *, queries: int, keys: int, batch: int = 1, heads: int = 1) -> Tensor:
        """The mask as a bool tensor `[batch, heads, queries, keys]`; allocates all of it."""
        shape = Shape(batch, heads, heads, queries, keys)
        self.check(shape)
        dense = self.block(whole(shape), torch.device("cpu"))
        return dense.expand(batch, heads, queries, keys)

    def __and__(self, other: Mask) -> Mask:
        return Combined(operator.and_, "&", self, _as_mask(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Combined(operator.or_, "|", self, _as_mask(other, "|"))

    def __invert__(self) -> Mask:
        return Inverted(self)

    def __bool__(self) -> bool:
        rule, mend = "be combined with &, | and ~", "`and`, `or` and `not` would lose one of them"
        checks.fail(TypeError, "masks", rule, "a question for their truth", mend)


def padding(lengths: Tensor) -> Mask:
    """Keys j < lengths[b]: sequences padded on the right.

    Args:
        lengths: int tensor `[B]`, the number of real keys of each sequence.

    Raises:
        TypeError: lengths is not an integer tensor.
        ValueError: lengths is not `[B]` or has a negative value.
    """
    checks.integers("lengths", lengths, ndim=1, shape="[B]", least=0)
    return Padding(lengths)


def causal(alignment: str = "upper_left") -> Mask:
    """Keys j <= i, the query's own position and those before it.

    Args:
        alignment: "upper_left" or "lower_right" (the last query sees the last key).

    Raises:
        ValueError: alignment is another word.
    """
    checks.choice("alignment", alignment, ("upper_left", "lower_right"))
    return Band(None, 0, alignment)


def sliding_window(left: int | None, right: int | None, alignment: str = "upper_left") -> Mask:
    """Keys i - left <= j <= i + right, where i is the query's own position.

    Args:
        left: keys before the own position, None for all of them.
        right: keys after the own position, None for all of them.
        alignment: "upper_left" or "lower_right"; matters when L != S.

    Raises:
        TypeError: left or right is neither an int nor None.
        ValueError: left or right is negative, or alignment is another word.
    """
    checks.window("(left, right)", (left, right))
    checks.choice("alignment", alignment, ("upper_left", "lower_right"))
    left = None if left is None else min(left, FAR)
    right = None if right is None else min(right, FAR)
    return Band(left, right, alignment)


def documents(ids: Tensor, key_ids: Tensor | None = None) -> Mask:
    """Keys of the query's own document: ids[i] == key_ids[j], for packed sequences.

    Args:
        ids: int tensor `[L]` or `[B, L]`, the document of each query.
        key_ids: the same for keys, `[S]` or `[B, S]`; default: `ids` (then L = S).

    Raises:
        TypeError: ids is not an integer tensor.
        ValueError: ids has neither one nor two dimensions.
    """
    key_ids = ids if key_ids is None else key_ids
    pair = []
    for name, value in (("ids", ids), ("key_ids", key_ids)):
        checks.integers(name, value, ndim=(1, 2), shape="[L] or [B, L]")
        pair.append((value if value.ndim == 2 else value[None]).long())
    return Documents(*pair)


def prefix(length: int | Tensor) -> Mask:
    """Keys j < length, for every query: `causal() | prefix(n)` is a prefix language model.

    Args:
        length: an int, or an int tensor `[B]`.

    Raises:
        TypeError: length is neither.
        ValueError: length is negative.
    """
    if isinstance(length, int):
        length = torch.tensor([length], device="cpu")
    checks.integers("length", length, ndim=1, shape="an int or [B]", least=0)
    return Padding(length)


def intervals(start: Tensor, stop: Tensor) -> Mask:
    """Keys start <= j < stop, the ends given for each query.

    A query whose stop is not above its start may attend to no key.

    Args:
        start: int tensor `[L]`, or `[B, H, L]` of which any dimension may be 1.
        stop: as start; beyond S it means S.

    Raises:
        TypeError: start or stop is not an integer tensor.
        ValueError: it has neither one nor three dimensions, or a negative value.

    Example:
        >>> import torch, attlas
        >>> spans = attlas.masks.intervals(torch.tensor([0, 1]), torch.tensor([2, 4]))
        >>> spans.to_dense(queries=2, keys=4)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    pair = []
    for name, value in (("start", start), ("stop", stop)):
        checks.integers(name, value, ndim=(1, 3), shape="[L] or [B, H, L]", least=0)
        pair.append((value if value.ndim == 3 else value[None, None]).long())
    return Intervals(*pair)


def from_tensor(tensor: Tensor) -> Mask:
    """A mask given as a tensor of 1 (or True) where a query may attend, and 0 elsewhere.

    Args:
        tensor: bool, integer or floating, broadcastable to `[B, H, L, S]`, of one, two or
            four dimensions.

    Raises:
        TypeError: it is not a tensor.
        ValueError: a value is neither 0 nor 1, or it has three dimensions.
    """
    tensor = checks.zero_one("tensor", tensor)
    checks.mask_dimensions("tensor", tensor.shape, ndim=4)
    return Dense(tensor[(None,) * (4 - tensor.ndim)])


def from_function(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """A mask given as `fn(batch, head, query, key) -> bool`, on index tensors.

    The four are int64 tensors that broadcast together; the result must broadcast with them.

    Example:
        >>> import attlas
        >>> even = attlas.masks.from_function(lambda b, h, q, k: (q - k) % 2 == 0)
        >>> even.to_dense(queries=2, keys=4)[0, 0].int()
        tensor([[1, 0, 1, 0],
                [0, 1, 0, 1]], dtype=torch.int32)

    Raises:
        TypeError: fn is not callable, or (when it is used) does not return a bool tensor.
    """
    checks.callable_("fn", fn)
    return Function(fn)


def _row(value: int) -> Tensor:
    return torch.tensor(value, device="cpu").view(1, 1, 1)


def _as_mask(value: object, symbol: str) -> Mask:
    if not isinstance(value, Mask):
        checks.fail(
            TypeError,
            f"the right side of {symbol}",
            "be a mask",
            type(value).__name__,
            "wrap a tensor with attlas.masks.from_tensor",
        )
    return value


@dataclass(frozen=True)
class Padding(Mask):
    lengths: Tensor
    per_query = False

    def check(self, shape: Shape) -> None:
        checks.batch_size("lengths", self.lengths.shape[0], shape.batch)

    def allowed(self, at: Positions) -> Tensor:
        lengths = self.lengths.to(at.k.device)
        return at.k < (lengths if len(lengths) == 1 else lengths[at.b])

    def bounds(self, shape: Shape) -> Bounds:
        stop = self.lengths.detach().cpu().long().clamp(max=shape.keys)
        return Bounds(_row(0), stop.view(-1, 1, 1), True)


@dataclass(frozen=True)
class Band(Mask):
    left: int | None
    right: int | None
    alignment: str

    def offset(self, shape: Shape) -> int:
        return shape.keys - shape.queries if self.alignment == "lower_right" else 0

    @property
    def is_causal(self) -> bool:
        return self.left is None and self.right == 0

    def allowed(self, at: Positions) -> Tensor:
        own = at.q + self.offset(at.shape)
        seen = at.k >= (0 if self.left is None else own - self.left)
        return seen if self.right is None else seen & (at.k <= own + self.right)

    def bounds(self, shape: Shape) -> Bounds:
        def ends(first: int) -> Tensor:
            keys = torch.arange(first, first + shape.queries, device="cpu")
            return keys.clamp(0, shape.keys).view(1, 1, -1)

        own, left, right = self.offset(shape), self.left, self.right
        start = _row(0) if left is None else ends(own - left)
        return Bounds(start, _row(shape.keys) if right is None else ends(own + right + 1), True)


@dataclass(frozen=True)
class Documents(Mask):
    ids: Tensor
    key_ids: Tensor

    def check(self, shape: Shape) -> None:
        for name, ids, size, letter in (
            ("ids", self.ids, shape.queries, "L"),
            ("key_ids", self.key_ids, shape.keys, "S"),
        ):
            checks.batch_size(name, ids.shape[0], shape.batch)
            if ids.shape[1] != size:
                checks.fail(
                    ValueError,
                    name,
                    f"have one id for each position, {letter}={size}",
                    checks.shape_of(ids),
                    "pass key_ids= when L != S",
                )

    def allowed(self, at: Positions) -> Tensor:
        device = at.k.device
        batch = at.b if max(len(self.ids), len(self.key_ids)) > 1 else torch.zeros_like(at.b)
        rows = batch if len(self.ids) > 1 else torch.zeros_like(batch)
        columns = batch if len(self.key_ids) > 1 else torch.zeros_like(batch)
        return self.ids.to(device)[rows, at.q] == self.key_ids.to(device)[columns, at.k]

    def bounds(self, shape: Shape) -> Bounds:
        batch = max(len(self.ids), len(self.key_ids))
        ids, key_ids = (t.detach().cpu().expand(batch, -1) for t in (self.ids, self.key_ids))
        if key_ids.shape[1] == 0 or not bool((key_ids.diff(dim=1) >= 0).all()):
            return super().bounds(shape)  # documents that are not in order are not intervals
        start = torch.searchsorted(key_ids.contiguous(), ids.contiguous())
        stop = torch.searchsorted(key_ids.contiguous(), ids.contiguous(), right=True)
        return Bounds(start[:, None], stop[:, None], True)


@dataclass(frozen=True)
class Intervals(Mask):
    start: Tensor  # int64 [B or 1, H or 1, L or 1]
    stop: Tensor

    @property
    def per_query(self) -> bool:
        return max(self.start.shape[2], self.stop.shape[2]) > 1

    def check(self, shape: Shape) -> None:
        for name, ends in (("start", self.start), ("stop", self.stop)):
            full = (shape.batch, shape.heads, shape.queries)
            if not all(map(checks.is_one_of, ends.shape, (1, 1, 1), full)):
                rule = f"broadcast to [B, H, L] = {list(full)}"
                mend = "pass one end for each query, or one for all"
                checks.fail(ValueError, name, rule, checks.shape_of(ends), mend)

    def allowed(self, at: Positions) -> Tensor:
        def of_query(ends: Tensor) -> Tensor:
            index = zip((at.b, at.h, at.q), ends.shape, strict=True)
            return ends.to(at.k.device)[tuple(i if size != 1 else 0 for i, size in index)]

        return (at.k >= of_query(self.start)) & (at.k < of_query(self.stop))

    def bounds(self, shape: Shape) -> Bounds:
        start, stop = (
            ends.detach().cpu().clamp(max=shape.keys) for ends in (self.start, self.stop)
        )
        return Bounds(start, torch.maximum(start, stop), True)


@dataclass(frozen=True)
class Dense(Mask):
    tensor: Tensor  # bool [B or 1, H or 1, L or 1, S or 1]

    @property
    def per_query(self) -> bool:
        return self.tensor.shape[2] != 1

    def check(self, shape: Shape) -> None:
        checks.broadcastable(
            "mask", self.tensor.shape, (shape.batch, shape.heads, shape.queries, shape.keys)
        )

    def allowed(self, at: Positions) -> Tensor:
        index = zip((at.b, at.h, at.q, at.k), self.tensor.shape, strict=True)
        tensor = self.tensor.to(at.k.device)
        return tensor[tuple(i if size != 1 else torch.zeros_like(i) for i, size in index)]

    def block(self, block: Block, device: torch.device) -> Tensor:
        return take(self.tensor, block, "bhqk").to(device)

    def bounds(self, shape: Shape) -> Bounds:
        if self.per_query or self.tensor.shape[3] == 1 or shape.keys == 0:
            return super().bounds(shape)
        keys = self.tensor[:, :, 0].cpu()  # [B or 1, H or 1, S]
        count = keys.sum(-1, keepdim=True)
        start = keys.byte().argmax(-1, keepdim=True)
        stop = shape.keys - keys.flip(-1).byte().argmax(-1, keepdim=True)
        stop = torch.where(count > 0, stop, start)
        return Bounds(start, stop, bool((count == stop - start).all()))


@dataclass(frozen=True)
class Function(Mask):
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def allowed(self, at: Positions) -> Tensor:
        result = self.fn(at.b, at.h, at.q, at.k)
        if not isinstance(result, Tensor) or result.dtype != torch.bool:
            got = result.dtype if isinstance(result, Tensor) else type(result).__name__
            checks.fail(
                TypeError,
                "the function of from_function",
                "return a bool tensor",
                got,
                "return a comparison of batch, head, query and key",
            )
        full = torch.broadcast_shapes(at.b.shape, at.h.shape, at.q.shape, at.k.shape)
        checks.broadcastable("the result of from_function", result.shape, full)
        return result[(None,) * (len(full) - result.ndim)]


@dataclass(frozen=True)
class Combined(Mask):
    operation: Callable[[Tensor, Tensor], Tensor]
    symbol: str
    left: Mask
    right: Mask

    @property
    def per_query(self) -> bool:
        return self.left.per_query or self.right.per_query

    def check(self, shape: Shape) -> None:
        self.left.check(shape)
        self.right.check(shape)

    def allowed(self, at: Positions) -> Tensor:
        return self.operation(self.left.allowed(at), self.right.allowed(at))

    def block(self, block: Block, device: torch.device) -> Tensor:
        return self.operation(self.left.block(block, device), self.right.block(block, device))

    def bounds(self, shape: Shape) -> Bounds:
        a, b = self.left.bounds(shape), self.right.bounds(shape)
        if self.symbol == "&":
            start = torch.maximum(a.start, b.start)
            stop = torch.maximum(torch.minimum(a.stop, b.stop), start)
            return Bounds(start, stop, a.exact and b.exact)
        start, stop = torch.minimum(a.start, b.start), torch.maximum(a.stop, b.stop)
        touching = bool((torch.maximum(a.start, b.start) <= torch.minimum(a.stop, b.stop)).all())
        return Bounds(start, stop, a.exact and b.exact and touching)


@dataclass(frozen=True)
class Inverted(Mask):
    mask: Mask

    @property
    def per_query(self) -> bool:
        return self.mask.per_query

    def check(self, shape: Shape) -> None:
        self.mask.check(shape)

    def allowed(self, at: Positions) -> Tensor:
        return ~self.mask.allowed(at)

    def block(self, block: Block, device: torch.device) -> Tensor:
        return ~self.mask.block(block, device)

    def __invert__(self) -> Mask:
        return self.mask


@dataclass(frozen=True)
class OfHeads(Mask):
    mask: Mask
    heads: Tensor

    @property
    def per_query(self) -> bool:
        return self.mask.per_query

    def allowed(self, at: Positions) -> Tensor:
        return self.mask.allowed(at._replace(h=self.heads.to(at.h.device)[at.h]))

    def bounds(self, shape: Shape) -> Bounds:
        bounds = self.mask.bounds(shape)
        start, stop = (b if b.shape[1] == 1 else b[:, self.heads] for b in bounds[:2])
        return Bounds(start, stop, bounds.exact)
