"""Lazy weights are as exact as plain PyTorch's, at any size of score, and sum to what they must.

Errors are against float64 of the same inputs. Where the library sums a score in the order in which
PyTorch does, the errors are the same: 1.00 with AVX-512 and AVX2 on Intel. Else the largest of all
is chance, and so the largest of each head are averaged, over 32 heads. The goal is 1.25 of plain
PyTorch; with the generic library at most 1.15 is seen in 12 draws of each score to 100. At 500 the
few rows with two keys of almost one score make all of the error, and 1.25 is seen: there the bound
leaves as much room again.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks

from .helpers import IMPLS, KERNELS, NATIVE, Watch, qkv, same

pytestmark = pytest.mark.numeric
EPS = torch.finfo(torch.float32).eps
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs(score: float, size: int = 32, queries: int = 256, keys: int = 256) -> list[Tensor]:
    """Query, key and value whose scores have about this standard deviation."""
    query, key, value = qkv(4, 8, queries, keys, size, dtype=torch.float32)
    return [query * score, key, value]


def plain_weights(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """softmax(Q Kᵀ / sqrt(E)) in three plain lines."""
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]))
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -math.inf)
    return scores.softmax(-1)


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The mean of the largest error of each head, and the root of the mean square of all."""
    error = found.double() - exact
    return error.abs().amax((-2, -1)).mean().item(), error.square().mean().sqrt().item()


