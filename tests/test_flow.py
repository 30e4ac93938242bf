"""Attention flow over layers: on paper, against networkx and against a linear program."""

from __future__ import annotations

import sys

import networkx
import numpy
import pytest
import torch
from scipy.optimize import linprog

import attlas
from attlas import masks

from .helpers import KERNELS, qkv
from .test_rollout import layers


def matrices(weights, residual: float) -> list[torch.Tensor]:
    """A_l of each layer, `[B, L, L]`."""
    found = []
    for layer in weights:
        matrix = layer.to_dense()
        matrix = matrix.mean(1) if matrix.ndim == 4 else matrix
        found.append(residual * torch.eye(matrix.shape[-1]).double() + (1 - residual) * matrix)
    return found


def edges_of(matrices, item: int):
    """(from, to, capacity) of each edge; a node is (layer, position)."""
    for depth, matrix in enumerate(matrices):
        for (i, j), capacity in numpy.ndenumerate(matrix[item].numpy()):
            yield (depth + 1, i), (depth, j), float(capacity)


def by_networkx(matrices, item: int, start: int) -> list[float]:
    graph = networkx.DiGraph()
    for source, target, capacity in edges_of(matrices, item):
        graph.add_edge(source, target, capacity=capacity)
    top, size = (len(matrices), start), matrices[0].shape[-1]
    return [networkx.maximum_flow_value(graph, top, (0, j)) for j in range(size)]


def by_linear_program(matrices, item: int, start: int, end: int) -> float:
    """max Σ of what leaves the source, where what enters every other node leaves it."""
    edges = list(edges_of(matrices, item))
    top, bottom = (len(matrices), start), (0, end)
    inner = sorted({node for a, b, _ in edges for node in (a, b)} - {top, bottom})
    conserved = numpy.zeros((len(inner), len(edges)))
    for column, (a, b, _) in enumerate(edges):
        for node, sign in ((a, -1), (b, 1)):
            if node in inner:
                conserved[inner.index(node), column] = sign
    leaves = [-float(a == top) for a, _, _ in edges]
    bounds = [(0, capacity) for *_, capacity in edges]
    return -linprog(leaves, A_eq=conserved, b_eq=numpy.zeros(len(inner)), bounds=bounds).fun


def cut(size: int, depth: int) -> float:
    """How much too small a flow may be: 2^-30 for each edge that a cut can have."""
    return size * size * depth * 2.0**-30


@pytest.mark.parametrize("p", [0.3, 0.9])
@pytest.mark.parametrize("lead", [(2, 4), (2,)], ids=str)
def test_dropped_weights_against_networkx(lead, p):
    """The mean over heads, and rows that sum to more than what an int32 of 2^30 for 1 can hold."""
    inputs = [[torch.randn(*lead, 6, 4).double() for _ in range(3)] for _ in range(2)]
    dropped = [attlas.attention(*one, dropout_p=p).weights.dropped for one in inputs]
    given = matrices(dropped, 0.1)
    largest = max(float(matrix.sum(-1).max()) for matrix in given)
    assert (largest > 2) == (p == 0.9)
    found = attlas.flow(dropped, start=2, residual=0.1)
    assert found.shape == (2, 6)
    for item in range(2):
        expected = torch.tensor(by_networkx(given, item, 2)).double()
        assert ((expected - found[item]).abs() <= cut(6, 2) * max(largest, 1)).all()


def test_a_dropped_weight_beyond_what_a_row_of_weights_holds():
    """Each query has one key. What is kept of a weight of 1 carries 10."""
    query = torch.zeros(8, 1, 3, 2)
    weights = attlas.attention(query, query, query, torch.eye(3), dropout_p=0.9).weights
    kept = weights.dropped.keep().diagonal(dim1=-2, dim2=-1)[:, 0].double()
    assert kept.any()
    assert not kept.all()
    found = attlas.flow([weights.dropped], start=range(3), residual=0.0)
    assert found.diagonal(dim1=-2, dim2=-1).double().sub(10 * kept).abs().max() < 1e-5
    assert found.sum() == found.diagonal(dim1=-2, dim2=-1).sum()


