"""The laws that every statistic keeps, ours and one's own, as one check for a test.

merge(split(x)) == whole(x)      merge(init, x) == x      the gradients of both are equal
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks, streaming
from .blocks import Block
from .statistics import OverHeads, State, Statistic
from .weights import AttentionWeights


def check_statistic(
    statistic: Statistic, weights: AttentionWeights, *, cuts: int = 3, seed: int = 0
) -> None:
    """Checks the laws of a statistic on some weights; for the tests of your own.

    1. Streamed: `update` block by block gives what it gives for all of them at once.
    2. Merged: so does `merge` of the states of the blocks, in any order, and with `init`.
    3. Evaluated: so does `weights.evaluate(statistic)`, by the implementation of the weights.
    4. Differentiated: all have the same gradients with respect to query, key, bias, normaliser and
       the operands that require one.
    5. Linear: where it says so, the result for the mean of all heads is the mean of the results.

    Args:
        statistic: what is checked. One that is given whole rows (`scans` is None) has nothing to
            split: laws 3 to 5 are checked.
        weights: what it is checked on; a few rows and keys of float64 say most.
        cuts: how many times the scanned axis is cut, at random places.
        seed: which places.

    Raises:
        AssertionError: a law is broken; the message says which, and by how much.
        TypeError: statistic or weights are none.

    Example:
        >>> import torch, attlas
        >>> q = torch.randn(1, 2, 9, 4, dtype=torch.float64)
        >>> weights = attlas.attention(q, q, q, is_causal=True).weights
        >>> attlas.check_statistic(attlas.statistics.Entropy(), weights)
    """
    if not isinstance(statistic, Statistic):
        mend = "subclass attlas.Statistic, and pass an instance"
        checks.fail(TypeError, "statistic", "be a Statistic", type(statistic).__name__, mend)
    if not isinstance(weights, AttentionWeights):
        mend = "pass attlas.attention(...).weights"
        checks.fail(TypeError, "weights", "be lazy weights", type(weights).__name__, mend)
    checks.whole_number("cuts", cuts, least=0)
    given = (weights.query, weights.key, weights.bias, weights.normaliser)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    wanted = [t for t in (*leaves, *statistic.operands) if t is not None and t.requires_grad]
    source = streaming.Source(weights.spec, statistic, (*leaves, *statistic.operands))
    if statistic.scans is not None:
        _split_is_whole(statistic, source, wanted, cuts, random.Random(seed))
    query, key, bias, normaliser = leaves
    assert query is not None
    assert key is not None
    assert normaliser is not None
    lazy = replace(weights, query=query, key=key, bias=bias, normaliser=normaliser)
    expected = streaming.dense(statistic, weights.spec, source.tensors)
    _equal("evaluate(x) is not update(x) of the whole matrix", lazy._results(statistic), expected)
    _same_gradients("evaluate", lazy._results(statistic), expected, wanted)
    if statistic.linear and not _knows_heads(statistic):
        of_mean = streaming.dense(OverHeads(statistic), weights.spec, source.tensors)
        mean = [result.mean(1, keepdim=True) for result in expected]
        _equal("linear: evaluate(mean of x) is not the mean of evaluate(x)", of_mean, mean)


def _knows_heads(statistic: Statistic) -> bool:
    """True where operands differ between heads, which the mean of all heads has none of."""
    pairs = zip(statistic.operands, statistic.axes, strict=False)
    return any("h" in axes and x.shape[axes.index("h")] > 1 for x, axes in pairs)


def _split_is_whole(
    statistic: Statistic,
    source: streaming.Source,
    wanted: Sequence[Tensor],
    cuts: int,
    shuffle: random.Random,
) -> None:
    mask, block = source.spec.bind(), source.full()
    if statistic.scans == statistic.keeps:  # several rows for each result: those of the first
        first = block.queries.start
        last = min(first + statistic.multiple, block.queries.stop)
        block = block._replace(queries=slice(first, last))

    def update(state: State, one: Block) -> State:
        return statistic.update(state, source.part(one, source.allowed(mask, one), source.cut(one)))

    pieces = _cut(block, "queries" if statistic.scans == "q" else "keys", cuts, shuffle)
    init = statistic.init(block, source.like)
    whole = statistic.finalize(update(init, block))
    streamed = init
    for piece in pieces:
        streamed = update(streamed, piece)
    states = [update(init, piece) for piece in pieces]
    shuffle.shuffle(states)
    merged = states[0]
    for state in states[1:]:
        merged = statistic.merge(merged, state)
    for law, state in (
        ("update(update(init, a), b) is not update(init, a and b)", streamed),
        ("merge(split(x)) is not whole(x)", merged),
        ("merge(init, x) is not x", statistic.merge(init, merged)),
        ("merge(x, init) is not x", statistic.merge(merged, init)),
    ):
        _equal(law, statistic.finalize(state), whole)
        _same_gradients(law, statistic.finalize(state), whole, wanted)


def _cut(block: Block, axis: str, cuts: int, shuffle: random.Random) -> list[Block]:
    """The block cut along an axis at random places."""
    part: slice = getattr(block, axis)
    inside = range(part.start + 1, part.stop)
    places = sorted(shuffle.sample(inside, min(cuts, len(inside))))
    edges = [part.start, *places, part.stop]
    return [block._replace(**{axis: slice(a, b)}) for a, b in pairwise(edges)]


def _equal(law: str, found: Sequence[Any], expected: Sequence[Any]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text: f"{law}: {text}")


def _same_gradients(
    law: str, found: Sequence[Tensor], expected: Sequence[Tensor], wanted: Sequence[Tensor]
) -> None:
    """Equal gradients of a weighted sum of all results."""
    both = []
    for results in (found, expected):
        terms = [
            (r * torch.arange(1.0, r.numel() + 1, device=r.device).to(r).sin().view(r.shape)).sum()
            for r in results
            if r.requires_grad
        ]
        if not terms:
            return
        grads = torch.autograd.grad(
            torch.stack(terms).sum(),
            wanted,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        both.append(grads)
    _equal(f"{law}, in the gradient", *both)
