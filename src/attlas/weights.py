"""Attention weights that are not materialised until asked.

    weights[i, j] = exp(score[i, j] - lse[i])

`AttentionWeights` holds query, key, lse and the score specification, O(L) memory. Rows, tiles
and statistics are computed from them, exactly, and are differentiable with respect to query,
key, bias and sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checks, indexing, ops, statistics
from .spec import Inputs, ScoreSpec, finite, is_finite
from .tensorlike import LAZY, TensorLike


class Extremes(NamedTuple):
    """Largest weights and the positions of their keys (-1 where there is none)."""

    values: Tensor
    keys: Tensor

    @property
    def indices(self) -> Tensor:
        """The keys, by torch's name."""
        return self.keys


@dataclass(frozen=True, eq=False, repr=False)
class AttentionWeights(TensorLike):
    """The weights of one attention call, `[B, H, L, S]` (or `[B, L, S]`, `[L, S]`), lazily.

    Query, key, bias and mask are kept, not copied: what is changed in place after the call changes
    the weights; clone it first. Without gradients at the call, readouts have none.
    Rows that may attend to no key have weights 0. Statistics are float32 (float64 for float64
    inputs), and where this says `[B, H, L]`, the leading dimensions are those of the weights.

    Get one from `attlas.attention`; `to_dense()` is the only method that allocates L x S.
    """

    query: Tensor  # [B, Hq, L, E]
    key: Tensor  # [B, Hkv, S, E]
    bias: Tensor | None
    sinks: Tensor | None
    lse: Tensor  # [B, Hq, L]
    spec: ScoreSpec
    impl: str  # the implementation that computed them, and computes readouts
    lead: tuple[int, ...]  # the leading dimensions that the user gave

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weights."""
        return torch.Size((*self.lead, self.spec.shape.queries, self.spec.shape.keys))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.lead) + 2

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weights, that of query."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of query."""
        return self.query.device

    @property
    def requires_grad(self) -> bool:
        """True when a readout may have a gradient: lse has one."""
        return self.lse.requires_grad

    @property
    def logsumexp(self) -> Tensor:
        """log Σ_j exp(score_ij), `[B, H, L]`, natural log, sinks included; -inf on an empty row."""
        return self._lead(self.lse)

    @property
    def T(self) -> TransposedWeights:
        """The transposed weights, for `weights.T @ x`."""
        return TransposedWeights(self)

    mT = T

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def __repr__(self) -> str:
        size = _bytes(self.shape.numel() * self.dtype.itemsize)
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return (
            f"AttentionWeights(shape={list(self.shape)}, dtype={self.dtype}{where}, "
            f"lazy, {size} if dense)"
        )

    def detach(self) -> AttentionWeights:
        """The same weights without gradients."""
        tensors = {name: getattr(self, name) for name in ("query", "key", "bias", "sinks", "lse")}
        return replace(self, **{n: None if t is None else t.detach() for n, t in tensors.items()})

    # --- reading ------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tensor:
        """The weights at an index, exactly `to_dense()[index]`, computing only those."""
        full = indexing.expand(index, self.shape)
        weights = indexing.read(
            full, self.shape, self.spec, self.query, self.key, self.bias, self.lse
        )
        return weights.to(self.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def to_dense(self) -> Tensor:
        """All the weights as a tensor; allocates L x S, as its name says."""
        return self.evaluate(statistics.Dense(self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        dense = self.to_dense().detach().cpu()
        array = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
        return array if dtype is None else array.astype(dtype)

    # --- one value for each query -------------------------------------------------------

    def entropy(self) -> Tensor:
        """-Σ_j p_ij log p_ij, `[B, H, L]`, in nats; 0 on an empty row."""
        return self.evaluate(statistics.Entropy())

    def max(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """The largest weight of each row and its key, `[B, H, L]`; 0 and -1 on an empty row.

        With `dim`, the largest weights and their indices as `torch.Tensor.max` gives them.
        """
        if dim is not None:
            return self._max(dim, keepdim)
        return Extremes(*self.evaluate(statistics.Max()))

    def topk(self, k: int) -> Extremes:
        """The k largest weights of each row, in falling order, and their keys, `[B, H, L, k]`.

        Where fewer than k keys are allowed the rest are 0, with key -1.

        Raises:
            TypeError: k is not an int.
            ValueError: k is not from 1 to S.
        """
        checks.whole_number("k", k, least=1, most=max(self.spec.shape.keys, 1))
        return Extremes(*self.evaluate(statistics.TopK(k)))

    def mass(self, keys: slice | range | Sequence[int] | Tensor) -> Tensor:
        """The weight that falls in a set of keys, Σ_{j in keys} p_ij, `[B, H, L]`.

        Args:
            keys: a slice or range, positions (each counts once), or a bool tensor `[S]`
                or `[B, S]`.

        Raises:
            TypeError, ValueError, IndexError: keys is not a set of key positions.
        """
        return self.evaluate(statistics.Mass(self._members(keys, self.spec.shape.keys, "keys")))

    def sink_mass(self) -> Tensor:
        """exp(sink - lse), the weight that the sink logits take, `[B, H, L]`; 0 without sinks."""
        if self.sinks is None:
            return torch.zeros_like(self.logsumexp)
        sinks = self.sinks.to(self.lse.dtype).view(1, -1, 1)
        mass = (sinks - finite(self.lse)).exp().masked_fill(self.lse == -torch.inf, 0.0)
        return self._lead(mass)

    def mean_distance(self) -> Tensor:
        """Σ_j p_ij |i - j|, `[B, H, L]`, in keys; i is the query's position among the keys."""
        return self.evaluate(statistics.MeanDistance())

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """fn of every row, for any fn of whole rows.

        Args:
            fn: `[b, h, rows, S] -> [b, h, rows, ...]`, called with some batch items, heads and
                rows at a time; differentiable if gradients are wanted. They reach query, key,
                bias and sinks; a tensor that fn closes over gets none: make it an operand of
                a `Statistic`.

        Returns:
            `[B, H, L, ...]`.

        Raises:
            ValueError: fn returns something else.

        Example:
            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 3, 4)
            >>> attlas.attention(q, q, q).weights.map_rows(lambda w: w.square().sum(-1))
            tensor([[[0.3333, 0.3333, 0.3333]]])
        """
        checks.callable_("fn", fn)
        return self.evaluate(statistics.MapRows(fn))

    # --- one value for each key, or each cell -------------------------------------------

    def received(self, reduce: str = "sum", queries: Any = None) -> Tensor:
        """What each key is given: Σ_i p_ij, or the mean or maximum over queries, `[B, H, S]`.

        Args:
            reduce: "sum", "mean" (over the queries that are looked at, empty rows among
                them) or "max".
            queries: which queries: a slice or range, positions (each counts once), or a bool
                tensor `[L]` or `[B, L]`; None for all.

        Raises:
            ValueError: reduce is another word.
            TypeError, ValueError, IndexError: queries is not a set of query positions.
        """
        checks.choice("reduce", reduce, ("sum", "mean", "max"))
        length = self.spec.shape.queries
        part = _contiguous(queries, length)
        if part is None:
            member, part, count = self._members(queries, length, "queries"), slice(0, length), 1
            if reduce == "mean":
                member = member / member.sum(-1, keepdim=True).clamp(min=1)
        else:
            member, count = None, part.stop - part.start
        kind = statistics.ReceivedMax if reduce == "max" else statistics.Received
        total = self.evaluate(kind(part, member))
        return total / max(count, 1) if reduce == "mean" else total

    def pool(self, cell: int | tuple[int, int], how: str = "max") -> Tensor:
        """A map of the weights: one pixel for each cell, `[B, H, ceil(L/cell), ceil(S/cell)]`.

        Args:
            cell: the size of a cell, in positions; or (queries, keys).
            how: "max", the largest weight in the cell, or "mass", the sum of its weights.

        Raises:
            TypeError, ValueError: cell is not one or two ints of at least 1.
            ValueError: how is another word.
        """
        checks.choice("how", how, ("max", "mass"))
        pair = (cell, cell) if isinstance(cell, int) else cell
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            rule, mend = "be an int or (queries, keys)", "write pool(64) or pool((64, 128))"
            checks.fail(TypeError, "cell", rule, repr(cell), mend)
        for size in pair:
            checks.whole_number("cell", size, least=1)
        return self.evaluate(statistics.Pool((pair[0], pair[1]), how))

    # --- the operator -------------------------------------------------------------------

    def __matmul__(self, x: Any) -> Tensor:
        """weights @ x, `[..., L, D]`, for x `[S]`, `[S, D]` or with leading dimensions."""
        x4, vector = self._operand(x, self.spec.shape.keys, "S")
        dtype = torch.promote_types(self.dtype, x4.dtype)
        query, key, x4 = (t.to(dtype) for t in (self.query, self.key, x4))
        shape, spec = self.spec.shape, self.spec
        if x4.shape[1] not in (1, shape.kv_heads):
            key = key.repeat_interleave(shape.group, dim=1)
            spec = replace(spec, shape=shape._replace(kv_heads=shape.heads))
        x4 = x4.expand(shape.batch, key.shape[1], *x4.shape[2:])
        if spec.masks and not spec.guard:
            spec = replace(spec, guard=not is_finite(x4))
        inputs = Inputs(query, key, x4, self.bias, self.sinks)
        result = self._lead(ops.attend(self.impl, spec, inputs)[0])
        return result.squeeze(-1) if vector else result

    def _transposed_matmul(self, x: Any) -> Tensor:
        x4, vector = self._operand(x, self.spec.shape.queries, "L")
        if x4.shape[1] not in (1, self.spec.shape.heads):
            mend = "give one head, or one for each query head"
            checks.fail(ValueError, "x", "have the heads of the weights", x4.shape[1], mend)
        dtype = torch.promote_types(self.dtype, x4.dtype)
        x4 = x4.to(self.lse.dtype)
        result = self.evaluate(statistics.TransposedProduct(x4)).to(dtype)
        return result.squeeze(-1) if vector else result

    def evaluate(self, statistic: statistics.Statistic) -> Any:
        """A statistic of your own; see `attlas.statistics`.

        Returns:
            Its result, or a tuple of them where it has more than one.
        """
        results = ops.read(
            self.impl, statistic, self.spec, self.query, self.key, self.bias, self.lse
        )
        shaped = tuple(self._lead(result) for result in results)
        return shaped[0] if len(shaped) == 1 else shaped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch functions see the dense weights; matmul and some reductions stay lazy."""
        name, own = getattr(func, "__name__", ""), bool(args) and isinstance(args[0], cls)
        if own and name in LAZY and (name != "max" or len(args) > 1 or kwargs):
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            left, right = args[:2]
            if isinstance(left, cls | TransposedWeights):
                return left @ (_densify(right))
            return right.T @ left if left.ndim == 1 else (right.T @ left.mT).mT
        return func(*tree_map(_densify, args), **tree_map(_densify, kwargs or {}))

    # --- shapes -------------------------------------------------------------------------

    def _lead(self, result: Tensor) -> Tensor:
        """[B, H, ...] with the leading dimensions that the user gave."""
        return result.reshape(*self.lead, *result.shape[2:])

    def _operand(self, x: Any, size: int, letter: str) -> tuple[Tensor, bool]:
        """x as `[B or 1, H or 1, size, D]`, and whether it was a vector."""
        x = _densify(x)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            mend = "convert it with x.float(), of one dimension at least"
            checks.fail(TypeError, "x", "be a floating tensor", got, mend)
        vector = x.ndim == 1
        x = x.unsqueeze(-1) if vector else x
        full = (*self.lead, size, x.shape[-1])
        if x.shape[-2] != size or x.ndim not in (2, len(full)):
            mend = f"its last two dimensions are [{letter}, D], those before as in the weights"
            checks.fail(
                ValueError, "x", f"be [..., {letter}, D], {letter}={size}", list(x.shape), mend
            )
        x = x.view(*(1,) * (2 - len(self.lead)), *x.shape) if x.ndim == len(full) else x[None, None]
        if len(self.lead) == 1 and x.ndim == 4:
            x = x.transpose(0, 1)
        batch, heads = self.spec.shape[:2]
        allowed = (1, heads, self.spec.shape.kv_heads)
        if x.shape[0] not in (1, batch) or x.shape[1] not in allowed:
            mend = "give the leading dimensions of the weights, or none"
            checks.fail(ValueError, "x", f"broadcast to {list(full)}", list(x.shape), mend)
        checks.same_device("x", x, self.device)
        return x, vector

    def _members(self, chosen: Any, size: int, name: str) -> Tensor:
        """A set of positions as 0 and 1, `[B or 1, 1, size]` in the accumulation dtype."""
        rule, mend = "be a slice, a range, positions or a bool tensor", f"write {name}=[0, 1]"
        if not isinstance(chosen, slice | range | list | tuple | int | Tensor):
            checks.fail(TypeError, name, rule, type(chosen).__name__, mend)
        chosen = list(chosen) if isinstance(chosen, tuple) else chosen
        zeros = self.lse.new_zeros(size)
        if isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
            rows = chosen if chosen.ndim == 2 else chosen[None]
            if rows.ndim != 2 or rows.shape[1] != size or len(rows) not in (1, len(self.query)):
                mend = "pass one bool for each position"
                checks.fail(ValueError, name, f"be [{size}] where bool", list(chosen.shape), mend)
            return rows[:, None].to(self.lse)
        if isinstance(chosen, slice):
            chosen = range(*chosen.indices(size))
        (entry,) = indexing.expand((chosen,), (size,))
        zeros[entry] = 1
        return zeros[None, None]


@dataclass(frozen=True, eq=False, repr=False)
class TransposedWeights:
    """weightsᵀ, `[B, H, S, L]`, as a linear operator."""

    weights: AttentionWeights

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense transpose."""
        *lead, queries, keys = self.weights.shape
        return torch.Size((*lead, keys, queries))

    @property
    def T(self) -> AttentionWeights:
        """The weights themselves."""
        return self.weights

    mT = T

    def __matmul__(self, x: Any) -> Tensor:
        """weightsᵀ @ x, `[..., S, D]`, for x `[L]`, `[L, D]` or with leading dimensions.

        x is read in the dtype of the statistics.
        """
        return self.weights._transposed_matmul(x)

    def to_dense(self) -> Tensor:
        """The transpose as a tensor; allocates L x S."""
        return self.weights.to_dense().mT

    def __repr__(self) -> str:
        return f"{self.weights!r}.T"

    __torch_function__ = AttentionWeights.__torch_function__


def _densify(value: Any) -> Any:
    return value.to_dense() if isinstance(value, AttentionWeights | TransposedWeights) else value


def _contiguous(part: Any, length: int) -> slice | None:
    """All (None), a slice or a range as a slice of step 1 inside the length, where it is one."""
    if part is None:
        return slice(0, length)
    if isinstance(part, slice):
        part = range(*part.indices(length))
    if not isinstance(part, range):
        return None
    if not len(part):
        return slice(0, 0)
    inside = part.step == 1 and part.start >= 0 and part.stop <= length
    return slice(part.start, part.stop) if inside else None


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} TB"
