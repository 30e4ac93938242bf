"""Traps that a review found: what surrounds a call, and inputs at the edge of what is allowed."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import masks, statistics

from .helpers import KERNELS, grads, plain, qkv

ALL = ["reference", *KERNELS]
close = torch.testing.assert_close


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "is_causal": True}])
def test_autocast_changes_nothing(impl, options):
    def run(enabled: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        q, k, v = (t.requires_grad_() for t in qkv(1, 2, 40, 50, dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output, weights = attlas.attention(q, k, v, impl=impl, **options)
            readouts = [weights.entropy(), weights[0, 0], weights.map_rows(lambda w: w.sum(-1))]
        loss = sum(t.square().sum() for t in [output, *readouts])
        return [output, weights.logsumexp, *readouts, *torch.autograd.grad(loss, (q, k, v))]

    for a, b in zip(run(True), run(False), strict=True):
        close(a, b)


def test_autocast_leaves_the_teaching_function_alone():
    q, k, v = qkv(1, 2, 8, 9, dtype=torch.float32)
    plain = attlas.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attlas.scaled_dot_product_attention(q, k, v)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_gives_readouts_without(impl, context):
    q, k, v = qkv(1, 2, 4, 5)
    q.requires_grad_()
    with context():
        weights = attlas.attention(q, k, v, impl=impl).weights
    assert not weights.entropy().requires_grad
    assert not weights[0, 0].requires_grad
    assert not weights.topk(2).values.requires_grad


@pytest.mark.parametrize("impl", ALL)
def test_documents_of_any_integer_dtype(impl):
    x = torch.randn(1, 5, 4)
    for dtype in (torch.uint8, torch.int8, torch.int64):
        ids = torch.tensor([1, 0, 1, 0, 1], dtype=dtype)
        weights = attlas.attention(x, x, x, masks.documents(ids), impl=impl).weights.to_dense()
        assert ((weights[0] > 0) == (ids[:, None] == ids)).all()


@pytest.mark.parametrize("impl", ALL)
def test_an_unlimited_window_allows_all_whatever_the_alignment(impl):
    q, k, v = qkv(1, 1, 7, 3)
    options = {"window_size": (None, None), "causal_alignment": "lower_right", "impl": impl}
    wide = attlas.attention(q, k, v, **options).weights
    close(wide.to_dense(), attlas.attention(q, k, v, impl="reference").weights.to_dense())
    close(wide[0, 0, 0], wide.to_dense()[0, 0, 0])


@pytest.mark.parametrize("impl", ALL)
def test_received_means_over_the_queries_of_each_batch_item(impl):
    q, k, v = qkv(2, 2, 4, 5)
    chosen = torch.tensor([[True, True, False, False], [True, True, True, True]])
    weights = attlas.attention(q, k, v, impl=impl).weights
    dense = weights.to_dense()
    expected = torch.stack([dense[b][:, chosen[b]].mean(-2) for b in range(2)])
    close(weights.received("mean", chosen), expected)


def test_an_empty_row_with_values_of_no_size():
    q, k, _ = qkv(1, 1, 3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    _, weights = attlas.scaled_dot_product_attention(q, k, k[..., :0], mask)
    assert weights[0, 0, 1].eq(0).all()
    assert weights[0, 0, [0, 2]].sum(-1).allclose(torch.ones(2, dtype=weights.dtype))


@pytest.mark.parametrize("impl", ALL)
def test_a_subclass_of_a_statistic_means_what_it_says(impl):
    class Nothing(statistics.Pool):
        def finalize(self, state):
            return (state[0] * 0,)

    q, k, v = qkv(1, 1, 6, 6)
    weights = attlas.attention(q, k, v, impl=impl).weights
    assert weights.evaluate(Nothing((2, 2), "max")).eq(0).all()


@pytest.mark.parametrize("impl", ALL)
def test_the_transpose_takes_a_wider_operand(impl):
    q, k, v = qkv(1, 2, 4, 5, dtype=torch.float32)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = attlas.attention(q, k, v, impl=impl).weights
    result = weights.T @ x
    assert result.dtype == torch.float64
    (grad,) = torch.autograd.grad(result.sum(), x)
    rows = weights.to_dense().sum((0, 1, 3)).double()[:, None].expand(4, 3)
    close(grad, rows, rtol=1e-6, atol=1e-6)  # x is read in the dtype of the statistics


@pytest.mark.parametrize("impl", ALL)
def test_no_sequences_and_their_lengths(impl):
    x = torch.randn(0, 5, 4)
    lengths = torch.zeros(0, dtype=torch.long)
    output, weights = attlas.attention(x, x, x, masks.padding(lengths), impl=impl)
    assert output.shape == (0, 5, 4)
    assert weights.to_dense().shape == (0, 5, 5)


@pytest.mark.parametrize("impl", ALL)
def test_a_function_may_give_fewer_dimensions(impl):
    q, k, v = qkv(1, 1, 3, 4)
    keys = torch.tensor([True, False, True, True])
    rule = masks.from_function(lambda b, h, i, j: keys[j.flatten()])
    close(
        attlas.attention(q, k, v, rule, impl=impl).output,
        attlas.attention(q, k, v, keys, impl="reference").output,
    )
    everything = masks.from_function(lambda b, h, i, j: torch.tensor(True))
    close(
        attlas.attention(q, k, v, everything, impl=impl).output,
        attlas.attention(q, k, v, impl="reference").output,
    )
    wrong = masks.from_function(lambda b, h, i, j: torch.ones(3, 3, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="the result of from_function must broadcast to"):
        attlas.attention(q, k, v, wrong, impl=impl)


def test_positions_in_a_tuple_and_positions_that_are_none():
    q, k, v = qkv(1, 1, 3, 4)
    weights = attlas.attention(q, k, v).weights
    close(weights.mass((0, 1)), weights.mass([0, 1]))
    with pytest.raises(TypeError, match=r"keys must be a slice, .* got NoneType; write keys="):
        weights.mass(None)


@pytest.mark.parametrize("impl", ALL)
def test_a_default_device_does_not_move_what_lies_elsewhere(impl):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 4).requires_grad_().unbind()
    x, lengths = torch.randn(2, 2, 9, 3), torch.tensor([5, 9])

    def everything() -> list[torch.Tensor]:
        mask = masks.padding(lengths) & masks.sliding_window(3, 1)
        output, w = attlas.attention(q, k, v, mask, is_causal=True, impl=impl)
        loss = w.entropy().sum() + w.received().var() + w.topk(2)[0].sum() + output.sum()
        readouts = [w.max()[0], w.topk(3)[1], w.mass([0, 1]), w.mass(slice(2)), w.pool(4)]
        operator = [w @ x, w.T @ x, w.head_mean().entropy(), w.kl_divergence(w.detach())]
        read = [w[:, :, [1, 2], 3], w[1, -1, 2:5], w.to_dense(), w.quantile(0.9)]
        spectrum = [w.singular_values(2), attlas.rollout([w, w], start=4)]
        return [output, *readouts, *operator, *read, *spectrum, *torch.autograd.grad(loss, (q, k))]

    right = everything()
    with torch.device("meta"):
        found = everything()
    assert all(a.equal(b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1e-60])
def test_a_causal_mask_under_a_scale_that_is_not_positive(impl, scale):
    """`blocked` gave NaN: torch's fused operator scales the -inf of its own causal mask."""
    q, k, v = qkv(dtype=torch.float32, grad=True)
    output, weights = attlas.attention(q, k, v, is_causal=True, scale=scale, impl=impl)
    expected, dense, _ = plain(q, k, v, is_causal=True, scale=scale)
    close(output, expected)
    close(weights.to_dense(), dense)
    for a, b in zip(grads(output.sum(), q, k, v), grads(expected.sum(), q, k, v), strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"bias": torch.zeros(1, 3)}])
def test_one_query_and_an_empty_set_of_queries(impl, options):
    """With L = 1 a block without queries had one: sums were not 0, or shapes did not fit."""
    weights = attlas.attention(*qkv(1, 2, 1, 3), **options, impl=impl).weights
    for readout in (weights, weights.head_mean()):
        for reduce in ("sum", "max"):
            received = readout.received(reduce, queries=slice(1, None))
            assert received.shape[-1] == 3
            assert received.eq(0).all()


@pytest.mark.parametrize("impl", ALL)
def test_no_sequences_with_grouped_heads(impl):
    """An empty last batch raised: 0 elements say nothing about the size that reshape(-1) asks."""
    q, k, v = qkv(0, 4, 3, kv_heads=2, grad=True)
    output, weights = attlas.attention_statistics(q, k, v, enable_gqa=True, impl=impl)
    readouts = [output, weights.entropy(), weights.mean_distance(), weights.to_dense()]
    assert [list(t.shape) for t in readouts] == [[0, 4, 3, 4], [0, 4, 3], [0, 4, 3], [0, 4, 3, 3]]
    assert grads(sum(t.sum() for t in readouts), k)[0].shape == k.shape
