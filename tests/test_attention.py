"""`scaled_dot_product_attention` and `attention`: values by hand, masks, shapes, emptiness."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas import masks, ops

from .helpers import (
    IMPLS,
    KERNELS,
    Watch,
    allowed_pairs,
    gap,
    grads,
    plain,
    qkv,
    same,
    statistics_of,
)

pytestmark = pytest.mark.numeric

LOG3 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log()


def tiny(*logits: float, value: list[list[float]] | None = None) -> tuple[torch.Tensor, ...]:
    """One query whose scores are `logits` (scale 1), 4-D: q = [1], k_j = [logit_j]."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor(logits, dtype=torch.float64).view(1, 1, -1, 1)
    value = torch.eye(len(logits)).tolist() if value is None else value
    return query, key, torch.tensor(value, dtype=torch.float64)[None, None]


# --- the exercises ----------------------------------------------------------------------


@pytest.fixture
def exercise() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, 4) for _ in range(3))


def rounded(tensor: torch.Tensor) -> list:
    return [[round(x, 4) for x in row] for row in tensor.tolist()]


def test_exercise_without_mask(exercise):
    output, weights = attlas.scaled_dot_product_attention(*exercise)
    assert rounded(output[0, :1]) == [[0.2957, 0.3332, 0.0674, 0.2081]]
    assert rounded(output[1, 2:]) == [[0.1222, -0.4625, -0.4709, -0.1724]]
    assert rounded(weights[0, :1]) == [[0.4537, 0.3877, 0.1586]]
    assert rounded(weights[1, 2:]) == [[0.1524, 0.7299, 0.1178]]
    assert weights.sum(-1).allclose(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_exercise_with_a_padding_mask(exercise, dtype):
    Q, K, V = exercise
    mask = torch.ones_like(Q[:, :, 0]).unsqueeze(1)
    mask[1, 0, 2:] = 0
    output, weights = attlas.scaled_dot_product_attention(Q, K, V, mask.to(dtype))
    unmasked = attlas.scaled_dot_product_attention(Q, K, V)
    assert output[0].allclose(unmasked[0][0])
    assert weights[0].allclose(unmasked[1][0])
    assert rounded(output[1]) == [
        [-0.5912, -1.0937, -0.6829, -0.9884],
        [-0.6886, -1.1866, -0.7139, -1.1376],
        [0.0322, -0.4995, -0.4843, -0.0339],
    ]
    assert rounded(weights[1]) == [[0.7905, 0.2095, 0], [0.8871, 0.1129, 0], [0.1727, 0.8273, 0]]
    assert weights[1, :, 2].eq(0).all(), "a masked weight is 0 exactly"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_exercise_with_a_causal_mask(exercise, dtype):
    mask = torch.ones(2, 3, 3).tril().to(dtype)
    output, weights = attlas.scaled_dot_product_attention(*exercise, mask)
    assert weights[0, 0].tolist() == [1, 0, 0]
    assert output[:, 0].equal(exercise[2][:, 0]), "the first query reads the first value only"
    assert weights.triu(1).eq(0).all()
    lazy = attlas.attention(*exercise, is_causal=True)
    torch.testing.assert_close(lazy.output, output)
    torch.testing.assert_close(lazy.weights.to_dense(), weights)
    rule = attlas.scaled_dot_product_attention(*exercise, masks.causal())
    assert same(rule[0], output)


# --- values by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
class TestByHand:
    def test_weights_are_in_proportion_to_exp_of_the_scores(self, impl):
        output, weights = attlas.attention(*tiny(*LOG3), impl=impl)
        expected = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
        torch.testing.assert_close(weights[0, 0, 0], expected)
        torch.testing.assert_close(output[0, 0, 0], expected)
        # The natural log of 1 + 2 + 3, neither log2 nor the largest score.
        assert weights.logsumexp.item() == pytest.approx(math.log(6))

    def test_the_default_scale_is_one_over_the_root_of_the_head_size(self, impl):
        query = torch.tensor([1.0, 0, 0, 0]).double().view(1, 1, 1, 4)
        key = (2 * LOG3)[:, None] * query
        weights = attlas.attention(query, key, key, impl=impl).weights
        torch.testing.assert_close(weights[0, 0, 0], torch.tensor([1, 2, 3]).double() / 6)

    def test_scale_multiplies(self, impl):
        weights = attlas.attention(*tiny(*LOG3), scale=2.0, impl=impl).weights
        torch.testing.assert_close(weights[0, 0, 0], torch.tensor([1, 4, 9]).double() / 14)
        weights = attlas.attention(*tiny(*LOG3), scale=0, impl=impl).weights
        torch.testing.assert_close(weights[0, 0, 0], torch.ones(3).double() / 3)

    def test_bias_is_added_to_the_scaled_score(self, impl):
        bias = torch.tensor([math.log(6), 0.0, -math.inf]).double().view(1, 3)
        weights = attlas.attention(*tiny(*LOG3), bias=bias, impl=impl).weights
        torch.testing.assert_close(weights[0, 0, 0], torch.tensor([6, 2, 0]).double() / 8)

    def test_softcap_comes_before_bias(self, impl):
        cap, bias = 2.0, torch.tensor([5.0, 0.0, 0.0]).double().view(1, 3)
        weights = attlas.attention(*tiny(0, 1, 9), softcap=cap, bias=bias, impl=impl).weights
        logits = [5.0, 2 * math.tanh(1 / 2), 2 * math.tanh(9 / 2)]
        expected = torch.tensor(logits).double().softmax(-1)
        torch.testing.assert_close(weights[0, 0, 0], expected, rtol=1e-6, atol=0)

    def test_sinks_take_their_share_and_give_nothing(self, impl):
        sinks = torch.tensor([4.0]).double().log()
        output, weights = attlas.attention(*tiny(*LOG3), sinks=sinks, impl=impl)
        torch.testing.assert_close(weights[0, 0, 0], torch.tensor([1, 2, 3]).double() / 10)
        torch.testing.assert_close(output[0, 0, 0], torch.tensor([1, 2, 3]).double() / 10)
        assert weights.sink_mass().item() == pytest.approx(4 / 10)
        assert weights.logsumexp.item() == pytest.approx(math.log(10))

    def test_consecutive_query_heads_share_a_key_head(self, impl):
        query = torch.ones(1, 4, 1, 1).double()
        key = torch.zeros(1, 2, 1, 1).double()
        value = torch.tensor([10.0, 20.0]).double().view(1, 2, 1, 1)
        output = attlas.attention(query, key, value, enable_gqa=True, impl=impl).output
        assert output.flatten().tolist() == [10, 10, 20, 20]

    @pytest.mark.parametrize(("alignment", "first"), [("upper_left", 0), ("lower_right", 2)])
    def test_causal_alignment_with_more_keys(self, impl, alignment, first):
        q, k, v = qkv(queries=3, keys=5)
        options = {"is_causal": True, "causal_alignment": alignment, "impl": impl}
        dense = attlas.attention(q, k, v, **options).weights.to_dense()
        for i in range(3):
            assert dense[..., i, : first + i + 1].gt(0).all()
            assert dense[..., i, first + i + 1 :].eq(0).all()

    def test_causal_lower_right_with_more_queries_leaves_the_first_empty(self, impl):
        q, k, v = qkv(queries=5, keys=3)
        options = {"is_causal": True, "causal_alignment": "lower_right", "impl": impl}
        output, weights = attlas.attention(q, k, v, **options)
        assert output[:, :, :2].eq(0).all()
        assert weights.logsumexp[:, :, :2].eq(-math.inf).all()
        assert (weights.to_dense() > 0).int()[0, 0].tolist() == [
            [0, 0, 0],
            [0, 0, 0],
            [1, 0, 0],
            [1, 1, 0],
            [1, 1, 1],
        ]

    @pytest.mark.parametrize(
        ("window", "rows"),
        [
            ((1, 0), ["1000", "1100", "0110", "0011"]),
            ((0, 2), ["1110", "0111", "0011", "0001"]),
            ((None, 1), ["1100", "1110", "1111", "1111"]),
            ((1, None), ["1111", "1111", "0111", "0011"]),
            ((None, None), ["1111"] * 4),
            ((0, 0), ["1000", "0100", "0010", "0001"]),
        ],
    )
    def test_window_counts_keys_beyond_the_own_position(self, impl, window, rows):
        weights = attlas.attention(*qkv(queries=4), window_size=window, impl=impl).weights
        seen = (weights.to_dense()[0, 0] > 0).int().tolist()
        assert ["".join(map(str, row)) for row in seen] == rows


# --- masks and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 7), (5, 1), (1, 7), (2, 1, 1, 7), (2, 1, 5, 7), (1, 2, 5, 7)], ids=str
)
def test_a_mask_broadcasts_and_its_dtype_does_not_matter(impl, dtype, shape):
    q, k, v = qkv(queries=5, keys=7)
    mask = (torch.rand(shape) > 0.3).to(dtype)
    output, weights = attlas.attention(q, k, v, mask, impl=impl)
    expected, dense, lse = plain(q, k, v, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.to_dense(), dense)
    torch.testing.assert_close(weights.logsumexp, lse)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_taught_function_takes_any_leading_dimensions(lead, masked):
    q, k, v = torch.randn(*lead, 4, 6), torch.randn(*lead, 5, 6), torch.randn(*lead, 5, 3)
    mask = torch.rand(*lead, 4, 5) > 0.5 if masked else torch.ones(4, 5)
    output, weights = attlas.scaled_dot_product_attention(q, k, v, mask if masked else None)
    expected, dense, _ = plain(q, k, v, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, dense)
    assert output.shape == (*lead, 4, 3)
    torch.testing.assert_close(weights @ v, output)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_attention_takes_two_three_and_four_dimensions(impl, ndim):
    q, k, v = (t[(0,) * (4 - ndim)] for t in qkv(queries=5, keys=7, size=4, value_size=3))
    mask = torch.rand(*q.shape[:-2], 5, 7) > 0.4
    output, weights = attlas.attention(q, k, v, mask, is_causal=True, impl=impl)
    expected, dense, lse = plain(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.logsumexp, lse)
    torch.testing.assert_close(weights.to_dense(), dense)
    assert weights.shape == dense.shape
    assert weights.entropy().shape == dense.shape[:-1]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"mask": True}, {"window_size": (1, 1)}]
)
def test_empty_tensors_give_empty_or_zero_results(impl, sizes, options):
    batch, heads, queries, keys = sizes
    q, k, v = qkv(batch, heads, queries, keys, grad=True)
    if "mask" in options:
        options = {"mask": torch.ones(queries, keys)}
    output, weights = attlas.attention(q, k, v, **options, sinks=torch.zeros(heads), impl=impl)
    assert output.shape == q.shape
    assert output.eq(0).all()
    assert weights.to_dense().shape == sizes
    assert weights.entropy().shape == sizes[:3]
    assert weights.received().shape == (batch, heads, keys)
    assert weights.logsumexp.eq(-math.inf).all()
    total = output.sum() + weights.entropy().sum() + weights.received().sum()
    assert all(g.eq(0).all() for g in grads(total, q, k, v))


