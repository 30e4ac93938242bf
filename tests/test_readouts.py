"""Readouts one by one: values on paper, against dense weights, messages, memory."""

from __future__ import annotations

import math

import pytest
import torch

import attlas

from .helpers import IMPLS, qkv

pytestmark = pytest.mark.numeric

Q, K, _ = qkv(2, 4, 5, 7)
W = attlas.attention(Q, K, K).weights


def uniform(queries: int = 10, keys: int | None = None, **options) -> attlas.AttentionWeights:
    """Weights that are 1 / n over the n keys that are allowed."""
    q = torch.zeros(1, 1, queries, 2, dtype=torch.float64)
    k = torch.zeros(1, 1, queries if keys is None else keys, 2, dtype=torch.float64)
    return attlas.attention(q, k, k, **options).weights


# --- one value for each query -----------------------------------------------------------


def test_values_on_paper():
    weights = uniform(4, is_causal=True)  # rows 1, 1/2, 1/3, 1/4
    thirds = torch.tensor([1, 1, 2 / 3, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(weights.windowed_mass(1, 0)[0, 0], thirds)
    half = torch.tensor([0, 0.5, 1, 1.5], dtype=torch.float64)
    torch.testing.assert_close(weights.expected_position()[0, 0], half)
    torch.testing.assert_close(weights.guided(lambda b, h, i, j: i - j)[0, 0], half)


def test_positions_are_counted_among_the_keys_where_the_window_is():
    """Lower right: the own position of query 0 is key 2. A penalty counts queries from 0."""
    weights = uniform(2, 4, causal_alignment="lower_right")
    assert weights.windowed_mass(0, 0).tolist() == [[[0.25, 0.25]]]
    assert weights.windowed_mass(1, 0).tolist() == [[[0.5, 0.5]]]
    assert weights.guided(lambda b, h, i, j: i == j).tolist() == [[[0.25, 0.25]]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("small", [False, True])
def test_a_quantile_counts_the_keys_that_hold_a_share(impl, share, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    q, k, v = qkv(2, 4, 9, 12, kv_heads=2)
    options = {"enable_gqa": True, "is_causal": True, "sinks": torch.randn(4).double()}
    weights = attlas.attention(q, k, v, **options, impl=impl).weights
    rows = weights.to_dense().sort(-1, descending=True).values
    expected = []
    for row in rows.flatten(0, 2).tolist():
        held, count, total = 0.0, 0, math.fsum(row)
        while held < share * total * (1 - 1e-14):
            held, count = held + row[count], count + 1
        expected.append(count)
    assert weights.quantile(share).dtype == torch.int64
    assert weights.quantile(share).flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quantile_of_equal_weights_is_not_moved_by_a_rounding(dtype):
    for keys in (10, 100, 1000):
        q, k = torch.zeros(1, 1, 1, 2, dtype=dtype), torch.zeros(1, 1, keys, 2, dtype=dtype)
        assert attlas.attention(q, k, k).weights.quantile(0.9).item() == 9 * keys // 10
        assert attlas.attention(q, k, k).weights.quantile(1).item() == keys


@pytest.mark.parametrize("impl", IMPLS)
def test_a_quantile_is_no_more_keys_than_there_are(impl):
    """All of float64 weights took S + 1 keys: two sums of a row differed in their rounding."""
    q, k, _ = qkv(1, 1, 32, 4000, size=8)
    counts = attlas.attention(q, k, k, window_size=(None, 3900), impl=impl).weights.quantile(1.0)
    assert counts[0, 0, 0] <= 3901
    assert counts.max() <= 4000


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mass_of_a_large_cell_is_exact(impl):
    """`blocked` summed a cell one weight after the other: 991.14 for 1000."""
    q = torch.zeros(1, 1, 1000, 8)
    mass = attlas.attention(q, q, q, impl=impl).weights.pool((1000, 999), "mass")
    torch.testing.assert_close(mass, torch.tensor([[[[999.0, 1.0]]]]), rtol=1e-5, atol=0)


def test_empty_rows_are_zero():
    weights = uniform(3, mask=torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]))
    for found in (
        weights.expected_position(),
        weights.windowed_mass(None, None),
        weights.guided(lambda b, h, i, j: torch.full_like(i + j, 9)),
        weights.quantile(0.5),
    ):
        assert found[0, 0, 1] == 0
        assert found[0, 0, 2] > 0


def test_a_penalty_behind_the_mask_is_not_read():
    weights = uniform(4, is_causal=True)
    found = weights.guided(lambda b, h, i, j: torch.where(j > i, math.nan, 1.0))
    torch.testing.assert_close(found, torch.ones_like(found))


# --- one value for each key -------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5,), (1, 4, 5), (2, 1, 5), (2, 4, 5)], ids=str)
def test_received_takes_weights_of_every_shape(impl, shape):
    weights, given = attlas.attention(Q, K, K, impl=impl).weights, torch.rand(shape).double()
    dense, full = weights.to_dense(), given.expand(2, 4, 5)[..., None]
    torch.testing.assert_close(weights.received(query_weights=given), (dense * full).sum(-2))
    mean = (dense * full).sum(-2) / full.sum(-2)
    torch.testing.assert_close(weights.received("mean", query_weights=given), mean)
    some = (dense * full)[:, :, 3:].sum(-2)
    found = weights.received(queries=slice(3, None), query_weights=given)
    torch.testing.assert_close(found, some)
    torch.testing.assert_close(weights.received("mean", query_weights=0 * given), 0 * some)


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_received_takes_weights_beside_fewer_dimensions(lead):
    q = torch.randn(*lead, 5, 4, dtype=torch.float64)
    weights = attlas.attention(q, q, q).weights
    for shape in {(5,), (*lead, 5)}:
        given = torch.rand(shape).double()
        expected = (weights.to_dense() * given[..., None]).sum(-2)
        torch.testing.assert_close(weights.received(query_weights=given), expected)


def test_top_keys_are_the_largest_of_received():
    for options in ({}, {"queries": slice(-2, None)}, {"query_weights": torch.rand(5).double()}):
        values, keys = W.top_keys(3, **options)
        expected = W.received(**options).topk(3)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(keys, expected.indices)
    values, keys = uniform(2, 4, is_causal=True).top_keys(3)
    assert keys.tolist() == [[[0, 1, -1]]]
    assert values.tolist() == [[[1.5, 0.5, 0]]]


# --- messages ---------------------------------------------------------------------------

MESSAGES = [
    (lambda: W.windowed_mass(-1, 0), ValueError, r"\(left, right\) must be \(left, right\), each"),
    (lambda: W.windowed_mass(1.5, 0), TypeError, r"\(left, right\) must be \(left, right\), each"),
    (lambda: W.guided(3), TypeError, "penalty must be callable, got int; pass a function"),
    (
        lambda: W.guided(lambda *at: 1.0),
        TypeError,
        r"penalty must return a tensor that broadcasts to \[b, h, q, k\], got float; compute it",
    ),
    (
        lambda: W.guided(lambda *at: torch.ones(3, 2)),
        ValueError,
        r"penalty must return a tensor that .*, got \[3, 2\]; it is called for a block of \[2, 4",
    ),
    (
        lambda: W.guided(lambda *at: torch.ones(1, 1, 1, 1, 1)),
        ValueError,
        r"penalty must return a tensor that .*, got \[1, 1, 1, 1, 1\]; it",
    ),
    (lambda: W.quantile(0), ValueError, "share must be a positive finite number, got 0; write 0.9"),
    (lambda: W.quantile(90), ValueError, "share must be above 0 and at most 1, got 90; write 0.9"),
    (lambda: W.quantile("a"), TypeError, "share must be a positive finite number, got str; "),
    (
        lambda: W.received("max", query_weights=torch.ones(5)),
        ValueError,
        "query_weights must be None for the maximum, got a tensor; choose reduce='sum' or",
    ),
    (
        lambda: W.received(query_weights=torch.ones(7)),
        ValueError,
        r"query_weights must broadcast to \[2, 4, 5\], got \[7\]; pass query_weights as a",
    ),
    (
        lambda: W.received(query_weights=torch.ones(2, 5)),
        ValueError,
        r"query_weights must broadcast to \[2, 4, 5\], got \[2, 5\]; pass",
    ),
    (
        lambda: W.received(query_weights=[1, 2, 3, 4, 5]),
        TypeError,
        "query_weights must be a floating tensor, got list; pass query_weights as a tensor",
    ),
    (lambda: W.top_keys(8), ValueError, "k must be from 1 to 7, got 8; choose a value in that"),
    (lambda: W.top_keys(1.0), TypeError, "k must be an int from 1 to 7, got float; pass a"),
]


@pytest.mark.parametrize(("make", "kind", "pattern"), MESSAGES)
def test_a_message_says_the_rule_the_value_and_the_mend(make, kind, pattern):
    with pytest.raises(kind, match=f"^{pattern}") as caught:
        make()
    assert type(caught.value) is kind


# --- gradients over the options: what test_weights.py, which has the others, leaves ------

OPTIONS = {
    "mask": {"mask": torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])},
    "causal, grouped": {"is_causal": True, "enable_gqa": True},
    "lower right window": {"window_size": (1, 0), "causal_alignment": "lower_right"},
    "softcap": {"softcap": 1.5},
    "scale, grouped": {"scale": -0.7, "enable_gqa": True},
}