@pytest.mark.parametrize("is_causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("score", [1.0, 10.0, 40.0, 100.0, 500.0])
@pytest.mark.parametrize("impl", [NATIVE])
def test_lazy_weights_are_as_exact_as_plain_ones(impl, score, is_causal):
    query, key, value = inputs(score)
    weights = attlas.attention(query, key, value, is_causal=is_causal, impl=impl).weights
    exact = plain_weights(query.double(), key.double(), is_causal)
    largest, rms = errors(plain_weights(query, key, is_causal), exact)
    rows = torch.stack([weights[:, :, i] for i in range(256)], 2)
    most = 1.25 if score <= 100 else 1.5
    for found in (weights.to_dense(), rows, weights.map_rows(lambda row: row)):
        ours = errors(found, exact)
        assert ours[0] <= most * largest
        assert ours[1] <= most * rms


@pytest.mark.parametrize("sinks", [None, 0.0, 60.0, 1e4], ids=["no sinks", "low", "high", "over"])
@pytest.mark.parametrize("score", [1.0, 10.0, 40.0, 100.0, 500.0])
@pytest.mark.parametrize("impl", [NATIVE])
def test_rows_and_sinks_sum_to_one(impl, score, sinks):
    query, key, value = inputs(score, queries=40)
    sinks = None if sinks is None else torch.full((8,), sinks)
    weights = attlas.attention(query, key, value, sinks=sinks, impl=impl).weights
    mass = weights.sink_mass().double()
    assert (weights.to_dense().double().sum(-1) + mass - 1).abs().max() <= 4 * EPS
    received = weights.received().double().sum(-1) + mass.sum(-1)
    assert (received - 40).abs().max() <= 40 * 4 * EPS


@pytest.mark.parametrize("lowest", [-1e4, -1e30, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_low_bias_tell_their_keys_apart(impl, lowest):
    """Such a row once had weights of 1 each: its log-sum-exp was the bias, however many keys."""
    keys = 1000
    query, key, value = (torch.zeros(1, 2, n, 8) for n in (3, keys, keys))
    bias = torch.zeros(1, 1, 3, keys)
    bias[:, :, 1] = lowest
    weights = attlas.attention(query, key, value, bias=bias, impl=impl).weights
    assert (weights.to_dense() * keys - 1).abs().max() <= 4 * EPS
    assert (weights.received() * keys / 3 - 1).abs().max() <= 8 * EPS
    assert (weights.entropy() - math.log(keys)).abs().max() <= 16 * EPS * math.log(keys)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_weight_is_at_most_one(impl):
    """Of a row with one key it is 1; 1 + 2e-7 made binary_cross_entropy raise."""
    query, key, value = inputs(5.0, queries=128, keys=128, size=64)
    weights = attlas.attention(query, key, value, is_causal=True, impl=impl).weights
    rows = torch.stack([weights[:, :, i] for i in range(128)], 2)
    for found in (weights.to_dense(), rows, weights.max().values, weights.topk(3).values):
        assert found.max() <= 1
        assert found.min() >= 0
    if impl == "native":  # PyTorch's products of another shape round otherwise
        assert (rows[:, :, 0, 0] == 1).all()
        torch.nn.functional.binary_cross_entropy(rows, torch.ones_like(rows))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_divergence_and_no_entropy_is_negative(impl):
    """Rows of one key, rows that are equal, and rows that are nearly so."""
    for score in (0.3, 1.0, 10.0):
        query, key, value = inputs(score, size=8, queries=40, keys=40)
        near = key + 1e-4 * torch.randn_like(key)
        one, two = (
            attlas.attention(query, k, value, is_causal=True, impl=impl).weights
            for k in (key, near)
        )
        for p, q in ((one, one), (one, two), (two, one)):
            assert p.kl_divergence(q).min() >= 0
        if impl != "blocked":  # whose rows sum to 1 but for the rounding of a log-sum-exp
            assert one.kl_divergence(two.to_dense()).min() >= 0
        assert one.entropy().min() >= 0
        assert one.head_mean().kl_divergence(two.head_mean()).min() >= 0
        exact = plain_weights(query.double(), key.double(), True)
        other = plain_weights(query.double(), near.double(), True)
        expected = (torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, other)).sum(-1)
        assert (one.kl_divergence(two) - expected).abs().max() <= 64 * EPS * (1 + score)


@pytest.mark.parametrize("impl", [NATIVE])
def test_a_divergence_from_rounded_weights_is_finite(impl):
    """Weights below exp(-87) are 0 in float32, dense and lazy alike."""
    query, key, value = inputs(100.0)
    weights = attlas.attention(query, key, value, impl=impl).weights
    divergence = weights.kl_divergence(weights.to_dense())
    assert divergence.min() >= 0
    assert divergence.max() <= 16 * EPS


# --- what is read is what is there, bit for bit -----------------------------------------------

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (9, 2), "causal_alignment": "lower_right"},
    "mask": {"mask": torch.rand(2, 1, 37, 61, generator=torch.Generator().manual_seed(1)) < 0.7},
    "rule": {"mask": masks.padding(torch.tensor([50, 7])) | masks.causal()},
    "bias, softcap and sinks": {
        "bias": torch.linspace(-3, 3, 61).view(1, 1, 1, 61),
        "softcap": 4.0,
        "sinks": torch.linspace(-1, 2, 6),
    },
}
INDICES = (
    0,
    (1, 3),
    (slice(None), 4),
    (slice(None), slice(1, 5)),
    (..., 5, slice(None)),
    (..., slice(3, 30), slice(17, 44)),
    (..., slice(1, None, 7), slice(0, 50, 3)),
    (0, 2, [3, 30, 3], slice(None)),
    ([0, 1], [5, 0], [36, 2], [60, 1]),
    (..., 60),
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("impl", [NATIVE])
def test_what_is_read_has_the_bits_of_the_dense_weights(impl, option, dtype):
    query, key, value = qkv(2, 6, 37, 61, 24, kv_heads=2, dtype=dtype)
    options = {**OPTIONS[option], "enable_gqa": True, "impl": impl}
    if "bias" in options:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options |= {"bias": options["bias"].to(wide), "sinks": options["sinks"].to(wide)}
    weights = attlas.attention(query, key, value, **options).weights
    dense, mean = weights.to_dense(), weights.head_mean()
    for index in INDICES:
        assert same(weights[index], dense[index]), index
    assert all(same(a, b) for a, b in zip(weights, dense, strict=True))
    for index in (
        0,
        (..., 5, slice(None)),
        (slice(None), slice(1, 9), slice(17, 44)),
        ([0, 1], [36, 2]),
    ):
        assert same(mean[index], mean.to_dense()[index]), index
    rows = weights.map_rows(lambda row: row)
    assert same(rows.to(dtype), dense)
    assert same(weights.max().values, rows.amax(-1))
    assert same(weights.topk(3).values, rows.topk(3, -1).values)
    assert same(weights.mean(1), mean.to_dense())


@pytest.mark.parametrize("impl", [NATIVE])
def test_an_index_with_gradients_reads_the_same_bits(impl):
    query, key, value = inputs(10.0, queries=30, keys=40)
    expected = attlas.attention(query, key, value, impl=impl).weights[0, :, 3:9]
    query.requires_grad_()
    found = attlas.attention(query, key, value, impl=impl).weights[0, :, 3:9]
    assert same(found.detach(), expected)
    (grad,) = torch.autograd.grad(found.square().sum(), query)
    scores = query @ key.mT / math.sqrt(32)
    (wanted,) = torch.autograd.grad(scores.softmax(-1)[0, :, 3:9].square().sum(), query)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("impl", KERNELS)
def test_a_slice_with_a_step_computes_only_what_it_selects(impl):
    """`weights[0, 0, ::100]` once computed every row of its range."""
    query, key, value = qkv(1, 4, 1000, 1000, 8, dtype=torch.float32)
    weights = attlas.attention(query, key, value, impl=impl).weights
    dense = weights.to_dense()
    for index in ((0, 0, slice(None, None, 100)), (0, 1, slice(5, 9), slice(None, None, 50))):
        with Watch() as watch:
            found = weights[index]
        torch.testing.assert_close(found, dense[index])
        assert watch.largest <= max(found.numel(), 4 * 1000 * 8)  # or the keys themselves


# --- long sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [NATIVE])
def test_the_entropy_of_a_million_equal_keys(impl):
    """Sums of chunks were added one by one, which lost 2e-4 of it."""
    query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8).expand(1, 1, 1 << 20, 8)
    weights = attlas.attention(query, key, key, impl=impl).weights
    expected = 20 * math.log(2)
    assert abs(weights.entropy().item() - expected) <= 16 * EPS * expected
    assert abs(weights.received().double().sum().item() - 1) <= 4 * EPS


@pytest.mark.parametrize("impl", [NATIVE])
def test_what_keys_are_given_by_many_queries_in_the_pass_of_the_output(impl):
    """Each group of blocks was one long sum: 5e-5 of it were lost."""
    query = torch.zeros(1, 1, 1 << 18, 8)
    key = torch.zeros(1, 1, 7, 8)
    found = attlas.attention_statistics(query, key, key, statistics="received", impl=impl).weights
    expected = (1 << 18) / 7
    assert (found.received().double() / expected - 1).abs().max() <= 64 * EPS
