"""The score specification: every option of an attention call, resolved once.

    scores = softcap(scale * Q Kᵀ) + bias, -inf where masked
    softcap(x) = cap * tanh(x / cap)

`ScoreSpec` is frozen and holds no tensor that needs a gradient; bias and sinks travel beside
it. `scores` evaluates one block; it is the only place where an implementation in PyTorch turns
queries and keys into scores (the reference has its own, on purpose).

What is masked is never read, and a bias of -inf is a mask. When a query or key holds NaN or inf,
0 * NaN would carry it past the mask in a matrix product, so `guard` asks for products that leave
such entries out, and adds what they give where they are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]

from .blocks import Block, Shape, split, take
from .dropout import Dropout
from .masks import Bounds, Mask

TILE = 512  # keys: an empty gap shorter than this is not worth a break


def full_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` outside of autocast, which would round its matrix products to half precision."""

    @wraps(fn)
    def exact(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return fn(*args, **kwargs)
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return fn(*args, **kwargs)

    return exact


def is_traced() -> bool:
    """True while a graph is captured: torch.compile, torch.export, fake tensors, make_fx."""
    if torch.compiler.is_compiling():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in _CAPTURES)


_MODES = torch._C._TorchDispatchModeKey
_CAPTURES = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, lse and statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """The tensors of a call, 4-D."""

    query: Tensor  # [B, Hq, L, E]
    key: Tensor  # [B, Hkv, S, E]
    value: Tensor  # [B, Hkv, S, Ev]
    bias: Tensor | None  # [B or 1, Hq or 1, L or 1, S or 1]
    sinks: Tensor | None  # [Hq]


class Attended(NamedTuple):
    """What a forward gives."""

    output: Tensor  # [B, Hq, L, Ev]
    normaliser: Tensor  # [B, Hq, L, 2]: what `normalised` divides by
    found: dict[str, tuple[Tensor, ...]]  # statistics of the weights, of the same pass


class Cotangents(NamedTuple):
    """The gradients of what a forward gave, None where there is none."""

    output: Tensor | None = None
    lse: Tensor | None = None  # of the log-sum-exp of the normaliser
    entropy: Tensor | None = None
    received: Tensor | None = None
    max: Tensor | None = None


@dataclass(frozen=True)
class ScoreSpec:
    """What turns a query and a key into a score."""

    shape: Shape
    scale: float
    softcap: float | None = None
    masks: tuple[Mask, ...] = ()  # all of them must allow
    alignment: str = "upper_left"
    dropout: Dropout | None = None  # of the weights, where they meet the values
    guard: bool = False  # a query, key or value holds NaN or inf, and something is left out

    @property
    def offset(self) -> int:
        """The position of query 0 among the keys."""
        return self.shape.keys - self.shape.queries if self.alignment == "lower_right" else 0

    def guarded(self, *tensors: Tensor, bias: Tensor | None) -> ScoreSpec:
        """The specification for tensors that may hold NaN or inf behind a mask."""
        left_out = bool(self.masks) or self.dropout is not None or bias is not None
        return replace(self, guard=left_out and not is_finite(*tensors))

    def bind(self) -> BoundMask | None:
        """The masks as one, with the key interval of each query; None when nothing is masked."""
        mask = self.mask
        return None if mask is None else BoundMask(mask, mask.bounds(self.shape))

    @property
    def mask(self) -> Mask | None:
        """The masks as one, None when nothing is masked."""
        return reduce(lambda a, b: a & b, self.masks) if self.masks else None

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
        top: Tensor | None = None,
    ) -> Tensor:
        """scores - top `[b, h, r, c]` of one block, in the accumulation dtype.

        Args:
            query: `[b, h, r, E]`. key: `[b, h or fewer, c, E]`.
            bias, allowed: broadcastable to `[b, h, r, c]`, or None.
            top: `[b, h, r]`, subtracted: the largest score of each row; -inf counts as 0.
        """
        dtype = accumulate_dtype(query.dtype)
        query, key = query.to(dtype), key.to(dtype)
        if self.guard and bias is not None:
            read = bias != -math.inf
            allowed = read if allowed is None else allowed & read
        if self.guard:
            scores = _guarded_product(query, key, self.scale, allowed)
        else:
            scores = product(query, key.mT).mul_(self.scale)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            scores.add_(bias)
        if top is not None:
            scores.sub_(finite(top).unsqueeze(-1))
        if allowed is not None and self.guard:
            scores.masked_fill_(~allowed, -math.inf)
        elif allowed is not None:  # 0 or -inf added: ten times as fast, and the same where finite
            scores.add_(torch.where(allowed, 0.0, -math.inf).to(scores.dtype))
        return scores

    def centred(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        allowed: Tensor | None,
        normaliser: Tensor,
    ) -> Tensor:
        """score - m of one block, as `normalised` takes it; the arguments are those of `scores`.

        -inf where masked, and NaN at the allowed keys of a row whose normaliser is NaN.
        """
        top, total = normaliser.detach().unbind(-1)
        scores = self.scores(query, key, bias, allowed, top)
        # No score is above the largest, but for the rounding of products of another shape.
        scores = scores - scores.detach().clamp(min=0.0)
        if self.guard:
            wrong = total.isnan().unsqueeze(-1) & (scores != -math.inf)
            scores = scores.masked_fill(wrong, math.nan)
        return scores


