"""Masks: each against its definition, expression trees, bounds, skipped blocks, memory."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attlas
from attlas import masks
from attlas.blocks import Shape, whole
from attlas.spec import ScoreSpec

from .helpers import KERNELS, Watch, qkv

pytestmark = pytest.mark.numeric

BATCH, HEADS, QUERIES, KEYS = 2, 2, 5, 7
IDS, KEY_IDS = torch.tensor([[0, 0, 1, 1, 2], [1, 1, 1, 3, 3]]), torch.tensor([0, 0, 1, 1, 1, 2, 3])
UNSORTED = torch.tensor([2, 0, 1, 0, 0, 1, 2])
TENSOR = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
KEY_TENSOR = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0]]).view(2, 1, 1, 7)

# A mask, and what it means for one (batch, head, query, key).
LEAVES = {
    "padding": (masks.padding(torch.tensor([4, 0])), lambda b, h, i, j: j < [4, 0][b]),
    "padding for all": (masks.padding(torch.tensor([9])), lambda b, h, i, j: True),
    "causal": (masks.causal(), lambda b, h, i, j: j <= i),
    "causal lower right": (masks.causal("lower_right"), lambda b, h, i, j: j <= i + 2),
    "window": (masks.sliding_window(1, 2), lambda b, h, i, j: i - 1 <= j <= i + 2),
    "window left": (masks.sliding_window(1, None), lambda b, h, i, j: i - 1 <= j),
    "window right": (
        masks.sliding_window(None, 1, "lower_right"),
        lambda b, h, i, j: j <= i + 2 + 1,
    ),
    "window of all": (masks.sliding_window(None, None), lambda b, h, i, j: True),
    "window of the largest int": (
        masks.sliding_window(sys.maxsize, sys.maxsize, "lower_right"),
        lambda b, h, i, j: True,
    ),
    "window beyond 64 bits": (masks.sliding_window(1 << 70, 0), lambda b, h, i, j: j <= i),
    "prefix": (masks.prefix(3), lambda b, h, i, j: j < 3),
    "prefix each": (masks.prefix(torch.tensor([0, 6])), lambda b, h, i, j: j < [0, 6][b]),
    "documents": (masks.documents(IDS, KEY_IDS), lambda b, h, i, j: IDS[b, i] == KEY_IDS[j]),
    "documents in no order": (
        masks.documents(IDS[0], UNSORTED),
        lambda b, h, i, j: IDS[0, i] == UNSORTED[j],
    ),
    "intervals": (
        masks.intervals(torch.tensor([0, 1, 6, 9, 3]), torch.tensor([3, 9, 2, 9, 4])),
        lambda b, h, i, j: [0, 1, 6, 9, 3][i] <= j < [3, 9, 2, 9, 4][i],
    ),
    "intervals of each head": (
        masks.intervals(torch.tensor([[[0], [4]]]), torch.tensor([[[7]], [[5]]])),
        lambda b, h, i, j: [0, 4][h] <= j < [7, 5][b],
    ),
    "tensor": (masks.from_tensor(TENSOR), lambda b, h, i, j: TENSOR[b, h, i, j]),
    "tensor of keys": (masks.from_tensor(KEY_TENSOR), lambda b, h, i, j: KEY_TENSOR[b, 0, 0, j]),
    "tensor of a vector": (
        masks.from_tensor(KEY_TENSOR[0, 0, 0].float()),
        lambda b, h, i, j: KEY_TENSOR[0, 0, 0, j],
    ),
    "function": (
        masks.from_function(lambda b, h, i, j: (i + j + h) % 3 != b),
        lambda b, h, i, j: (i + j + h) % 3 != b,
    ),
}


def by_definition(rule) -> torch.Tensor:
    """The dense mask, one pair at a time."""
    where = itertools.product(range(BATCH), range(HEADS), range(QUERIES), range(KEYS))
    dense = torch.tensor([bool(rule(*at)) for at in where])
    return dense.view(BATCH, HEADS, QUERIES, KEYS)


EXPLICIT = {name: by_definition(rule) for name, (_, rule) in LEAVES.items()}


def dense(mask: masks.Mask) -> torch.Tensor:
    return mask.to_dense(queries=QUERIES, keys=KEYS, batch=BATCH, heads=HEADS)


@pytest.mark.parametrize("name", LEAVES)
def test_a_mask_is_its_definition(name):
    assert dense(LEAVES[name][0]).equal(EXPLICIT[name])


@st.composite
def trees(draw, depth: int = 3):
    """(a mask expression, the dense mask that it means)."""
    kind = draw(st.sampled_from(["leaf", "~", "&", "|", "&", "|"])) if depth else "leaf"
    if kind == "leaf":
        name = draw(st.sampled_from(sorted(LEAVES)))
        return LEAVES[name][0], EXPLICIT[name]
    left, a = draw(trees(depth - 1))
    if kind == "~":
        return ~left, ~a
    right, b = draw(trees(depth - 1))
    return (left & right, a & b) if kind == "&" else (left | right, a | b)


@given(trees())
def test_an_expression_of_masks_is_that_of_the_dense_ones(tree):
    mask, expected = tree
    assert dense(mask).equal(expected)
    per_query = (expected != expected[:, :, :1]).any()
    assert mask.per_query or not per_query


@given(trees())
def test_bounds_are_sound(tree):
    """Nothing is allowed outside of the bounds; where they are exact, all inside is."""
    mask, expected = tree
    start, stop, exact = mask.bounds(Shape(BATCH, HEADS, HEADS, QUERIES, KEYS))
    key = torch.arange(KEYS)
    inside = (start[..., None] <= key) & (key < stop[..., None])
    assert not (expected & ~inside).any()
    if exact:
        assert expected.equal(inside.expand_as(expected))


@pytest.mark.parametrize(
    "name", ["padding", "causal", "window", "documents", "intervals", "tensor of keys"]
)
def test_the_bounds_of_intervals_are_exact(name):
    mask = LEAVES[name][0]
    if name == "tensor of keys":  # of which the first is one interval
        mask = masks.from_tensor(KEY_TENSOR[:1])
    assert mask.bounds(Shape(BATCH, HEADS, HEADS, QUERIES, KEYS)).exact


@given(trees(), st.sampled_from(["reference", "blocked", "auto"]))
def test_attention_under_an_expression_is_that_under_the_dense_mask(tree, impl):
    torch.manual_seed(0)
    mask, expected = tree
    q, k, v = qkv(BATCH, HEADS, QUERIES, KEYS)
    found, wanted = (attlas.attention(q, k, v, m, impl=impl) for m in (mask, expected))
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.weights.to_dense(), wanted.weights.to_dense())
    torch.testing.assert_close(found.weights.entropy(), wanted.weights.entropy())
    torch.testing.assert_close(found.weights.received(), wanted.weights.received())


@given(trees(depth=2))
def test_small_blocks_under_an_expression(tree):
    from _pytest.monkeypatch import MonkeyPatch

    from attlas import blocks, fused, spec, streaming

    torch.manual_seed(0)
    mask, expected = tree
    q, k, v = qkv(BATCH, HEADS, QUERIES, KEYS)
    with MonkeyPatch.context() as patch:
        for module in (blocks, fused, spec, streaming):
            for name, value in {"ELEMENTS": 8, "SPAN": 2, "ROWS": 2, "TILE": 2}.items():
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        found = attlas.attention(q, k, v, mask, impl="blocked")
        entropy, received = found.weights.entropy(), found.weights.received()
    wanted = attlas.attention(q, k, v, expected, impl="reference")
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.weights.logsumexp, wanted.weights.logsumexp)
    torch.testing.assert_close(entropy, wanted.weights.entropy())
    torch.testing.assert_close(received, wanted.weights.received())


# --- what is not done -------------------------------------------------------------------


def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of scores of each block that is computed."""
    counts: list[int] = []
    scores = ScoreSpec.scores

    def counting(self, query, key, *args, **kwargs):
        result = scores(self, query, key, *args, **kwargs)
        counts.append(result.numel())
        return result

    monkeypatch.setattr(ScoreSpec, "scores", counting)
    return counts