@pytest.mark.parametrize("extra", ["none", "bias and sinks"])
@pytest.mark.parametrize("case", OPTIONS)
def test_gradcheck_and_gradgradcheck_over_the_options(case, extra, small_blocks):
    options = OPTIONS[case]
    q, k, _ = qkv(1, 2, 4, 3, size=2, kv_heads=1 if "enable_gqa" in options else 2, grad=True)
    inputs = {"q": q, "k": k, "w": torch.rand(4, dtype=torch.float64).requires_grad_()}
    if "bias" in extra:
        inputs["bias"] = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
        inputs["sinks"] = torch.randn(2, dtype=torch.float64, requires_grad=True)
    names = tuple(inputs)

    def run(*tensors):
        given = dict(zip(names, tensors, strict=True))
        q, k, w = (given.pop(name) for name in ("q", "k", "w"))
        weights = attlas.attention(q, k, k, **given, **options).weights
        mean = weights.head_mean()
        keys = weights.detach().max().keys  # one that is read, -1 on an empty row
        return (
            weights.cross_entropy(keys),
            weights.kl_divergence(torch.full((4, 3), 0.3, dtype=torch.float64)),
            mean.kl_divergence(weights.head_mean()),
            mean.entropy(),
            mean.received(query_weights=w),
        )

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)
