"""`AttentionWeights`: the indexing law, every readout, the operator, and their gradients."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attlas
from attlas import masks

from .helpers import KERNELS, dense_statistics, grads, penalty, qkv, same, statistics_of

pytestmark = pytest.mark.numeric


def make(kind: str = "4-D", dtype: torch.dtype = torch.float64) -> attlas.AttentionWeights:
    """Lazy weights of each kind that is indexed differently."""
    torch.manual_seed(1)
    q, k, v = qkv(2, 4, 5, 6, kv_heads=2 if kind == "grouped" else 4, dtype=dtype)
    mask = torch.rand(2, 1, 5, 6) > 0.3
    match kind:
        case "2-D":
            return attlas.attention(q[0, 0], k[0, 0], v[0, 0]).weights
        case "3-D":
            return attlas.attention(q[:, 0], k[:, 0], v[:, 0], mask[:, 0]).weights
        case "grouped":
            return attlas.attention(q, k, v, mask, enable_gqa=True).weights
        case "bias and sinks":
            options = {"bias": torch.randn(4, 1, 6, dtype=dtype)[None], "softcap": 2.0}
            return attlas.attention(q, k, v, sinks=torch.ones(4, dtype=dtype), **options).weights
        case "rules":
            rule = masks.padding(torch.tensor([6, 2])) & masks.from_function(
                lambda b, h, i, j: (i + j + h) % 3 != b
            )
            return attlas.attention(q, k, v, rule, window_size=(2, 3)).weights
        case "one query":
            return attlas.attention(q[:, :, :1], k, v, mask[:, :, :1]).weights
        case "one key":
            return attlas.attention(q, k[:, :, :1], v[:, :, :1]).weights
    return attlas.attention(q, k, v).weights


KINDS = ["4-D", "3-D", "2-D", "grouped", "bias and sinks", "rules", "one query", "one key"]


# --- indexing ---------------------------------------------------------------------------


@st.composite
def indices(draw, shape: tuple[int, ...]):
    """A random index expression: what NumPy and PyTorch take."""
    together = draw(st.sampled_from([(), (3,), (2, 3), (1,), (0,)]))
    entries, left = [], list(shape)
    while left and draw(st.integers(0, 9)) > 0:
        size = left.pop(0)
        position = st.integers(-size, size - 1)
        kind = draw(st.sampled_from(["int", "slice", "slice", "tensor", "tensor", "list", "bool"]))
        if kind == "int":
            entries.append(draw(position))
        elif kind == "slice":
            edge = st.none() | st.integers(-size - 2, size + 2)
            entries.append(slice(draw(edge), draw(edge), draw(st.none() | st.integers(1, 3))))
        elif kind == "bool":
            entries.append(
                torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
            )
            together = (int(entries[-1].sum()),)
        else:
            # Shapes that broadcast with each other: any suffix, any dimension replaced by 1.
            ndim = draw(st.integers(0, len(together))) if kind == "tensor" else 1
            own = [draw(st.sampled_from([1, n])) for n in together[len(together) - ndim :]]
            own = own if kind == "tensor" else [1]
            count = math.prod(own)
            values = draw(st.lists(position, min_size=count, max_size=count))
            tensor = torch.tensor(values, dtype=torch.long).view(own)
            entries.append(values if kind == "list" else tensor)
    if draw(st.booleans()):
        entries.insert(draw(st.integers(0, len(entries))), Ellipsis)
    for _ in range(draw(st.integers(0, 2))):
        entries.insert(draw(st.integers(0, len(entries))), None)
    return tuple(entries)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_reads_what_the_dense_weights_hold(kind):
    weights = make(kind)
    dense = weights.to_dense()

    @given(indices(tuple(dense.shape)))
    @settings(max_examples=100)
    def law(index):
        try:
            expected = dense[index]
        except IndexError:  # tensors that do not broadcast: bool tensors of different counts
            with pytest.raises((IndexError, RuntimeError)):
                weights[index]
            return
        found = weights[index]
        assert found.shape == expected.shape, index
        torch.testing.assert_close(found, expected)

    law()


ROWS, COLUMNS = torch.tensor([0, 2, -1]), torch.tensor([[1], [3]])


@pytest.mark.parametrize("kind", ["4-D", "grouped", "rules"])
@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (..., -1),
        (0, 3, slice(1, 4)),
        (slice(None), 1, ..., slice(None, None, 2)),
        (None, 0, ..., None),
        (..., ROWS, ROWS),
        (..., ROWS, COLUMNS),
        (0, ROWS, slice(None), COLUMNS),
        (slice(None), ROWS, 0, COLUMNS),
        (ROWS % 2, ..., ROWS),
        (slice(1, 1), ..., ROWS),
        (slice(None), [0, 2], slice(None), [1, 5]),
        (ROWS[:0], ROWS[:0]),
        torch.tensor([True, False]),
        (..., torch.ones(5, 6, dtype=torch.bool).tril()),
        (0, range(3)),
        (np.int64(1), np.array([0, 2])),
        (),
        ...,
    ],
    ids=str,
)
@pytest.mark.parametrize("small", [False, True])
def test_index_expressions_one_by_one(kind, index, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    weights = make(kind)
    expected = weights.to_dense()[index]
    assert weights[index].shape == expected.shape
    torch.testing.assert_close(weights[index], expected)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ((0, 0, 0, 0, 0), IndexError, "at most 4 entries, got 5; weights have the dimensions"),
        (2, IndexError, "from -2 to 1 in dimension 0, got 2; check it"),
        ((0, -5), IndexError, "from -4 to 3 in dimension 1, got -5"),
        ((..., torch.tensor([0, 6])), IndexError, "from -6 to 5 in dimension 3, got 6"),
        ((..., 0, ...), IndexError, "at most one ..., got more; write slices"),
        (torch.ones(3, dtype=torch.bool), IndexError, r"shape \[2\] where it is bool, got \[3\]"),
        (torch.zeros(2), TypeError, "integer or bool, got torch.float32; convert it with"),
        ("a", TypeError, "be a valid index, got str; use ints"),
        (1.5, TypeError, "be a valid index, got float"),
        (slice(None, None, -1), ValueError, "positive step, got -1; flip the result"),
    ],
)
def test_index_errors(index, kind, message):
    with pytest.raises(kind, match=message):
        make()[index]


def test_pairs_read_one_weight_each(small_blocks):
    """300 pairs out of a large matrix: as many scores as pairs, not the rows or the tile."""
    q = torch.randn(1, 1, 3000, 2, dtype=torch.float64)
    weights = attlas.attention(q, q, q).weights
    i, j = torch.randint(3000, (2, 300))
    found = weights[0, 0, i, j]
    rows = torch.cat([(weights.query[0, 0, i] * weights.key[0, 0, j]).sum(-1)])
    expected = (rows * 2**-0.5 - weights.logsumexp[0, 0, i]).exp()
    torch.testing.assert_close(found, expected)


# --- being a tensor-like ----------------------------------------------------------------


def test_shape_repr_len_and_iteration():
    weights = make("3-D", torch.float32)
    assert repr(weights) == (
        "AttentionWeights(shape=[2, 5, 6], dtype=torch.float32, lazy, 240 B if dense)"
    )
    assert repr(weights.T) == f"{weights!r}.T"
    assert (len(weights), weights.ndim, weights.dim()) == (2, 3, 3)
    assert weights.shape == weights.size() == (2, 5, 6)
    assert (weights.size(1), weights.T.shape) == (5, (2, 6, 5))
    assert weights.T.T is weights
    rows = list(weights)
    assert len(rows) == 2
    torch.testing.assert_close(torch.stack(rows), weights.to_dense())


def test_numpy_and_torch_functions_see_the_dense_weights():
    weights = make("grouped")
    dense = weights.to_dense()
    assert np.array_equal(np.asarray(weights), dense.numpy())
    assert np.asarray(weights, dtype=np.float32).dtype == np.float32
    assert np.asarray(make(dtype=torch.bfloat16)).dtype == np.float32
    for function in (torch.mean, torch.sum, torch.log1p, partial(torch.amax, dim=-1)):
        torch.testing.assert_close(function(weights), function(dense))
    for function in (torch.stack, torch.cat):
        torch.testing.assert_close(function([weights, weights]), function([dense, dense]))
    torch.testing.assert_close(weights.T.to_dense(), dense.mT)


def test_detach_leaves_the_graph():
    q, k, v = qkv(grad=True)
    weights = attlas.attention(q, k, v, sinks=torch.zeros(2, requires_grad=True)).weights
    assert weights.requires_grad
    assert weights.entropy().requires_grad
    assert not weights.detach().requires_grad
    assert not weights.detach().sink_mass().requires_grad
    assert same(weights.detach().entropy(), weights.entropy().detach())


# --- statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("kind", ["4-D", "grouped", "bias and sinks", "rules", "one key"])
def test_a_readout_is_that_of_the_dense_weights(kind, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    weights = make(kind)
    dense = weights.to_dense()
    x = torch.randn(weights.shape[-1], 3, dtype=torch.float64)
    y = torch.randn(weights.shape[-2], 3, dtype=torch.float64)
    found = statistics_of(weights, x, y)
    expected = dense_statistics(dense, weights.logsumexp, weights.sinks, x, y, 0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(weights.max().keys, dense.argmax(-1).masked_fill(empty(dense), -1))
    values, keys = weights.topk(dense.shape[-1])
    taken = dense.gather(-1, keys.clamp(min=0)).masked_fill(keys == -1, 0.0)
    torch.testing.assert_close(values, taken)
    torch.testing.assert_close(values, dense.sort(descending=True).values)
    assert (keys == -1).eq(values == 0).all()
    own = torch.arange(dense.shape[-2])
    shifted = attlas.attention(
        weights.query, weights.key, weights.key, causal_alignment="lower_right", enable_gqa=True
    ).weights
    offset = dense.shape[-1] - dense.shape[-2]
    distance = (torch.arange(dense.shape[-1]) - own[:, None] - offset).abs()
    torch.testing.assert_close(
        shifted.mean_distance(), (shifted.to_dense() * distance).sum(-1), msg="lower right"
    )


def empty(dense: torch.Tensor) -> torch.Tensor:
    return dense.eq(0).all(-1)


QUERIES = [
    (None, [0, 1, 2, 3, 4]),
    (slice(1, 3), [1, 2]),
    (slice(None, None, 2), [0, 2, 4]),
    (slice(-2, None), [3, 4]),
    (slice(3, 1), []),
    (range(1, 4), [1, 2, 3]),
    (range(4, 0, -2), [4, 2]),
    ([0, 0, -1], [0, 4]),
    (torch.tensor([1, 3]), [1, 3]),
    (torch.tensor([True, False, True, False, False]), [0, 2]),
    ([], []),
]


@pytest.mark.parametrize(("queries", "rows"), QUERIES, ids=str)
@pytest.mark.parametrize("kind", ["4-D", "rules"])
def test_received_sums_columns_over_the_queries_named(kind, queries, rows, small_blocks):
    weights = make(kind)
    part = weights.to_dense()[:, :, rows]
    torch.testing.assert_close(weights.received(queries=queries), part.sum(-2))
    mean = part.sum(-2) / max(len(rows), 1)
    torch.testing.assert_close(weights.received("mean", queries=queries), mean)
    largest = part.amax(-2) if rows else torch.zeros_like(mean)
    torch.testing.assert_close(weights.received("max", queries=queries), largest)


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        (slice(2, 4), [2, 3]),
        (range(5, 0, -2), [5, 3, 1]),
        ([0, -1, 0], [0, 5]),
        (torch.tensor([3]), [3]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        ([], []),
    ],
    ids=str,
)
def test_mass_counts_each_key_once(keys, columns):
    weights = make("rules")
    torch.testing.assert_close(weights.mass(keys), weights.to_dense()[..., columns].sum(-1))


def test_bool_sets_may_differ_between_batch_items():
    weights, dense = make("rules"), make("rules").to_dense()
    keys, queries = torch.rand(2, 6) > 0.5, torch.rand(2, 5) > 0.5
    expected = (dense * keys[:, None, None]).sum(-1)
    torch.testing.assert_close(weights.mass(keys), expected)
    expected = (dense * queries[:, None, :, None]).sum(-2)
    torch.testing.assert_close(weights.received(queries=queries), expected)


def test_fewer_keys_than_k_leave_zeros_and_minus_one():
    weights = attlas.attention(*qkv(queries=4), is_causal=True).weights
    values, keys = weights.topk(3)
    assert keys[0, 0, 0].tolist() == [0, -1, -1]
    assert values[0, 0, 0].tolist() == [1, 0, 0]
    assert sorted(keys[0, 0, 1].tolist()) == [-1, 0, 1]
    assert keys[0, 0, 3].ge(0).all()
    assert values.diff(dim=-1).le(0).all(), "in falling order"


def test_weights_that_underflow_keep_their_order():
    q = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, -300.0, -200.0]).view(1, 1, 3, 1)
    values, keys = attlas.attention(q, key, key).weights.topk(3)
    assert keys.flatten().tolist() == [0, 2, 1]
    assert values.flatten().tolist() == [1, 0, 0]


# --- laws -------------------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**31 - 1)
)
def test_laws(queries, keys, causal, with_sinks, seed):
    """Rows and sink mass sum to 1; weights @ V is the output; permuted keys permute weights."""
    torch.manual_seed(seed)
    q, k, v = qkv(1, 2, queries, keys)
    sinks = torch.randn(2, dtype=torch.float64) if with_sinks else None
    options = {"is_causal": causal, "sinks": sinks}
    output, weights = attlas.attention(q, k, v, **options)
    total = weights.to_dense().sum(-1) + weights.sink_mass()
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(weights @ v, output)
    torch.testing.assert_close(
        weights.received().sum(-1), total.sum(-1) - weights.sink_mass().sum(-1)
    )
    torch.testing.assert_close(weights.pool((queries, 1), "mass")[:, :, 0], weights.received())
    order = torch.randperm(keys)
    mask = torch.ones(queries, keys).tril()[:, order] if causal else None
    permuted = attlas.attention(q, k[:, :, order], v[:, :, order], mask, sinks=sinks)
    torch.testing.assert_close(permuted.weights.to_dense(), weights.to_dense()[..., order])
    torch.testing.assert_close(permuted.output, output)


# --- the operator -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4-D", "3-D", "2-D", "grouped", "bias and sinks", "rules"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_takes_every_shape_of_x(kind, transposed):
    weights = make(kind)
    dense = weights.to_dense().mT if transposed else weights.to_dense()
    lazy = weights.T if transposed else weights
    *lead, _, size = dense.shape
    for shape in {(size,), (size, 3), (*lead, size, 3), (*lead[:-1], *lead[-1:], size, 1)}:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(lazy @ x, dense @ x)
        torch.testing.assert_close(torch.matmul(lazy, x), dense @ x)
        assert (lazy @ x.float()).dtype == torch.float64
    for expanded in ((1, *lead[1:]), (*lead[:-1], 1)) if lead else ():
        x = torch.randn(*expanded, size, 2, dtype=torch.float64)
        torch.testing.assert_close(lazy @ x, dense @ x)
    x = torch.randn(*lead, 2, dense.shape[-2], dtype=torch.float64)
    torch.testing.assert_close(x @ lazy, x @ dense)
    torch.testing.assert_close(torch.matmul(x[(0,) * len(lead)], lazy), x[(0,) * len(lead)] @ dense)


def test_a_chain_of_weights_is_a_rollout():
    one, two = make("4-D"), attlas.attention(*qkv(2, 4, 6, 5)).weights
    torch.testing.assert_close(one @ two, one.to_dense() @ two.to_dense())
    torch.testing.assert_close(
        one @ (two @ one.to_dense()), one.to_dense() @ (two.to_dense() @ one.to_dense())
    )


def test_the_operator_reads_nothing_behind_the_mask():
    weights = attlas.attention(*qkv(queries=6), masks.padding(torch.tensor([4]))).weights
    x = torch.randn(6, 2, dtype=torch.float64)
    bad = x.clone().index_fill_(0, torch.tensor([4, 5]), math.nan)
    torch.testing.assert_close(weights @ bad, weights @ x)


# --- gradients --------------------------------------------------------------------------


def of_queries(w, x):
    """A row of x for each query."""
    return x[: w.shape[-2]]


def of_keys(w, x):
    """A row of x for each key."""
    return x[: w.shape[-1]]


READOUTS = {
    "entropy": lambda w, x: w.entropy(),
    "max": lambda w, x: w.max().values,
    "topk": lambda w, x: w.topk(2).values,
    "mass": lambda w, x: w.mass([0, 2]),
    "sink_mass": lambda w, x: w.sink_mass(),
    "mean_distance": lambda w, x: w.mean_distance(),
    "expected_position": lambda w, x: w.expected_position(),
    "windowed_mass": lambda w, x: w.windowed_mass(1, None),
    "guided": lambda w, x: w.guided(penalty),
    "received": lambda w, x: w.received(),
    "received weighted": lambda w, x: w.received(
        "mean", query_weights=of_queries(w, x)[:, 0].square()
    ),
    "received weighted some": lambda w, x: w.received(
        queries=[0, 2], query_weights=of_queries(w, x)[:, 0]
    ),
    "top_keys": lambda w, x: w.top_keys(2, queries=slice(1, None)).values,
    "received some": lambda w, x: w.received("mean", queries=[0, 2]),
    "received max": lambda w, x: w.received("max"),
    "pool max": lambda w, x: w.pool(2),
    "pool mass": lambda w, x: w.pool((3, 2), "mass"),
    "w @ x": lambda w, x: w @ of_keys(w, x),
    "w.T @ x": lambda w, x: w.T @ of_queries(w, x),
    "w @ vector": lambda w, x: w @ of_keys(w, x)[:, 0],
    "w @ each": lambda w, x: w @ of_keys(w, x).expand(1, 2, -1, -1),
    "w.T @ each": lambda w, x: w.T @ of_queries(w, x).expand(1, 2, -1, -1),
    "map_rows": lambda w, x: w.map_rows(lambda rows: rows.square().cumsum(-1)),
    "to_dense": lambda w, x: w.to_dense(),
    "row": lambda w, x: w[0, 1, 2],
    "tile": lambda w, x: w[..., 1:3, ::2],
    "pairs": lambda w, x: w[..., torch.tensor([0, 1, 3]), torch.tensor([2, 1, 0])],
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 2.0}], ids=["", "causal"])
@pytest.mark.parametrize("readout", READOUTS)
def test_gradcheck_of_every_readout(readout, options, small_blocks):
    q, k, _ = qkv(1, 2, 4, size=2, kv_heads=1, grad=True)
    x, bias = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, bias, sinks, x):
        call = attlas.attention(q, k, k, bias=bias, sinks=sinks, enable_gqa=True, **options)
        return READOUTS[readout](call.weights, x)

    assert torch.autograd.gradcheck(run, (q, k, bias, sinks, x))
    assert torch.autograd.gradgradcheck(run, (q, k, bias, sinks, x), fast_mode=True)


# With the two above, every pair of options meets somewhere; "bias" and "sinks" say that they vary.
ROW_1_IS_EMPTY = torch.tensor([[1, 0, 1, 1, 1], [0] * 5, [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]])
GRID = {
    "lower right window, a mask": {
        "keys": 5,
        "mask": ROW_1_IS_EMPTY,
        "window_size": (2, 0),
        "causal_alignment": "lower_right",
    },
    "padding, softcap, one bias for all": {
        "mask": masks.padding(torch.tensor([3])),
        "softcap": 1.5,
        "bias": (1, 4),
    },
    "documents, window, sinks, scale": {
        "mask": masks.documents(torch.tensor([0, 0, 1, 1])),
        "window_size": (None, 0),
        "sinks": True,
        "scale": -0.7,
    },
    "a rule, causal lower right, grouped, bias": {
        "keys": 5,
        "kv_heads": 1,
        "mask": ~masks.sliding_window(0, 0) | masks.prefix(1),
        "is_causal": True,
        "causal_alignment": "lower_right",
        "bias": (1, 2, 4, 5),
    },
    "a mask, softcap, window, grouped, sinks": {
        "kv_heads": 1,
        "mask": ROW_1_IS_EMPTY[:, :4].view(1, 1, 4, 4),
        "softcap": 2.0,
        "window_size": (2, 1),
        "sinks": True,
    },
}


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("readout", READOUTS)
def test_gradcheck_of_every_readout_over_the_options(readout, case, small_blocks):
    options = dict(GRID[case])
    sizes = {name: options.pop(name) for name in ("keys", "kv_heads") if name in options}
    q, k, _ = qkv(1, 2, 4, size=2, grad=True, **sizes)
    leaves = {"q": q, "k": k, "x": torch.randn(5, 2, dtype=torch.float64, requires_grad=True)}
    for name, shape in (("bias", options.pop("bias", None)), ("sinks", options.pop("sinks", None))):
        if shape is not None:
            size = (2,) if name == "sinks" else shape
            leaves[name] = torch.randn(size, dtype=torch.float64, requires_grad=True)

    def run(q, k, x, *rest):
        extra = dict(zip(list(leaves)[3:], rest, strict=True))
        call = attlas.attention(q, k, k, enable_gqa="kv_heads" in sizes, **extra, **options)
        return READOUTS[readout](call.weights, x)

    inputs = tuple(leaves.values())
    if readout == "sink_mass" and "sinks" not in leaves:
        assert not run(*inputs).any()
        return
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("readout", READOUTS)
def test_gradients_over_many_steps_are_those_of_the_dense_weights(readout, impl, small_blocks):
    """Each row takes three steps and more, so that the state between them carries gradients."""
    q, k, _ = qkv(1, 2, 40, size=3, kv_heads=1, grad=True)
    x = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    options = {"sinks": sinks, "is_causal": True, "enable_gqa": True}
    found = []
    for name in (impl, "reference"):
        weights = attlas.attention(q, k, k, **options, impl=name).weights
        result = READOUTS[readout](weights, x)
        upstream = torch.arange(result.numel()).double().cos().view(result.shape)
        found.append(grads((result * upstream).sum(), q, k, sinks, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", *KERNELS])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_weights_are_copied_and_pickled(impl, copied):
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    weights = attlas.attention(q, k, v, masks.padding(torch.tensor([5, 3])), impl=impl).weights
    again = copied(weights)
    assert again is not weights
    assert again.impl == impl
    torch.testing.assert_close(again.to_dense(), weights.to_dense(), rtol=0, atol=0)