def test_two_layers_on_paper():
    """Two layers: each path is its own, and carries what the narrower of its two edges does."""
    weights = layers(2)
    first, second = matrices(weights, 0.25)
    narrower = torch.minimum(second[:, 4, :, None], first).sum(1)
    found = attlas.flow(weights, start=4, residual=0.25)
    assert (found <= narrower + 1e-15).all()
    torch.testing.assert_close(found, narrower, atol=cut(7, 1), rtol=0)


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("impl", KERNELS)
def test_the_flow_of_networkx(impl, residual):
    weights = layers(4, impl)
    dense = matrices(weights, residual)
    found = attlas.flow(weights, start=[0, -1], residual=residual)
    assert found.shape == (2, 2, 7)
    for item in range(2):
        expected = [by_networkx(dense, item, i) for i in (0, 6)]
        assert (found[item] - torch.tensor(expected).double()).abs().max() <= cut(7, 4)
    assert torch.equal(attlas.flow(weights, start=-1, residual=residual), found[:, 1])


def test_the_flow_of_a_linear_program():
    q, k, _ = qkv(1, 3, 4)
    weights = [attlas.attention(a, b, b).weights for a, b in ((q, k), (k, q), (q, q))]
    found, dense = attlas.flow(weights, start=2)[0], matrices(weights, 0.5)
    for end in range(4):
        wanted = by_linear_program(dense, 0, 2, end)
        assert abs(found[end].item() - wanted) <= cut(4, 3) + 1e-9  # the precision of the solver


def test_paths_that_share_an_edge_share_what_it_carries():
    """Tokens 0 and 1 of the middle both read token 0, but the top reads both through token 2."""
    q = torch.zeros(1, 1, 3, 2)
    spread = attlas.attention(q, q, q, torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0]])).weights
    narrow = attlas.attention(q, q, q, torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1]])).weights
    found = attlas.flow([spread, narrow], start=2, residual=0.0)
    assert found.tolist() == [[1.0, 0.5, 0.0]]  # two paths of 0.5 to token 0, one to token 1
    found = attlas.flow([spread, spread, narrow], start=2, residual=0.0)
    assert found.tolist() == [[1.0, 0.0, 0.0]]


def test_every_kind_of_layer():
    weights = layers(2)
    single = [attlas.attention(*(t[:, 0] for t in qkv(2, 1, 7))).weights for _ in range(2)]
    mixed = [weights[0], weights[1].head_mean(), *single]
    expected = torch.tensor([by_networkx(matrices(mixed, 0.5), b, 2) for b in range(2)]).double()
    assert (attlas.flow(mixed, start=2) - expected).abs().max() <= cut(7, 4)
    flat = [attlas.attention(*(t[0, 0] for t in qkv(1, 1, 7))).weights for _ in range(2)]
    assert attlas.flow(flat, start=2).shape == (7,)
    assert attlas.flow(flat, start=range(7)).shape == (7, 7)


def test_an_empty_row_keeps_its_residual_and_a_half_is_read_in_full():
    q, k, v = qkv(2, 4, 7, dtype=torch.bfloat16)
    nothing = attlas.attention(q, k, v, masks.padding(torch.tensor([0, 7]))).weights
    found = attlas.flow([nothing], start=0)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [0.5, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(found[1].sum(), torch.tensor(1.0))


def test_no_gradient_is_promised():
    assert not attlas.flow(layers(2, grad=True), start=0).requires_grad


W = layers(1)[0]
LONG = attlas.attention(*[torch.zeros(1, 1, 4097, 1)] * 3).weights
MESSAGES = [
    ((W, 0), {}, TypeError, "weights must be a sequence of lazy weights, got AttentionWeights; "),
    (([W], 7), {}, IndexError, "start must be from -7 to 6, got 7; check it against the number"),
    (([W], "a"), {}, TypeError, "start must be a position or positions, got str; write start=0"),
    (([W], torch.ones(7)), {}, TypeError, "start must be a position or positions, got Tensor; "),
    (([W], 0), {"residual": -0.5}, ValueError, "residual must be from 0 to 1, got -0.5; it is"),
    (
        ([LONG], 0),
        {},
        ValueError,
        "weights must have at most 16777216 edges, layers x L x L, got 16785409; take attlas.roll",
    ),
]


@pytest.mark.parametrize(("given", "options", "kind", "pattern"), MESSAGES)
def test_a_message_says_the_rule_the_value_and_the_mend(given, options, kind, pattern):
    with pytest.raises(kind, match=f"^{pattern}") as caught:
        attlas.flow(given[0], start=given[1], **options)
    assert type(caught.value) is kind


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"^attlas.flow must have scipy, .* 'attlas\[flow\]'$"):
        attlas.flow([W], start=0)
