"""Rollout over layers against products of dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attlas
from attlas import blocks, masks, streaming

from .helpers import KERNELS, Watch, grads, qkv

pytestmark = pytest.mark.numeric


def layers(count: int = 3, impl: str = "auto", grad: bool = False, size: int = 7):
    options = [{}, {"is_causal": True}, {"enable_gqa": True, "softcap": 2.0}, {"sinks": True}]
    found = []
    for one in options[:count]:
        q, k, v = qkv(2, 4, size, kv_heads=2 if "enable_gqa" in one else 4, grad=grad)
        one = {**one, "sinks": torch.ones(4).double()} if "sinks" in one else one
        found.append(attlas.attention(q, k, v, **one, impl=impl).weights)
    return found


def dense(weights, residual: float) -> torch.Tensor:
    """The matrix of a rollout: the last layer on the left."""
    total = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for layer in weights:
        matrix = layer.to_dense()
        matrix = matrix.mean(1) if matrix.ndim == 4 else matrix
        identity = torch.eye(matrix.shape[-1], dtype=torch.float64)
        total = (residual * identity + (1 - residual) * matrix) @ total
    return total


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("impl", KERNELS)
def test_rollout_is_a_row_of_the_product(impl, count, residual):
    weights = layers(count, impl)
    expected = dense(weights, residual)
    for start in (0, 3, -1):
        found = attlas.rollout(weights, start=start, residual=residual)
        torch.testing.assert_close(found, expected[:, start].expand_as(found))
        assert found.shape == (2, 7)
    for start in ([0, -2], range(7), torch.tensor([1, 1])):
        found = attlas.rollout(weights, start=start, residual=residual)
        torch.testing.assert_close(found, expected[:, list(start)])
    for shape in ((7,), (3, 7), (2, 3, 7), (1, 3, 7)):
        x = torch.rand(shape, dtype=torch.float64)
        found = attlas.rollout(weights, start=x, residual=residual)
        torch.testing.assert_close(found, x @ expected)


def test_every_kind_of_layer():
    weights = layers()
    single = [attlas.attention(*(t[:, 0] for t in qkv(2, 1, 7))).weights for _ in range(2)]
    mixed = [weights[0], weights[1].head_mean(), *single]
    torch.testing.assert_close(attlas.rollout(mixed, start=2), dense(mixed, 0.5)[:, 2])
    flat = [attlas.attention(*(t[0, 0] for t in qkv(1, 1, 7))).weights for _ in range(2)]
    torch.testing.assert_close(attlas.rollout(flat, start=2), dense(flat, 0.5)[2])
    torch.testing.assert_close(attlas.rollout(tuple(flat), start=[2]), dense(flat, 0.5)[[2]])


@pytest.mark.parametrize("lead", [(2, 4), (2,), ()], ids=str)
@pytest.mark.parametrize("impl", KERNELS)
def test_dropped_weights_are_averaged_over_heads(impl, lead):
    """Once they gave a rollout of each head, where weights before dropout give that of the mean."""
    first, second = (
        attlas.attention(*(torch.randn(*lead, 7, 4).double() for _ in range(3)), dropout_p=p)
        for p in (0.3, 0.5)
    )
    weights = [replace(result.weights, impl=impl) for result in (first, second)]
    dropped = [layer.dropped for layer in weights]
    expected = dense(dropped, 0.5)
    for start in (2, [0, -1]):
        found = attlas.rollout(dropped, start=start)
        torch.testing.assert_close(found, expected[..., start, :])
        assert found.shape == attlas.rollout(weights, start=start).shape
    mixed = [weights[0], dropped[1]]
    torch.testing.assert_close(attlas.rollout(mixed, start=0), dense(mixed, 0.5)[..., 0, :])


def test_dropped_weights_of_selected_heads_are_averaged():
    weights = attlas.attention(*qkv(2, 4, 7), dropout_p=0.3).weights.select_heads([2, 0])
    found = attlas.rollout([weights.dropped], start=3)
    torch.testing.assert_close(found, dense([weights.dropped], 0.5)[:, 3])


def test_a_rollout_of_dropped_weights_has_gradients():
    q, k, v = qkv(2, 4, 7, grad=True)
    layer = attlas.attention(q, k, v, dropout_p=0.3).weights.dropped
    lazy = attlas.rollout([layer, layer], start=0).square().sum()
    matrix = 0.5 * torch.eye(7).double() + 0.5 * layer.to_dense().mean(1)
    exact = (matrix @ matrix)[:, 0].square().sum()
    for a, b in zip(grads(lazy, q, k), grads(exact, q, k), strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_the_layers():
    """Layer 1 copies key 2 to position 1, layer 2 reads position 1: the input is key 2."""
    q = torch.zeros(1, 1, 3, 2)
    first = attlas.attention(q, q, q, torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 1]])).weights
    second = attlas.attention(q, q, q, torch.tensor([[0, 1, 0], [0, 1, 0], [0, 1, 0]])).weights
    found = attlas.rollout([first, second], start=0, residual=0.0)
    assert found.tolist() == [[0, 0, 1]]
    assert attlas.rollout([first, second], start=0, residual=1.0).tolist() == [[1, 0, 0]]


def test_a_rollout_sums_to_one_and_an_empty_row_keeps_its_residual():
    q, k, v = qkv(2, 4, 7)
    full = attlas.attention(q, k, v).weights
    total = attlas.rollout([full, full], start=0).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    nothing = attlas.attention(q, k, v, masks.padding(torch.tensor([0, 7]))).weights
    total = attlas.rollout([nothing], start=0).sum(-1)
    torch.testing.assert_close(total, torch.tensor([0.5, 1]).double())


def test_gradcheck(small_blocks):
    inputs = [t for _ in range(2) for t in qkv(1, 2, 4, size=2, grad=True)[:2]]
    start = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)

    def run(q, k, r, s, start):
        weights = [attlas.attention(a, b, b, is_causal=True).weights for a, b in ((q, k), (r, s))]
        return attlas.rollout(weights, start=start), attlas.rollout(weights, start=2)

    assert torch.autograd.gradcheck(run, (*inputs, start))
    assert torch.autograd.gradgradcheck(run, (*inputs, start), fast_mode=True)


@pytest.mark.parametrize("impl", KERNELS)
def test_no_matrix_is_held(impl, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 1 << 14)
    monkeypatch.setattr(streaming, "ELEMENTS", 1 << 14)
    weights = layers(2, impl, grad=True, size=1024)
    with Watch() as watch:
        found = attlas.rollout(weights, start=0).square().sum()
        torch.autograd.grad(found, weights[0].query)
    assert 1024 < watch.largest <= 1 << 16  # the matrices hold 1 << 20 for each head


W = layers(1)[0]
WIDE = attlas.attention(*qkv(2, 4, 5, 7)).weights
OTHER = attlas.attention(*qkv(2, 4, 6)).weights
MESSAGES = [
    ((W, 0), {}, TypeError, "weights must be a sequence of lazy weights, got AttentionWeights; "),
    (([], 0), {}, ValueError, r"weights must have a layer, got none; pass \[layer_1.weights"),
    (([W, 3], 0), {}, TypeError, r"weights\[1\] must be lazy weights, got int; pass"),
    (([WIDE], 0), {}, ValueError, r"weights\[0\] must be square, got \[2, 4, 5, 7\]; all layers"),
    (
        ([W, OTHER], 0),
        {},
        ValueError,
        r"weights\[1\] must have the shape \[2, 7, 7\], got \[2, 4, 6, 6\]; all layers read",
    ),
    (([W], 7), {}, IndexError, "start must be from -7 to 6, got 7; check it against the number"),
    (([W], [0, -8]), {}, IndexError, r"start must be from -7 to 6, got \[0, -8\]; check it"),
    (([W], "a"), {}, TypeError, "start must be a position, positions or a floating tensor, got"),
    (([W], True), {}, TypeError, "start must be a position, positions or a floating tensor, got"),
    (
        ([W], torch.ones(6)),
        {},
        ValueError,
        r"start must be \[L\], \[n, L\] or \[B, n, L\], L=7, got \[6\]; pass a position, or",
    ),
    (([W], 0), {"residual": 1.5}, ValueError, "residual must be from 0 to 1, got 1.5; it is the"),
    (
        ([W], 0),
        {"residual": float("inf")},
        ValueError,
        "residual must be a finite number, got inf; it is the share of the identity",
    ),
    (([W], 0), {"residual": "a"}, TypeError, "residual must be a finite number, got str; pass"),
]


@pytest.mark.parametrize(("given", "options", "kind", "pattern"), MESSAGES)
def test_a_message_says_the_rule_the_value_and_the_mend(given, options, kind, pattern):
    with pytest.raises(kind, match=f"^{pattern}") as caught:
        attlas.rollout(given[0], start=given[1], **options)
    assert type(caught.value) is kind
