"""Singular values and the effective rank without a matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import attlas
from attlas import blocks, spectrum, streaming

from .helpers import KERNELS, Watch, qkv

pytestmark = pytest.mark.numeric

CASES = {
    "wide": {"queries": 30, "keys": 50},
    "tall": {"queries": 50, "keys": 30},
    "grouped, causal": {"queries": 45, "kv_heads": 2, "is_causal": True},
    "sharp": {"queries": 40, "scale": 3.0},
    "sinks": {"queries": 40, "sinks": torch.ones(4).double()},
    "half of the rows empty": {"queries": 40, "mask": (torch.arange(40) % 2)[:, None]},
    "one query": {"queries": 1, "keys": 9},
}
SHAPE = ("queries", "keys", "kv_heads")


def make(case: dict, grad: bool = False, impl: str = "auto", **inputs) -> attlas.AttentionWeights:
    sizes = {n: v for n, v in case.items() if n in SHAPE}
    options = {n: v for n, v in case.items() if n not in SHAPE}
    q, k, v = qkv(2, 4, **sizes, grad=grad, **inputs)
    return attlas.attention(q, k, v, enable_gqa=True, impl=impl, **options).weights


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_singular_values_are_those_of_the_dense_weights(case, impl):
    weights = make(CASES[case], impl=impl)
    for lazy in (weights, weights.head_mean()):
        expected = torch.linalg.svdvals(lazy.to_dense())
        for k in {1, min(3, expected.shape[-1]), expected.shape[-1]}:
            found = lazy.singular_values(k)
            torch.testing.assert_close(found, expected[..., :k], rtol=1e-9, atol=1e-10)
            share = expected[..., :k] / expected[..., :k].sum(-1, keepdim=True)
            rank = (-torch.special.xlogy(share, share).sum(-1)).exp()
            torch.testing.assert_close(lazy.effective_rank(k), rank, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype):
    weights = make({"queries": 60}, dtype=dtype)
    wide = weights.map_rows(lambda rows: rows)
    assert wide.dtype == torch.float32
    expected = torch.linalg.svdvals(wide)[..., :4]
    torch.testing.assert_close(weights.singular_values(4), expected, rtol=0, atol=1e-4)


def test_a_basis_that_is_cut_back_still_converges(monkeypatch):
    """700 queries, and a basis of 32 columns at most."""
    sizes, original = [], torch.linalg.svd

    def svd(image, **options):
        sizes.append(image.shape[-1])
        return original(image, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    q, k, v = qkv(1, 2, 700, size=16)
    weights = attlas.attention(q, k, v).weights
    found = weights.singular_values(5)
    assert max(sizes) <= 32
    assert any(b < a for a, b in pairwise(sizes)), "it was cut back"
    expected = torch.linalg.svdvals(weights.to_dense())[..., :5]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_equal_singular_values_and_matrices_of_low_rank():
    eye = 60 * torch.eye(20, dtype=torch.float64)[None]
    weights = attlas.attention(eye, eye, eye, scale=1.0).weights
    torch.testing.assert_close(weights.singular_values(7), torch.ones(1, 7, dtype=torch.float64))
    torch.testing.assert_close(weights.effective_rank(20), torch.full((1,), 20.0).double())
    flat = attlas.attention(0 * eye, eye, eye).weights
    expected = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(flat.singular_values(3), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(flat.effective_rank(3), torch.ones(1).double(), rtol=0, atol=1e-7)
    nothing = attlas.attention(eye, eye, eye, torch.zeros(20, 20).bool()).weights
    assert nothing.singular_values(2).eq(0).all()
    assert nothing.effective_rank(2).eq(0).all()
    none = attlas.attention(eye[:, :0], eye, eye).weights
    assert none.singular_values(1).shape == (1, 1)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 3.0}], ids=str)
def test_gradcheck(options, small_blocks):
    q, k, _ = qkv(1, 2, 6, 7, size=3, kv_heads=1, grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)

    def run(q, k, bias, sinks):
        extra = {"bias": bias, "sinks": sinks, "enable_gqa": True, **options}
        weights = attlas.attention(q, k, k, **extra).weights
        mean = weights.head_mean()
        return weights.singular_values(2), weights.effective_rank(4), mean.singular_values(2)

    assert torch.autograd.gradcheck(run, (q, k, bias, sinks), atol=1e-5)


def test_a_second_derivative_is_refused():
    weights = make({"queries": 6}, grad=True)
    with pytest.raises(NotImplementedError, match=r"^singular_values must be differentiated once"):
        torch.autograd.grad(weights.singular_values(1).sum(), weights.query, create_graph=True)


@pytest.mark.parametrize("impl", KERNELS)
def test_no_matrix_is_held(impl, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 1 << 14)
    monkeypatch.setattr(streaming, "ELEMENTS", 1 << 14)
    q, k, v = qkv(1, 2, 1024, grad=True)
    weights = attlas.attention(q, k, v, scale=0.2, impl=impl).weights
    with Watch() as watch:
        torch.autograd.grad(weights.effective_rank(2).sum(), q)
    assert 1024 < watch.largest <= 1 << 18  # the matrices hold 1 << 21


def test_messages(monkeypatch):
    weights = make({"queries": 6, "keys": 4})
    for k, kind in ((5, ValueError), (0, ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match=r"^k must be .* from 1 to 4, got|^k must be from 1 to 4"):
            weights.singular_values(k)
        with pytest.raises(kind, match=r"^k must be"):
            weights.effective_rank(k)
    monkeypatch.setattr(spectrum, "PASSES", 2)
    with pytest.raises(RuntimeError, match=r"^k must leave a gap that 2 passes resolve, got 2; "):
        make({"queries": 60}).singular_values(2)
