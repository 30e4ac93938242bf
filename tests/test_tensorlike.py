"""Lazy weights behave as the tensor that they stand for, and make of it what they must."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, kl_div, max_pool2d

import attlas
from attlas import implicit

from .helpers import Watch, gap, qkv, same

DIMS = [0, 1, 2, 3, -1, -2, (0, 1), (1, 2), (2, 3), (-1, 0), [1]]


def make(dtype=torch.float32, **options) -> attlas.AttentionWeights:
    """Weights `[2, 3, 5, 7]` with sinks and a row that is empty."""
    query, key, value = qkv(2, 3, 5, 7, dtype=dtype)
    mask = torch.ones(5, 7)
    mask[2] = 0
    return attlas.attention(query, key, value, mask, sinks=torch.randn(3).to(dtype)).weights


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [*DIMS, None], ids=str)
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_sums_and_means(name, dim, keepdim):
    weights = make(torch.float64)
    dense = weights.to_dense()
    arguments = () if dim is None else (dim, keepdim)
    found, expected = (getattr(w, name)(*arguments) for w in (weights, dense))
    assert found.shape == expected.shape
    assert gap(found, expected) < 1e-14
    assert same(found, getattr(torch, name)(weights, *arguments))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
@pytest.mark.parametrize("keepdim", [False, True])
def test_the_largest_along_a_dimension(dim, keepdim):
    weights = make(torch.float64)
    dense = weights.to_dense()
    assert gap(weights.amax(dim, keepdim), dense.amax(dim, keepdim)) < 1e-15
    assert same(weights.argmax(dim, keepdim), dense.argmax(dim, keepdim))
    values, indices = weights.max(dim, keepdim)
    assert gap(values, dense.max(dim, keepdim).values) < 1e-15
    assert same(indices, torch.max(dense, dim, keepdim).indices)
    assert same(torch.max(weights, dim, keepdim).indices, indices)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [*DIMS, (), (0, 1, 2, 3)], ids=str)
def test_the_largest_along_dimensions(dim, keepdim):
    weights = make(torch.float64)
    found, expected = (w.amax(dim, keepdim) for w in (weights, weights.to_dense()))
    assert found.shape == expected.shape
    assert gap(found, expected) < 1e-15


def test_the_largest_of_all():
    weights = make()
    assert same(torch.max(weights), weights.to_dense().max())
    assert same(weights.argmax(), weights.to_dense().argmax())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_topk_with_the_arguments_of_torch(dim, largest, dtype):
    weights = make(dtype)
    dense = weights.to_dense()
    found = weights.topk(2, dim=dim, largest=largest)
    values, indices = dense.topk(2, dim, largest)
    assert (found.values.shape, found.values.dtype) == (values.shape, values.dtype)
    assert gap(found.values, values) < 1e-15
    # Of equal weights, those of the empty row among them, any may be chosen.
    assert gap(dense.gather(dim, found.indices), values) < 1e-15
    assert indices.dtype == found.indices.dtype


def test_topk_alone_gives_no_key_where_there_is_none():
    query = torch.zeros(1, 1, 3, 4)
    weights = attlas.attention(query, query, query, is_causal=True).weights
    assert weights.topk(2).keys[0, 0].tolist() == [[0, -1], [0, 1], [0, 1]]
    assert weights.topk(2, dim=-1).indices.min() == 0


def test_the_names_of_numpy_for_dimensions():
    weights = make(torch.float64)
    for reduce in (torch.sum, torch.mean, torch.amax, torch.argmax):
        found = reduce(weights, axis=-1, keepdims=True)
        assert same(found, getattr(weights, reduce.__name__)(dim=-1, keepdim=True))
    assert same(weights.max(axis=1)[0], weights.to_dense().max(1)[0])
    assert same(weights.topk(2, axis=1)[1], weights.to_dense().topk(2, 1)[1])


def test_half_precision_is_summed_in_float32_and_rounded_once():
    weights = make(torch.bfloat16)
    exact = weights.received()
    assert same(weights.sum(-2), exact.to(torch.bfloat16))
    assert weights.sum(-1).dtype == weights.mean(1).dtype == torch.bfloat16
    assert weights.sum(-1, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "reduction",
    [
        lambda w: w.sum(-2),
        lambda w: w.sum(2),
        lambda w: w.sum(-1),
        lambda w: w.mean(-2),
        lambda w: w.sum(),
        lambda w: w.sum((-1, -2)),
        lambda w: w.amax(-1),
        lambda w: w.amax(),
        lambda w: w.amax((1, -2)),
        lambda w: w.topk(3, dim=-1, largest=False),
        lambda w: w.argmax(-1),
        lambda w: w.max(-1),
        lambda w: torch.sum(w, -2),
        lambda w: (torch.numel(w), torch.is_floating_point(w)),
        lambda w: w.cpu(),
        lambda w: w.clone(),
        lambda w: w.float(),
        lambda w: w.contiguous().data.detach(),
        lambda w: (w.numel(), w.is_floating_point(), w.is_cuda, w.layout, w.nbytes, w.type()),
        lambda w: (w.new_zeros(3), w.type(torch.float32), hasattr(w, "tolist")),
        lambda w: copy.deepcopy(w),
        lambda w: pickle.loads(pickle.dumps(w)),
    ],
)
def test_no_dense_weights_where_there_is_a_cheaper_way(reduction, monkeypatch):
    query, key, value = qkv(1, 2, 64, 64, dtype=torch.float32)
    weights = attlas.attention(query, key, value, impl="blocked").weights
    monkeypatch.setattr(attlas.AttentionWeights, "to_dense", None)
    reduction(weights)


def test_a_sum_over_heads_holds_two_maps():
    query, key, value = qkv(1, 16, 32, dtype=torch.float32)
    weights = attlas.attention(query, key, value).weights
    with Watch() as watch:
        weights.mean(1)
    assert watch.largest <= 2 * 32 * 32


def test_a_gradient_through_sums():
    query, key, value = qkv(1, 2, 4, grad=True)
    weights = attlas.attention(query, key, value).weights
    for reduce in (lambda w: w.sum(2).square().sum(), lambda w: w.mean(1).square().sum()):
        found = torch.autograd.grad(reduce(weights), query, retain_graph=True)[0]
        expected = torch.autograd.grad(reduce(weights.to_dense()), query, retain_graph=True)[0]
        assert gap(found, expected) < 1e-12


def test_methods_and_operators_of_the_dense_weights():
    weights = make()
    dense = weights.to_dense()
    for found, expected in [
        (weights * 2, dense * 2),
        (2 - weights, 2 - dense),
        (1 / (weights + 1), 1 / (dense + 1)),
        (-weights, -dense),
        (weights + weights, dense + dense),
        (weights**2, dense**2),
        (weights > 0.1, dense > 0.1),
        (weights == weights, torch.ones_like(dense, dtype=torch.bool)),
        (weights.permute(0, 2, 1, 3), dense.permute(0, 2, 1, 3)),
        (weights.unsqueeze(0), dense[None]),
        (weights.masked_fill(dense > 0.1, 0.0), dense.masked_fill(dense > 0.1, 0.0)),
        (weights.double(), dense.double()),
        (weights.half(), dense.half()),
        (weights.type(torch.float64), dense.double()),
        (weights.type("torch.HalfTensor"), dense.half()),
        (+weights, dense),
        (torch.tensor(weights), dense),
        (torch.as_tensor(weights), dense),
        (torch.from_dlpack(weights), dense),
        (weights.to(torch.float64), dense.double()),
        (torch.stack([weights, weights]), torch.stack([dense, dense])),
        (torch.cat((weights, dense), 1), torch.cat((dense, dense), 1)),
        (torch.from_numpy(weights.numpy()), dense),
        (torch.from_numpy(np.ones(7, np.float32) * weights), dense),
        (torch.tensor(weights.tolist()), dense),
    ]:
        assert same(found, expected)
    assert weights.size(-1) == weights.shape[3] == 7
    assert weights.element_size() == 4
    assert len({weights, weights}) == 1


# --- dense weights that nobody asked for by name ----------------------------------------

ROWS, PART = r"weights\.map_rows\(fn\), a few rows", r"weights\[\.\.\.\], which reads a part"
IMPLICIT = {  # what is called: the name in the warning, and what to take instead
    "std": (lambda w: w.std(-1), ROWS),
    "softmax": (lambda w: torch.softmax(w, -1), ROWS),
    "add": (lambda w: w + 1, PART),
    "mul": (lambda w: w * 2, r"weights\.guided\(penalty\)"),
    "gt": (lambda w: w > 0.5, r"weights\.quantile\(share\)"),
    "log": (lambda w: w.log(), r"weights\.entropy\(\)"),
    "einsum": (lambda w: torch.einsum("bhqk->bqk", w), "weights @ x, or"),
    "stack": (lambda w: torch.stack([w, w]), PART),
    "permute": (lambda w: w.permute(0, 2, 1, 3), PART),
    "numpy": (lambda w: w.numpy(), PART),
    "array": (lambda w: np.asarray(w), PART),
    "dlpack": (lambda w: torch.from_dlpack(w), PART),
    "to": (lambda w: w.double(), PART),
    "amax": (lambda w: w.amax(1), PART),
    "argmax": (lambda w: w.argmax(1), PART),
    "max": (lambda w: w.max(1), PART),
    "topk": (lambda w: w.topk(1, dim=1), PART),
    "matmul": (lambda w: w.T @ w, PART),
    "transpose": (lambda w: torch.transpose(w.T, 0, 1), PART),
    "adaptive_avg_pool2d": (lambda w: adaptive_avg_pool2d(w, 2), r"weights\.pool\(cell, how\)"),
    "max_pool2d": (lambda w: max_pool2d(w, 2), r"weights\.pool\(cell, how\)"),
    "cross_entropy": (
        lambda w: cross_entropy(w[0, 0] if w.ndim < 4 else w, torch.zeros(1, 64, 64).long()),
        r"weights\.cross_entropy\(target\)",
    ),
    "kl_div": (lambda w: kl_div(torch.zeros(1, 2, 64, 64), w, reduction="sum"), "weights.kl_div"),
    "real": (lambda w: w.real, PART),
}


@pytest.fixture
def large(monkeypatch):
    """Weights that count as large, and of which nothing was said yet."""
    query, key, value = qkv(1, 2, 64, dtype=torch.float32)
    weights = attlas.attention(query, key, value).weights
    monkeypatch.setattr(implicit, "WARN_FROM", weights.nbytes)
    monkeypatch.setattr(implicit, "_said", set())
    return weights


@pytest.mark.parametrize("name", IMPLICIT)
def test_large_dense_weights_that_were_not_asked_for_are_told_of_once(name, large):
    call, instead = IMPLICIT[name]
    message = (
        rf"^'{name}' makes lazy weights of shape \[1, 2, 64, 64\] dense, 32.8 kB; take {instead}.*"
        rf", or to_dense\(\) where you want them all \(said once for '{name}'\)$"
    )
    with pytest.warns(UserWarning, match=message) as caught:  # noqa: PT031
        call(large)
        call(large)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the line of the user, not one of ours or of torch
    with pytest.warns(UserWarning, match="^'flatten' makes"):
        large.flatten()


def test_a_warning_that_is_an_error_is_one_each_time(large):
    """The filters of these tests, and of others, make it one."""
    for _ in range(2):
        with pytest.raises(UserWarning, match="'neg' makes lazy weights"):
            -large  # noqa: B018


def test_nothing_is_said_below_the_size_of_to_dense_and_of_lazy_ways(large, monkeypatch):
    large.to_dense(), large.dropped, large @ torch.ones(64), large.T @ torch.ones(64)
    large.sum(1), large.amax(-1), large.topk(3, dim=-1, largest=False), large[0], list(large)
    (
        large.cpu(),
        large.clone(),
        large.float(),
        large.nbytes,
        large.head_mean().to_dense(),
        repr(large),
    )
    monkeypatch.setattr(implicit, "WARN_FROM", large.nbytes + 1)
    for call, _ in IMPLICIT.values():
        call(large)


def test_other_lazy_matrices_tell_of_their_dense_weights(large, monkeypatch):
    monkeypatch.setattr(implicit, "WARN_FROM", 64 * 64 * 4)
    with pytest.warns(UserWarning, match=r"^'softmax' makes lazy weights of shape \[1, 64, 64\]"):
        torch.softmax(large.head_mean(), -1)


def test_a_graph_that_is_traced_says_nothing(large):
    query = large.query

    @torch.compile(fullgraph=True, backend="eager")
    def run(query):
        return attlas.attention(query, query, query).weights * 2

    assert gap(run(query), 2 * attlas.attention(query, query, query).weights.to_dense()) < 1e-6


def test_what_takes_256_megabytes_is_large():
    query = torch.zeros(1, 16, 2000, 1)
    weights = attlas.attention(query, query, query).weights
    assert weights.nbytes == implicit.WARN_FROM == 256_000_000


def test_copies_give_the_same_weights():
    weights = make()
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    for other in (
        copy.deepcopy(weights),
        copy.copy(weights),
        pickle.loads(pickle.dumps(weights)),
        torch.load(file, weights_only=False),
        weights.clone(),
        weights.to("cpu"),
        weights.to(torch.device("cpu"), torch.float32),
        weights.to(torch.zeros(1)),
    ):
        assert isinstance(other, attlas.AttentionWeights)
        assert same(other.to_dense(), weights.to_dense())


def test_a_clone_is_left_alone():
    weights = make()
    dense, clone = weights.to_dense(), weights.clone()
    weights.key.zero_()
    assert gap(weights.to_dense(), dense) > 0.01
    assert same(clone.to_dense(), dense)


def test_a_move_to_another_device_is_lazy():
    moved = make().to("meta")
    assert isinstance(moved, attlas.AttentionWeights)
    assert moved.query.is_meta
    assert moved.impl == "blocked"


def test_a_move_to_another_device_takes_what_is_dropped_along():
    query, key, value = qkv(2, 4, 5, dtype=torch.float32)
    weights = attlas.attention(query, key, value, dropout_p=0.5, impl="blocked").weights
    for before in (weights, weights.select_heads([2, 0])):
        moved = before.to("meta")
        held = [moved.query, moved.key, moved.normaliser, moved.dropout.seed]
        assert all(tensor.is_meta for tensor in held)
        assert moved.dropped.keep().is_meta
        assert moved.dropped.keep().shape == before.shape
        assert moved.select_heads([1]).dropped.keep().is_meta
        assert moved.dropout.p == 0.5
        assert not before.dropout.seed.is_meta
        dropped = before.clone().dropped  # with a seed of its own
        expected = dropped.to_dense()
        before.dropout.seed.add_(1)
        assert same(dropped.to_dense(), expected)
        assert gap(before.dropped.to_dense(), expected) > 0.01


@pytest.mark.parametrize("name", ["fill_", "masked_fill_", "untyped_storage"])
def test_what_would_be_lost_is_refused(name):
    with pytest.raises(AttributeError, match=rf"weights must be read only, got \.{name}; call"):
        getattr(make(), name)


@pytest.mark.parametrize("name", ["retain_grad", "register_hook", "grad"])
def test_a_gradient_of_the_weights_is_refused(name):
    message = rf"weights must be read only, got \.{name}; the output is not computed from them: for"
    with pytest.raises(AttributeError, match=message):
        getattr(make(), name)


def test_a_derivative_by_the_weights_is_refused():
    query, key, value = qkv(grad=True)
    output, weights = attlas.attention(query, key, value)
    message = "inputs must not be lazy weights, got some; the output is not computed from them: for"
    with pytest.raises(TypeError, match=message):
        torch.autograd.grad(output.sum(), [weights])
    (found,) = torch.autograd.grad(weights, query, torch.ones(weights.shape).double())
    assert gap(found, torch.zeros_like(query)) < 1e-14  # but by query they have one


def test_weights_are_neither_true_nor_false():
    with pytest.raises(RuntimeError, match="Boolean value of Tensor with more than one value"):
        bool(make())


def test_an_assignment_to_an_index_is_refused():
    with pytest.raises(TypeError, match="weights must be read only, got an assignment"):
        make()[0, 0] = 0


def test_an_attribute_that_no_tensor_has():
    with pytest.raises(AttributeError, match="has no attribute 'heads'"):
        make().heads  # noqa: B018


def test_a_dimension_that_is_not_there():
    with pytest.raises(IndexError, match=r"dim must be from -4 to 3, got 4; weights have 4"):
        make().sum(4)


def test_no_weights_at_all():
    query, key, value = qkv(1, 2, 0, 3, dtype=torch.float32)
    weights = attlas.attention(query, key, value).weights
    assert same(weights.sum(1), weights.to_dense().sum(1))


# --- a selection of heads ---------------------------------------------------------------


@pytest.mark.parametrize("heads", [[0], [5, 0], [1, 1], slice(2, 6), range(0, 6, 2), 3, [0, 1, 4]])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_selection_of_heads(heads, kv_heads):
    query, key, value = qkv(2, 6, 5, kv_heads=kv_heads)
    mask = torch.rand(2, 6, 5, 5) < 0.7
    weights = attlas.attention(
        query,
        key,
        value,
        mask,
        bias=torch.randn(1, 6, 5, 5, dtype=torch.float64),
        sinks=torch.randn(6, dtype=torch.float64),
        softcap=3.0,
        enable_gqa=True,
        is_causal=True,
    ).weights
    part = weights.select_heads(heads)
    heads = [heads] if isinstance(heads, int) else heads
    expected = weights.to_dense()[:, heads]
    assert part.shape == expected.shape
    assert gap(part.to_dense(), expected) < 1e-14
    assert gap(part[1], expected[1]) < 1e-14
    assert gap(part.entropy(), weights.entropy()[:, heads]) < 1e-13
    assert gap(part.sink_mass(), weights.sink_mass()[:, heads]) < 1e-14


def test_a_selection_of_heads_holds_those_alone():
    query, key, value = qkv(1, 8, 16, kv_heads=4)
    part = attlas.attention(query, key, value, enable_gqa=True).weights.select_heads([2, 3, 6, 7])
    assert part.query.untyped_storage().size() == query.untyped_storage().size() // 2
    assert part.key.untyped_storage().size() == key.untyped_storage().size() // 2


def test_weights_without_heads():
    query = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"weights must be \[B, H, L, S\], got \[3, 3\]; give"):
        attlas.attention(query, query, query).weights.select_heads([0])