# --- the normaliser of a row ------------------------------------------------------------------
#
# A row of weights is exp(score - m) / l, where m is its largest score, a sink's included, and l the
# sum of exp(score - m). The pair (m, l) is kept, `[..., 2]`, and not the one number m + log l:
# rounded to the size of a large score, that would lose most of log l. A row without keys has
# (-inf, 1). Any m would do, if l is the sum relative to it: m is a constant, and the gradient of
# the log-sum-exp goes through l alone.


def normaliser_of(top: Tensor, total: Tensor) -> Tensor:
    """The normaliser `[..., 2]` of rows with the largest score `top` and the sum `total`."""
    empty = top == -math.inf  # where the sum is 0, or NaN in a row of NaN alone
    return torch.stack([top, total.masked_fill(empty & (total == 0), 1.0)], dim=-1)


def logsumexp(normaliser: Tensor) -> Tensor:
    """log Σ_j exp(score_j), `[...]`, natural log; -inf for a row without keys."""
    top, total = normaliser.unbind(-1)
    return top.detach() + total.log()


def sink_weights(sinks: Tensor, normaliser: Tensor) -> Tensor:
    """exp(sink - m) / l, the weight of each sink, `[B, H, L]`; 0 for a row without keys."""
    top, total = normaliser.unbind(-1)
    top = top.detach()
    share = (sinks.to(top.dtype).view(1, -1, 1) - finite(top)).exp() / total
    return share.masked_fill(top == -math.inf, 0.0)


def log_weights(centred: Tensor, normaliser: Tensor) -> Tensor:
    """score - m - log l, -inf where masked."""
    return centred - _sums(normaliser).log()


def normalised(centred: Tensor, normaliser: Tensor) -> Tensor:
    """exp(score - m) / l, 0 where masked: the roundings of a plain softmax."""
    return centred.exp() / _sums(normaliser)


def _sums(normaliser: Tensor) -> Tensor:
    """l, `[..., 1]`; 1 where it is NaN, which is in the scores then."""
    total = normaliser[..., 1:]
    return torch.where(total.isnan(), 1.0, total)


def lse_gradient(grad: Tensor, normaliser: Tensor) -> Tensor:
    """The gradient of the log-sum-exp, `[...]`, from that of the normaliser."""
    return grad[..., 1] * normaliser[..., 1]


def normaliser_gradient(lse_grad: Tensor, normaliser: Tensor) -> Tensor:
    """The gradient of the normaliser, `[..., 2]`, from that of the log-sum-exp."""
    grad = lse_grad / normaliser[..., 1]
    return torch.stack([torch.zeros_like(grad), grad], dim=-1)


@dataclass(frozen=True)
class BoundMask:
    """A mask with its key intervals for one problem: which blocks are empty, part or full."""

    mask: Mask
    bounds: Bounds

    def runs(self, block: Block, device: torch.device) -> Iterator[Block]:
        """The parts of `block` along the keys outside of which nothing is allowed."""
        start = max(int(take(self.bounds.start, block, "bhq").min()), block.keys.start)
        stop = min(int(take(self.bounds.stop, block, "bhq").max()), block.keys.stop)
        if start >= stop:
            return
        hull = block._replace(keys=slice(start, stop))
        if self.bounds.exact:
            yield hull
            return
        allowed = self.mask.block(hull, device)
        if allowed.shape[3] == 1:
            if bool(allowed.any()):
                yield hull
            return
        used = allowed.flatten(0, 2).any(0)
        tiles = list(split(hull.keys, TILE))
        some = [bool(piece.any()) for piece in used.split(TILE)]
        first = None
        for tile, here, then in zip(tiles, some, [*some[1:], False], strict=True):
            if here and first is None:
                first = tile.start
            if here and not then:
                yield block._replace(keys=slice(first, tile.stop))
                first = None

    def allowed(self, block: Block, device: torch.device) -> Tensor | None:
        """bool, broadcastable to the block; None when all of it is allowed."""
        start, stop = (take(bound, block, "bhq") for bound in self.bounds[:2])
        if self.bounds.exact and start.numel() and stop.numel():
            start, stop = int(start.max()), int(stop.min())
            if start <= block.keys.start and block.keys.stop <= stop:
                return None
        return self.mask.block(block, device)

    def within(self, block: Block) -> Bounds:
        """The key intervals of a block's queries, counted from its first key."""
        start, stop = (take(bound, block, "bhq") - block.keys.start for bound in self.bounds[:2])
        return Bounds(start, stop, self.bounds.exact)

    def query_run(self, block: Block) -> Block | None:
        """`block` without the queries before and after all those that reach its keys."""
        start, stop = (take(bound, block, "bhq") for bound in self.bounds[:2])
        reached = ((start < block.keys.stop) & (stop > block.keys.start)).flatten(0, 1).any(0)
        if len(reached) == 1:
            return block if bool(reached) else None
        found = reached.nonzero()
        if not len(found):
            return None
        first = block.queries.start
        return block._replace(queries=slice(first + int(found[0]), first + int(found[-1]) + 1))