@pytest.mark.parametrize("lead", [(), (2,), (0,), (2, 2), (2, 0)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0), (3, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_tensors_in_the_taught_function(lead, queries, keys, masked):
    q = torch.randn(*lead, queries, 4, requires_grad=True)
    k, v = (torch.randn(*lead, keys, 4, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, keys) if masked else None
    output, weights = attlas.scaled_dot_product_attention(q, k, v, mask)
    assert output.shape == (*lead, queries, 4)
    assert weights.shape == (*lead, queries, keys)
    if keys == 0:
        assert output.eq(0).all()
    assert all(g.isfinite().all() for g in grads(output.sum() + weights.sum(), q, k, v))


# --- laws -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_asking_for_weights_never_changes_the_output(impl):
    for options in ({}, {"is_causal": True}, {"softcap": 5.0}, {"window_size": (2, 2)}):
        q, k, v = qkv(queries=33, dtype=torch.float32)
        output, weights = attlas.attention(q, k, v, **options, impl=impl)
        before = output.clone()
        weights.to_dense(), weights.entropy(), weights.received(), weights[0], weights @ v
        assert same(output, before)
        assert same(attlas.attention(q, k, v, **options, impl=impl).output, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_a_batch_item_does_not_depend_on_the_others(impl, options):
    q, k, v = qkv(batch=5, queries=9, keys=9)
    mask = masks.padding(torch.tensor([9, 4, 0, 1, 7]))
    together = attlas.attention(q, k, v, mask, **options, impl=impl)
    for b, length in enumerate([9, 4, 0, 1, 7]):
        one = slice(b, b + 1)
        alone = masks.padding(torch.tensor([length]))
        result = attlas.attention(q[one], k[one], v[one], alone, **options, impl=impl)
        torch.testing.assert_close(together.output[one], result.output)
        torch.testing.assert_close(together.weights.logsumexp[one], result.weights.logsumexp)
        torch.testing.assert_close(together.weights.entropy()[one], result.weights.entropy())


def everything(inputs, lengths, impl):
    """The output, every readout, and the gradients of both, each of one item in its own place."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    mask, x = (
        masks.padding(torch.tensor(lengths)),
        torch.linspace(-1, 1, 2 * inputs[0].shape[2]).double().view(-1, 2),
    )
    output, weights = attlas.attention_statistics(*inputs, mask, is_causal=True, impl=impl)
    again = attlas.attention(*inputs, mask, is_causal=True, impl=impl).weights
    found = {"output": output, "lse": weights.logsumexp, "found entropy": weights.entropy()}
    found |= statistics_of(again, x, x) | {"quantile": again.quantile(0.8)}
    del found["guided"]  # by a penalty that differs between batch items
    found |= {"kl": again.kl_divergence(weights.detach()), "mean": again.head_mean().entropy()}
    loss = sum(t.square().sum() for t in found.values() if t.is_floating_point())
    names = ("dq", "dk", "dv")
    return found | dict(zip(names, torch.autograd.grad(loss, inputs), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_run_has_the_same_bits(impl, threads):
    inputs = qkv(queries=40)
    torch.set_num_threads(threads)
    try:
        one, two = (everything(inputs, [40, 23], impl) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert [name for name in one if not same(one[name], two[name])] == []


# What C++ computes has the same bits in any batch. PyTorch's products of matrices do not, nor do
# blocks that hold several batch items: what is streamed agrees to a rounding.
IN_CPP = (
    "output",
    "lse",
    "found entropy",
    "entropy",
    "max",
    "topk",
    "received sum",
    "received max",
)
IN_CPP += ("pool max", "pool mass", "mass", "weights @ x", "weights.T @ y", "to_dense")


@pytest.mark.parametrize("impl", IMPLS)
def test_every_result_of_a_batch_item_is_that_of_the_item_alone(impl, small_blocks):
    inputs, lengths = qkv(queries=24), [24, 13]
    together = everything(inputs, lengths, impl)
    for item in range(2):
        one = slice(item, item + 1)
        alone = everything([t[one] for t in inputs], lengths[one], impl)
        for name, result in alone.items():
            result = result.detach()
            bits = impl == "native" and name in IN_CPP
            close = gap(together[name][one], result) <= 1e-12 * max(1.0, float(result.abs().max()))
            assert same(together[name][one], result) if bits else close, name


LAYOUTS = {
    "heads after queries": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "no stride of 1": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "batch expanded": lambda t: t[:1].expand(t.shape),
    "rows expanded": lambda t: t[:, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_inputs_in_memory_does_not_matter(impl, options, layout):
    mask = torch.rand(9, 9) > 0.3
    for place in range(4):  # query, key, value, then the gradient that comes from above
        tensors = [torch.randn(2, 3, 9, 5, dtype=torch.float64) for _ in range(4)]
        tensors[place] = LAYOUTS[layout](tensors[place])
        results = []
        for q, k, v, upstream in (tensors, [t.contiguous() for t in tensors]):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            plain_mask = mask if "is_causal" not in options else None
            output, weights = attlas.attention(*leaves, plain_mask, **options, impl=impl)
            found = torch.autograd.grad(output, leaves, upstream)
            results.append((output, weights.to_dense(), weights.received(), *found))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, place=place: f"tensor {place}: {m}")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_one_tensor_may_be_query_key_and_value(impl, options):
    x = torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    output, weights = attlas.attention(x, x, x, **options, impl=impl)
    found = grads(output.square().sum() + weights.entropy().sum(), x)[0]
    expected, dense, _ = plain(
        x, x, x, is_causal="is_causal" in options, softcap=options.get("softcap")
    )
    entropy = -(dense * dense.masked_fill(dense == 0, 1.0).log()).sum()
    wanted = grads(expected.square().sum() + entropy, x)[0]
    torch.testing.assert_close(found, wanted)


def test_the_band_of_the_helpers_is_the_definition():
    """The helper that other tests trust, against a picture."""
    band = allowed_pairs(3, 5, True, "lower_right", (1, None))
    assert band.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_lazy_weights_compute_nothing_until_asked():
    q, k, v = qkv(queries=40)
    weights = attlas.attention(q, k, v, is_causal=True).weights
    with Watch() as watch:
        assert weights.shape == (2, 2, 40, 40)
        assert len(weights) == 2
        repr(weights), weights.ndim, weights.dtype, weights.requires_grad
    assert watch.names == []


# --- statistics of the same pass ------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"mask": attlas.masks.from_function(lambda b, h, q, k: q != k)}],
)
def test_statistics_of_the_same_pass_are_those_of_the_weights(impl, options):
    inputs = qkv(queries=6, keys=7, grad=True)
    output, weights = attlas.attention_statistics(*inputs, impl=impl, **options)
    want = attlas.attention(*inputs, impl=impl, **options)
    assert same(output, want.output)

    def loss(weights):
        found = (
            weights.entropy(),
            weights.received(),
            weights.received("mean"),
            weights.max().values,
        )
        return torch.stack([part.square().sum() for part in found]).sum()

    assert torch.equal(weights.max().keys, want.weights.max().keys)
    for a, b in zip(grads(loss(weights), *inputs), grads(loss(want.weights), *inputs), strict=True):
        assert gap(a, b) < 1e-12
    assert gap(loss(weights), loss(want.weights)) < 1e-12


def test_known_statistics_need_no_second_pass(monkeypatch):
    weights = attlas.attention_statistics(*qkv()).weights
    monkeypatch.setattr(ops, "read", None)
    assert weights.entropy().shape == weights.max().values.shape == (2, 2, 5)
    assert weights.received("mean").shape == (2, 2, 5)
    with pytest.raises(TypeError):
        weights.received(queries=[1])


def test_statistics_are_chosen_by_name():
    found = attlas.attention_statistics(*qkv(), statistics="entropy", is_causal=True).weights.found
    assert list(found) == ["entropy"]
    with pytest.raises(ValueError, match="statistics must be 'entropy', 'received' or 'max'"):
        attlas.attention_statistics(*qkv(), statistics=["topk"])
