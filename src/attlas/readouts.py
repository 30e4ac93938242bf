"""What can be asked of lazy weights: one value for each query, for each key, for each cell.

Every readout is a statistic of `attlas.statistics`, streamed in O(L) memory, forward and
backward. Here are the checks, the shapes and the meaning; where this says `[B, H, L]`, the
leading dimensions are those of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, indexing, statistics
from .matrix import LazyMatrix


class Extremes(NamedTuple):
    """Largest weights and the positions of their keys (-1 where there is none)."""

    values: Tensor
    keys: Tensor


class Readouts(LazyMatrix):
    """Every function of the weights that needs no more than the weights."""

    # --- one value for each query -------------------------------------------------------

    def entropy(self) -> Tensor:
        """-Σ_j p_ij log p_ij, `[B, H, L]`, in nats; 0 on an empty row."""
        return self.evaluate(statistics.Entropy())

    def max(self) -> Extremes:
        """The largest weight of each row and its key, `[B, H, L]`; 0 and -1 on an empty row."""
        return Extremes(*self.evaluate(statistics.Max()))

    def topk(self, k: int) -> Extremes:
        """The k largest weights of each row, in falling order, and their keys, `[B, H, L, k]`.

        Where fewer than k keys are allowed the rest are 0, with key -1.

        Raises:
            TypeError: k is not an int.
            ValueError: k is not from 1 to S.
        """
        checks.whole_number("k", k, least=1, most=max(self._sizes.keys, 1))
        return Extremes(*self.evaluate(statistics.TopK(k)))

    def mass(self, keys: slice | range | Sequence[int] | Tensor) -> Tensor:
        """The weight that falls in a set of keys, Σ_{j in keys} p_ij, `[B, H, L]`.

        Args:
            keys: a slice or range, positions (each counts once), or a bool tensor `[S]`
                or `[B, S]`.

        Raises:
            TypeError, ValueError, IndexError: keys is not a set of key positions.
        """
        return self.evaluate(statistics.Mass(self._members(keys, self._sizes.keys, "keys")))

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
        length = self._sizes.queries
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

    def _members(self, chosen: Any, size: int, name: str) -> Tensor:
        """A set of positions as 0 and 1, `[B or 1, 1, size]` in the accumulation dtype."""
        rule, mend = "be a slice, a range, positions or a bool tensor", f"write {name}=[0, 1]"
        if not isinstance(chosen, slice | range | list | tuple | int | Tensor):
            checks.fail(TypeError, name, rule, type(chosen).__name__, mend)
        chosen = list(chosen) if isinstance(chosen, tuple) else chosen
        zeros = self._like.new_zeros(size)
        if isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
            rows = chosen if chosen.ndim == 2 else chosen[None]
            if rows.ndim != 2 or rows.shape[1] != size or len(rows) not in (1, self._sizes.batch):
                mend = "pass one bool for each position"
                checks.fail(ValueError, name, f"be [{size}] where bool", list(chosen.shape), mend)
            return rows[:, None].to(self._like)
        if isinstance(chosen, slice):
            chosen = range(*chosen.indices(size))
        (entry,) = indexing.expand((chosen,), (size,))
        zeros[entry] = 1
        return zeros[None, None]


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
