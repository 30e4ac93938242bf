"""Gradients and what must not be read: empty rows, NaN behind masks, gradcheck in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import attlas
from attlas import masks

from .helpers import IMPLS, KERNELS, grads, qkv, statistics_of

pytestmark = pytest.mark.numeric

# Options that leave query 1 of each problem with L = S = 5 without a key.
EMPTY = torch.ones(5, 5, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
EMPTY_ROWS = {
    "mask": {"mask": EMPTY},
    "mask and sinks": {"mask": EMPTY, "sinks": torch.tensor([0.5, -0.5])},
    "bias of -inf": {"bias": torch.zeros(5, 5).masked_fill(~EMPTY, -math.inf)},
    "bias of -inf and sinks": {
        "bias": torch.zeros(5, 5).masked_fill(~EMPTY, -math.inf),
        "sinks": torch.tensor([0.5, -0.5]),
    },
    "mask and softcap": {"mask": EMPTY, "softcap": 2.0},
    "causal mask and left padding": {
        "mask": torch.tensor([0, 0, 1, 1, 1]).view(1, 1, 1, 5),
        "is_causal": True,
    },
    "window beyond the end": {"mask": torch.tensor([1, 0, 0, 1, 1]), "window_size": (0, 1)},
}


# --- rows without a key -----------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", EMPTY_ROWS)
@pytest.mark.parametrize("small", [False, True])
def test_an_empty_row_is_zero_and_has_no_gradient(impl, case, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    options = {
        name: value.double().requires_grad_() if name in ("bias", "sinks") else value
        for name, value in EMPTY_ROWS[case].items()
    }
    leaves = [options[name] for name in ("bias", "sinks") if name in options]
    q, k, v = qkv(grad=True)
    output, weights = attlas.attention(q, k, v, **options, impl=impl)
    assert output[:, :, 1].eq(0).all()
    assert weights.logsumexp[:, :, 1].eq(-math.inf).all()
    assert not weights.logsumexp.isnan().any()
    row = weights.to_dense()[:, :, 1]
    assert row.eq(0).all()

    # Statistics of an empty row, as DESIGN 8 has them.
    assert weights[:, :, 1].eq(0).all()
    assert weights.entropy()[:, :, 1].eq(0).all()
    assert weights.max().values[:, :, 1].eq(0).all()
    assert weights.max().keys[:, :, 1].eq(-1).all()
    assert weights.topk(2).values[:, :, 1].eq(0).all()
    assert weights.topk(2).keys[:, :, 1].eq(-1).all()
    for zero in (weights.mass([0, 1]), weights.sink_mass(), weights.mean_distance()):
        assert zero[:, :, 1].eq(0).all()
    assert weights.received(queries=[1]).eq(0).all()
    assert weights.received("max", queries=[1]).eq(0).all()

    # Gradients: finite everywhere, and nothing of this row reaches anything.
    only = (output[:, :, 1] * torch.randn_like(q[:, :, 1])).sum()
    only = only + weights.entropy()[:, :, 1].sum() + weights.to_dense()[:, :, 1].sum()
    only = only + weights.max().values[:, :, 1].sum() + weights.sink_mass()[:, :, 1].sum()
    for gradient in grads(only, q, k, v, *leaves):
        assert gradient.eq(0).all()
    x = torch.randn(5, 3, dtype=torch.float64)
    everything = sum(s.square().sum() for s in statistics_of(weights, x, x).values())
    found = grads(output.square().sum() + everything, q, k, v, *leaves)
    assert all(gradient.isfinite().all() for gradient in found)
    assert found[0][:, :, 1].eq(0).all()


def test_an_empty_row_of_the_taught_function():
    q, k, v = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(3))
    output, weights = attlas.scaled_dot_product_attention(q, k, v, EMPTY.float())
    assert output[:, 1].eq(0).all()
    assert weights[:, 1].eq(0).all()
    found = grads(output.square().sum() + weights.square().sum(), q, k, v)
    assert all(gradient.isfinite().all() for gradient in found)
    assert found[0][:, 1].eq(0).all()
    assert found[0][:, 0].ne(0).any()


# --- what is masked is never read -------------------------------------------------------

KEYS = [4, 5, 6]  # masked for every query
HIDDEN = {
    "padding": {"mask": masks.padding(torch.tensor([4]))},
    "padding tensor": {"mask": torch.tensor([1, 1, 1, 1, 0, 0, 0]).view(1, 7)},
    "per pair": {
        "mask": torch.ones(7, 7).tril(2).index_fill(1, torch.tensor(KEYS), 0),
    },
    "per head": {
        "mask": (torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(3)) > 0.3)
        & (torch.arange(7) < 4),
    },
    "causal and padding": {"mask": masks.padding(torch.tensor([4])), "is_causal": True},
    "prefix, softcap": {"mask": masks.prefix(4), "softcap": 3.0},
    "padding, sinks": {"mask": masks.padding(torch.tensor([4])), "sinks": torch.ones(2).double()},
    "window": {"mask": masks.padding(torch.tensor([4])), "window_size": (1, 2)},
    "bias of -inf": {"bias": torch.zeros(7).index_fill(0, torch.tensor(KEYS), -math.inf)},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38], ids=str)
@pytest.mark.parametrize("small", [False, True])
def test_what_is_behind_a_mask_reaches_nothing(impl, case, bad, small, request):
    """NaN, inf and numbers whose products overflow, in masked keys and values."""
    if small:
        request.getfixturevalue("small_blocks")
    dtype = torch.float64 if bad != 3e38 else torch.float32  # finite, but not its products
    options = {n: v.to(dtype) if n == "sinks" else v for n, v in HIDDEN[case].items()}
    clean = qkv(queries=7, dtype=dtype, grad=True)
    dirty = [t.detach().clone() for t in clean]
    for tensor in dirty[1:]:
        tensor[:, :, KEYS] = bad
    dirty = [t.requires_grad_() for t in dirty]
    x, y = torch.randn(7, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    upstream = torch.randn_like(clean[0])
    results = []
    for q, k, v in (clean, dirty):
        output, weights = attlas.attention(q, k, v, **options, impl=impl)
        readouts = statistics_of(weights, x, y)
        loss = (output * upstream).sum() + sum(r.square().mean() for r in readouts.values())
        found = zip(("dq", "dk", "dv"), grads(loss, q, k, v), strict=True)
        lse = {"output": output, "lse": weights.logsumexp}
        results.append({**lse, **readouts, **dict(found)})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("dk", "dv"):
        assert results[1][name][:, :, KEYS].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_reaches_those_who_read_it_and_nobody_else(impl, softcap):
    """Causal: a NaN in the last key and value, and one in the last query, stay in the last row."""
    clean = qkv(queries=6, grad=True)
    dirty = [t.detach().clone() for t in clean]
    for tensor in dirty:
        tensor[:, :, -1] = math.nan
        tensor.requires_grad_()
    results = []
    for tensors in (clean, dirty):
        output, weights = attlas.attention(*tensors, is_causal=True, softcap=softcap, impl=impl)
        entropy = weights.entropy()
        gradient = grads(output[:, :, :-1].sum() + entropy[:, :, :-1].sum(), tensors[0])[0]
        results.append((output, entropy, weights.to_dense(), gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[:, :, :-1], b[:, :, :-1])
    assert output[:, :, -1].isnan().all(), "what is read is not hidden"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keys", [3, 700])
@pytest.mark.parametrize("where", ["query", "keys", "bias"])
def test_nan_is_not_hidden_where_nothing_is_masked(impl, where, keys):
    """`blocked` made output 0 of a row of NaN: the fused operator takes it for one without keys."""
    q, k, v = qkv(queries=40, keys=keys, dtype=torch.float32)
    bias = torch.zeros(40, 1)
    rows = {"query": q[:, :, 3], "keys": k, "bias": bias[3]}
    rows[where].fill_(math.nan)
    options = {"bias": bias} if where == "bias" else {}
    output, weights = attlas.attention(q, k, v, **options, impl=impl)
    assert output[:, :, 3].isnan().all()
    assert weights.logsumexp[:, :, 3].isnan().all()
    assert output[:, :, 4].isnan().all() == (where == "keys")


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_value_that_is_read_is_inf(impl):
    q, k, v = (t.detach() for t in qkv(queries=3))
    v[:, :, 1, 0], v[:, :, 2, 1], v[:, :, 0, 2] = math.inf, -math.inf, math.nan
    output = attlas.attention(q, k, v, is_causal=True, impl=impl).output
    assert output[0, 0, :, 0].isinf().tolist() == [False, True, True]
    assert output[0, 0, :, 1].tolist()[2] == -math.inf
    assert output[0, 0, :, 2].isnan().all()
    assert output[..., 3].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38], ids=str)
def test_the_taught_function_reads_nothing_behind_its_mask(bad):
    clean = [torch.randn(2, 5, 4) for _ in range(3)]
    dirty = [t.clone() for t in clean]
    for tensor in dirty[1:]:
        tensor[:, 3:] = bad
    mask = torch.tensor([1, 1, 1, 0, 0]).view(1, 1, 5)
    results = []
    for tensors in (clean, dirty):
        leaves = [t.requires_grad_() for t in tensors]
        output, weights = attlas.scaled_dot_product_attention(*leaves, mask)
        loss = output.square().sum() + weights.square().sum()
        results.append((output, weights, *grads(loss, *leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a)


# --- derivatives ------------------------------------------------------------------------

DERIVED = {
    "nothing": {},
    "mask": {"mask": torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])},
    "padding": {"mask": masks.padding(torch.tensor([2]))},
    "causal": {"is_causal": True},
    "lower right window": {"window_size": (1, 0), "causal_alignment": "lower_right"},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.7},
    "gqa": {"enable_gqa": True},
    "softcap, causal, gqa": {"softcap": 1.5, "is_causal": True, "enable_gqa": True},
}


def function(names, options, impl, *tensors):
    """(output, finite lse) as a function of every tensor, for gradcheck."""
    given = dict(zip(names, tensors, strict=True))
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    output, weights = attlas.attention(q, k, v, **given, **options, impl=impl)
    return output, weights.logsumexp.masked_fill(weights.logsumexp == -math.inf, 0.0)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("extra", ["none", "row bias", "bias and sinks"])
@pytest.mark.parametrize("case", DERIVED)
def test_gradcheck_and_gradgradcheck(impl, extra, case, small_blocks):
    options = DERIVED[case]
    kv_heads = 1 if "enable_gqa" in options else 2
    q, k, v = qkv(1, 2, 4, 3, size=2, value_size=3, kv_heads=kv_heads, grad=True)
    inputs = {"q": q, "k": k, "v": v}
    if "bias" in extra:
        shape = (1, 2, 1, 3) if "row" in extra else (1, 1, 4, 3)
        inputs["bias"] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if "sinks" in extra:
        inputs["sinks"] = torch.randn(2, dtype=torch.float64, requires_grad=True)
    run = partial(function, tuple(inputs), options, impl)
    assert torch.autograd.gradcheck(run, tuple(inputs.values()))
    if impl == "blocked":  # the double backward differentiates the reference, whatever impl is
        assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])])
def test_gradcheck_of_the_taught_function(mask):
    q, k, v = (torch.randn(2, n, 2, dtype=torch.float64, requires_grad=True) for n in (4, 3, 3))
    run = partial(attlas.scaled_dot_product_attention, mask=mask)
    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("only", range(3))
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"is_causal": True}], ids=str)
def test_gradients_of_one_input_alone(impl, only, options):
    tensors = [t.detach() for t in qkv()]
    tensors[only].requires_grad_()
    expected = [t.detach().requires_grad_() for t in tensors]
    upstream = torch.randn_like(tensors[0])
    output = attlas.attention(*tensors, **options, impl=impl).output
    gradient = torch.autograd.grad(output, tensors[only], upstream)[0]
    dense = attlas.attention(*expected, **options, impl="reference").output
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, expected, upstream)[only])


@pytest.mark.parametrize("impl", KERNELS)
def test_the_second_derivative_where_query_is_key_is_value(impl):
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        output, weights = attlas.attention(x, x, x, is_causal=True, impl=impl)
        return output, weights.entropy()

    assert torch.autograd.gradgradcheck(run, (x,))
    # gradgradcheck would take three times the gradient for a gradient: its derivative agrees.
    plain, kept = (
        torch.autograd.grad(sum(t.sin().sum() for t in run(x)), x, create_graph=create)[0]
        for create in (False, True)
    )
    torch.testing.assert_close(plain, kept)