SKIPPED = {
    "causal": (masks.causal(), 0.6),
    "window": (masks.sliding_window(4, 4), 0.25),
    "padding": (masks.padding(torch.tensor([16])), 0.2),
    "documents": (masks.documents(torch.arange(128) // 16), 0.25),
    "two ends": (masks.prefix(8) | ~masks.prefix(120), 0.2),
    "nothing": (masks.prefix(0), 0.0),
    "everything": (masks.prefix(128), 1.0),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_blocks_that_are_empty_are_skipped(case, small_blocks, monkeypatch):
    """The share of the scores that is computed, of the forward and of a statistic."""
    mask, share = SKIPPED[case]
    q, k, v = qkv(1, 1, 128)
    counts = scored(monkeypatch)
    weights = attlas.attention(q, k, v, mask, softcap=50.0, impl="blocked").weights
    assert sum(counts) <= share * 128 * 128
    for readout in (weights.entropy, weights.received):
        if case == "two ends" and readout == weights.received:
            continue  # the hull of the queries that reach a block of keys is all of them
        counts.clear()
        readout()
        assert sum(counts) <= share * 128 * 128
    assert (sum(counts) == 128 * 128) == (case == "everything")


@pytest.mark.parametrize("impl", KERNELS)
def test_a_function_is_asked_about_small_blocks_only(impl, small_blocks):
    largest = []

    def rule(b, h, i, j):
        largest.append(torch.broadcast_shapes(b.shape, h.shape, i.shape, j.shape).numel())
        return (i - j) % 2 == 0

    q, k, v = qkv(2, 2, 64)
    weights = attlas.attention(q, k, v, masks.from_function(rule), impl=impl).weights
    weights.entropy(), weights.received(), weights[0, 0, 3], weights.pool(4)
    assert max(largest) < 2 * 2 * 64 * 64 / 8


@pytest.mark.parametrize("impl", KERNELS)
def test_memory_is_linear_in_the_length(impl):
    """No tensor of L x S elements: causal, L = S = 20000, forward and readouts and backward."""
    length = 20000
    q = torch.randn(1, 1, length, 2, requires_grad=True)
    with Watch() as watch:
        output, weights = attlas.attention(q, q, q, window_size=(16, 0), impl=impl)
        total = output.sum() + weights.entropy().sum() + weights.received().sum()
        total.backward()
    assert watch.largest <= 1 << 24 < length * length / 16
    with Watch() as watch:
        rule = masks.causal() & masks.padding(torch.tensor([length - 5]))
        attlas.attention(q.detach(), q.detach(), q.detach(), rule, impl=impl)
    assert watch.largest <= 1 << 24


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_zeros_that_cannot_be_additive_allows_nothing(dtype):
    q = torch.ones(1, 3, 4)
    assert attlas.attention(q, q, q, torch.zeros(3, 3, dtype=dtype)).output.eq(0).all()
    assert attlas.attention(q[:, :0], q, q, torch.zeros(0, 3)).output.shape == (1, 0, 4)


def test_from_function_must_return_bool():
    mask = masks.from_function(lambda b, h, i, j: i - j)
    with pytest.raises(
        TypeError, match=r"must return a bool tensor, got torch.int64; return a comp"
    ):
        dense(mask)
    with pytest.raises(TypeError, match="must return a bool tensor, got bool"):
        dense(masks.from_function(lambda b, h, i, j: True))


def test_double_negation_is_the_mask_itself():
    mask = masks.causal()
    assert ~~mask is mask
    assert dense(mask & mask).equal(dense(mask))
    shape = Shape(1, 1, 1, 2, 2)
    assert mask.block(whole(shape), torch.device("cpu")).tolist() == [
        [[[True, False], [True, True]]]
    ]


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a, lambda a, b: bool(a)],
)
def test_masks_have_no_truth(combine):
    """`causal() and padding(n)` was the padding alone, and said nothing."""
    message = r"^masks must be combined with &, \| and ~, got .*; `and`, `or` and `not` would"
    with pytest.raises(TypeError, match=message):
        combine(masks.causal(), masks.padding(torch.tensor([2])))
