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

    @property
    def indices(self) -> Tensor:
        """The keys, by torch's name."""
        return self.keys


class Readouts(LazyMatrix):
    """Every function of the weights that needs no more than the weights."""

    def _within(self, left: int | None, right: int | None) -> Readouts:
        """These weights in a window about the own position, 0 outside of it."""
        raise NotImplementedError

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

    def expected_position(self) -> Tensor:
        """Σ_j p_ij j, `[B, H, L]`, the mean position of the keys that are read.

        0 on an empty row. With sinks a row sums to less than 1, and this is not divided by it:
        divide by `1 - weights.sink_mass()` for the mean over keys alone.
        """
        keys = self._sizes.keys
        positions = torch.arange(keys, dtype=self._like.dtype, device=self._like.device)
        return self.evaluate(statistics.Mass(positions[None, None]))

    def windowed_mass(self, left: int | None, right: int | None) -> Tensor:
        """Σ_j p_ij over i - left <= j <= i + right, `[B, H, L]`: the weight near the own position.

        i is the query's position among the keys, as in `window_size`; 0 on an empty row.

        Args:
            left: keys before the own position, None for all of them.
            right: keys after the own position, None for all of them.

        Raises:
            TypeError: left or right is neither an int nor None.
            ValueError: left or right is negative.
        """
        checks.window("(left, right)", (left, right))
        every = self._like.new_ones(1, 1, self._sizes.keys)
        return self._within(left, right).evaluate(statistics.Mass(every))

    def guided(self, penalty: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Σ_j p_ij c_ij, `[B, H, L]`, for a penalty c given as a function of positions.

        0 on an empty row. It is differentiable with respect to the weights, not to what penalty
        closes over.

        Args:
            penalty: `penalty(batch, head, query, key)`, as in `masks.from_function`: four int64
                tensors of indices that broadcast together, counted from 0. It returns a tensor
                that broadcasts with them, and is called once for each block.

        Raises:
            TypeError: penalty is not callable, or does not return a tensor.
            ValueError: what it returns does not broadcast to the block.

        Example:
            The guided attention loss, for L queries and S keys that run side by side:

            >>> import torch, attlas
            >>> L, S, g = 6, 4, 0.2
            >>> def diagonal(batch, head, query, key):
            ...     return 1 - torch.exp(-((query / L - key / S) ** 2) / (2 * g**2))
            >>> q, k = torch.zeros(1, 1, L, 8), torch.zeros(1, 1, S, 8)
            >>> attlas.attention(q, k, k).weights.guided(diagonal).mean()
            tensor(0.5726)

        References:
            Tachibana, Uenoyama and Aihara, Efficiently Trainable Text-to-Speech System Based on
            Deep Convolutional Networks with Guided Attention, 2017, equation 6.
        """
        checks.callable_("penalty", penalty)
        return self.evaluate(statistics.Guided(penalty))

    def quantile(self, share: float) -> Tensor:
        """How many keys hold a share of the weight of each row, `[B, H, L]`, int64.

        The smallest n for which the n largest weights sum to `share` times the sum of the row (to
        the rounding of the weights); 0 on an empty row. `quantile(0.9)` is the number of keys
        that hold 90 % of the mass. A count has no gradient; rows are sorted, a few at a time.

        Args:
            share: above 0 and at most 1.

        Raises:
            TypeError: share is not a number.
            ValueError: share is not above 0 and at most 1.

        Example:
            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 10, 8)
            >>> attlas.attention(q, q, q, is_causal=True).weights.quantile(0.9)
            tensor([[[1, 2, 3, 4, 5, 6, 7, 8, 9, 9]]])
        """
        mend = "write 0.9 for 90 %"
        checks.number("share", share, positive=True, mend=mend)
        if share > 1:
            rule = "be above 0 and at most 1"
            checks.fail(ValueError, "share", rule, share, mend)
        return self.evaluate(statistics.Quantile(float(share)))

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

    def received(
        self, reduce: str = "sum", queries: Any = None, query_weights: Tensor | None = None
    ) -> Tensor:
        """What each key is given: Σ_i w_i p_ij, or the mean or maximum over queries, `[B, H, S]`.

        Args:
            reduce: "sum", "mean" (over the queries that are looked at, empty rows among
                them; Σ_i w_i p_ij / Σ_i w_i with query_weights) or "max".
            queries: which queries: a slice or range, positions (each counts once), or a bool
                tensor `[L]` or `[B, L]`; None for all.
            query_weights: w, floating, `[L]` or broadcastable to `[B, H, L]`; may need a
                gradient. None for 1.

        Raises:
            ValueError: reduce is another word, query_weights does not fit, or is given to "max".
            TypeError, ValueError, IndexError: queries is not a set of query positions.

        Example:
            What a cache that evicts keys looks at: `received()` is accumulated attention,
            `received(queries=slice(-32, None))` that of the last 32 queries, and this decays:

            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 4, 8)
            >>> weights = attlas.attention(q, q, q, is_causal=True).weights
            >>> weights.received(query_weights=0.5 ** torch.arange(4).flip(0))
            tensor([[[0.6667, 0.5417, 0.4167, 0.2500]]])

        References:
            Zhang et al., H2O: Heavy-Hitter Oracle, 2023 (accumulated attention). Li et al.,
            SnapKV, 2024 (an observation window of the last queries).
        """
        checks.choice("reduce", reduce, ("sum", "mean", "max"))
        length = self._sizes.queries
        if query_weights is not None:
            return self._received_weighted(reduce, queries, query_weights)
        part, member, count = None, None, length
        if queries is not None:
            part = _contiguous(queries, length)
            if part is None:
                member, count = self._members(queries, length, "queries"), 1
                if reduce == "mean":
                    member = member / member.sum(-1, keepdim=True).clamp(min=1)
            else:
                count = part.stop - part.start
                part = None if count == length else part  # all of them, in the fewest words
        kind = statistics.ReceivedMax if reduce == "max" else statistics.Received
        total = self.evaluate(kind(part, member))
        return total / max(count, 1) if reduce == "mean" else total

    def _received_weighted(self, reduce: str, queries: Any, weights: Any) -> Tensor:
        if reduce == "max":
            mend = "choose reduce='sum' or 'mean', or leave query_weights out"
            checks.fail(ValueError, "query_weights", "be None for the maximum", "a tensor", mend)
        weights = self._per_query("query_weights", weights)
        if queries is not None:
            weights = weights * self._members(queries, self._sizes.queries, "queries")
        total = self.evaluate(statistics.Received(None, weights))
        if reduce == "sum":
            return total
        count = weights.sum(-1, keepdim=True).expand(*self._sizes[:2], 1)
        return total / self._lead(torch.where(count == 0, 1.0, count))

    def top_keys(
        self,
        k: int,
        reduce: str = "sum",
        queries: Any = None,
        query_weights: Tensor | None = None,
    ) -> Extremes:
        """The k keys that are given most, in falling order: `received(...).topk(k)`, `[B, H, k]`.

        Where fewer than k keys are given anything the rest are 0, with key -1.

        Args:
            k: how many keys.
            reduce, queries, query_weights: as in `received`.

        Raises:
            TypeError: k is not an int.
            ValueError: k is not from 1 to S.

        Example:
            The heavy hitters of H2O are `top_keys(k)`. SnapKV lets the last w queries vote for
            the keys before them: `top_keys(k, queries=slice(-w, None))`, over all keys.

        References:
            Zhang et al., H2O, 2023. Li et al., SnapKV, 2024.
        """
        checks.whole_number("k", k, least=1, most=max(self._sizes.keys, 1))
        received = self.received(reduce, queries, query_weights)
        values, keys = received.topk(min(k, received.shape[-1]), dim=-1)
        return Extremes(values, keys.masked_fill(values == 0, -1))

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

    def _per_query(self, name: str, value: Any) -> Tensor:
        """A tensor that broadcasts to `[B, H, L]`, as `[B or 1, H or 1, L]`."""
        mend = f"pass {name} as a tensor [L], or with the leading dimensions of the weights"
        checks.float_tensor(name, value, self._like, mend)
        full = self.shape[:-1]
        pairs = zip(reversed(value.shape), reversed(full), strict=False)
        fits = all(checks.is_one_of(size, 1, want) for size, want in pairs) and value.ndim in (
            1,
            len(full),
        )
        if not fits or value.shape[-1] != full[-1]:
            checks.fail(ValueError, name, f"broadcast to {list(full)}", list(value.shape), mend)
        value = value.to(self._like.dtype)
        value = value.expand(*value.shape[:-1], full[-1])
        if value.ndim == 1:
            return value[None, None]
        return value if value.ndim == 3 else value.unsqueeze(1)

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
        if isinstance(chosen, slice) and (chosen.step or 1) > 0:
            zeros[chosen] = 1  # as it is: its ends would fix the symbolic sizes of torch.compile
            return zeros[None, None]
        if isinstance(chosen, slice):
            chosen = range(*chosen.indices(size))
        (entry,) = indexing.expand((chosen,), (size,))
        zeros[entry] = 1
        return zeros[None, None]


def _contiguous(part: Any, length: int) -> slice | None:
    """A slice or a range as a slice of step 1 inside the length, where it is one."""
    if isinstance(part, slice):
        part = range(*part.indices(length))
    if not isinstance(part, range):
        return None
    if not len(part):
        return slice(0, 0)
    inside = part.step == 1 and part.start >= 0 and part.stop <= length
    return slice(part.start, part.stop) if inside else None