def key_runs(mask: BoundMask | None, block: Block, device: torch.device) -> Iterator[Block]:
    """The parts of a block that the mask does not leave empty; all of it without a mask."""
    yield from (block,) if mask is None else mask.runs(block, device)


def finite(top: Tensor) -> Tensor:
    """The largest scores with 0 for rows without a key, so that exp(-inf - top) is 0, not NaN."""
    return top.masked_fill(top == -math.inf, 0.0)


def is_finite(*tensors: Tensor) -> bool:
    """True when no element is NaN or inf and no product of two rows can be.

    One pass without a copy: where the Euclidean norms are finite, so is every dot product
    (Cauchy and Schwarz). False for some numbers beyond 1e19, and where a graph is traced or
    torch.vmap runs, which do not know values: the careful path is right for all.
    """
    if is_traced() or any(map(_is_batched, tensors)):
        return False
    for tensor in tensors:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float32 if half else None)
        if not math.isfinite(norm.item()):
            return False
    return True


def is_bounded(*tensors: Tensor) -> bool:
    """True when no element is -inf or NaN; False where values are not known, as in `is_finite`."""
    if is_traced() or any(map(_is_batched, tensors)):
        return False
    return all(not t.numel() or t.detach().amin().item() > -math.inf for t in tensors)


def _is_batched(tensor: Tensor) -> bool:
    """True for one of many tensors at once, under torch.vmap."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return _functorch.is_batchedtensor(tensor)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, `[b, h, r, n] @ [b, g, n, m]`, where g divides h: heads of b serve whole groups."""
    batch, heads, rows, _ = a.shape
    if heads == b.shape[1] or b.shape[1] == 1:
        return a @ b
    grouped = a.reshape(batch, b.shape[1], heads // b.shape[1] * rows, a.shape[-1]) @ b
    return grouped.view(batch, heads, rows, b.shape[-1])


def product_over_queries(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """aᵀ @ b, `[b, h, r, c]ᵀ @ [b, h, r, m] -> [b, heads, c, m]`, summed over each group."""
    batch, rows = a.shape[0], a.shape[2]
    if heads == a.shape[1]:
        return a.mT @ b
    b = b.expand(batch, a.shape[1], rows, b.shape[-1])
    fold = (batch, heads, a.shape[1] // heads * rows)
    return a.reshape(*fold, a.shape[-1]).mT @ b.reshape(*fold, b.shape[-1])


def _guarded_product(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """scale * query @ keyᵀ, where only pairs that are finite and allowed have a gradient."""
    with torch.no_grad():
        raw = product(query, key.mT).mul_(scale)
        good = product(_is_good(query), _is_good(key).mT) == query.shape[-1]
        good = good if allowed is None else good & allowed
    return torch.where(good, product(clean(query), clean(key).mT) * scale, raw)


def clean(tensor: Tensor) -> Tensor:
    """The tensor with 0 in place of NaN and inf."""
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def weighted_values(weights: Tensor, value: Tensor, guard: bool) -> Tensor:
    """weights @ value; with `guard`, a value that has weight 0 is not read.

    A NaN that is read gives NaN, an inf gives inf, and both infinities together NaN.
    """
    if not guard:
        return product(weights, value)
    result = product(weights, clean(value))
    read = (weights != 0).to(weights.dtype)  # NaN weights count as read
    up, down, nan = (
        product(read, found.to(weights.dtype)) > 0
        for found in (value == math.inf, value == -math.inf, value.isnan())
    )
    result = result.masked_fill(up, math.inf).masked_fill(down, -math.inf)
    return result.masked_fill(nan | (up & down), math.nan)


def _is_good(tensor: Tensor) -> Tensor:
    return tensor.isfinite().to(tensor.dtype)
