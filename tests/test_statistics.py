"""Statistics as monoids: merge(split(x)) == whole(x), one's own, and the branches of `stream`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attlas
from attlas import divergence, fused, masks, statistics, streaming
from attlas.block_weights import BlockWeights, ScoredBlockWeights
from attlas.blocks import Block, Shape, take, whole
from attlas.statistics import Part, Statistic, Sum

from .helpers import NATIVE, allowed_pairs, penalty, qkv

pytestmark = pytest.mark.numeric

L, S = 6, 8
SHAPE = Shape(2, 2, 2, L, S)
torch.manual_seed(5)
LOG = torch.randn(2, 2, L, S, dtype=torch.float64)
LOG = LOG.masked_fill(~allowed_pairs(L, S, True, "upper_left", None), -torch.inf).log_softmax(-1)
MEMBER = (torch.rand(2, 1, S) > 0.5).double()
SOME = (torch.rand(1, 1, L) > 0.4).double()
X = torch.randn(1, 2, L, 3, dtype=torch.float64)


class Gini(Sum):
    """Σ_j p_ij², a statistic of one's own."""

    def of(self, part: Part) -> torch.Tensor:
        return (part.weights**2).sum(-1)


class Weighted(Sum):
    """Σ_j p_ij u_i v_j, with an operand on each axis."""

    axes = ("bhq", "bhk")

    def __init__(self, u: torch.Tensor, v: torch.Tensor) -> None:
        self.operands = (u, v)

    def of(self, part: Part) -> torch.Tensor:
        u, v = part.operands
        return (part.weights * u[..., None] * v[..., None, :]).sum(-1)


U, W = torch.rand(1, 2, L, dtype=torch.float64), torch.rand(2, 1, S, dtype=torch.float64)
OTHER = torch.rand(2, 1, L, S, dtype=torch.float64)
LAZY = attlas.attention(*qkv(2, 2, L, S, kv_heads=1), enable_gqa=True).weights._beside()
MONOIDS: dict[str, Statistic] = {
    "entropy": statistics.Entropy(),
    "mean distance": statistics.MeanDistance(),
    "guided": statistics.Guided(penalty),
    "mass": statistics.Mass(MEMBER),
    "mass of all heads alike": statistics.Mass(MEMBER[:1]),
    "topk": statistics.TopK(3),
    "topk of all": statistics.TopK(S),
    "max": statistics.Max(),
    "received": statistics.Received(),
    "received of some": statistics.Received(None, SOME),
    "received max": statistics.ReceivedMax(),
    "received max of some": statistics.ReceivedMax(None, SOME),
    "transposed product": statistics.TransposedProduct(X),
    "pool max": statistics.Pool((6, 3), "max"),
    "pool mass": statistics.Pool((6, 3), "mass"),
    "entropy of the mean of heads": statistics.OverHeads(statistics.Entropy()),
    "received by the mean of heads": statistics.OverHeads(statistics.Received()),
    "kl": divergence.KLDivergence(divergence.DenseBeside(OTHER)),
    "kl to lazy weights": divergence.KLDivergence(LAZY),
    "cross-entropy": divergence.CrossEntropy(LAZY),
    "target": divergence.TargetCrossEntropy(OTHER),
    "gini": Gini(),
    "weighted": Weighted(U, W),
}


def part_of(statistic: Statistic, block: Block) -> Part:
    operands = zip(statistic.operands, statistic.axes, strict=False)
    cut = tuple(take(t, block, axes) for t, axes in operands)
    return Part(block, Given(LOG[:, :, block.queries, block.keys]), cut, 0)


class Given(BlockWeights):
    """The values of a block, from their logarithms."""

    def __init__(self, log_weights: torch.Tensor) -> None:
        self._weights, self._log_weights = log_weights.exp(), log_weights
        self.device, self.like = log_weights.device, ScoredBlockWeights


def cuts(statistic: Statistic, points: list[int]) -> list[Block]:
    """The matrix cut at `points` along the axis that the statistic scans."""
    queries = statistic.scans == "q"
    size = L if queries else S
    edges = [0, *sorted({p for p in points if 0 < p < size}), size]
    name = "queries" if queries else "keys"
    return [whole(SHAPE)._replace(**{name: slice(a, b)}) for a, b in pairwise(edges)]


@given(st.sampled_from(sorted(MONOIDS)), st.lists(st.integers(1, 7), max_size=4), st.randoms())
def test_merge_of_split_is_whole(name, points, random):
    statistic = MONOIDS[name]
    everything, like = whole(SHAPE), LOG.new_empty(())
    init = statistic.init(everything, like)
    expected = statistic.finalize(statistic.update(init, part_of(statistic, everything)))
    blocks = cuts(statistic, points)
    streamed = init
    for block in blocks:
        streamed = statistic.update(streamed, part_of(statistic, block))
    states = [statistic.update(init, part_of(statistic, block)) for block in blocks]
    random.shuffle(states)
    merged = states[0]
    for state in states[1:]:
        merged = statistic.merge(merged, state)
    for found in (streamed, merged, statistic.merge(init, merged), statistic.merge(merged, init)):
        for a, b in zip(statistic.finalize(found), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "blocked", NATIVE])
@pytest.mark.parametrize("name", sorted(MONOIDS))
def test_the_public_check_of_the_laws_passes_ours(name, impl, small_blocks):
    q, k, v = qkv(2, 2, L, S)
    options = {"sinks": torch.ones(2).double(), "is_causal": True, "bias": W[:1, :, None]}
    weights = attlas.attention(q, k, v, **options, impl=impl).weights
    for seed in range(3):
        attlas.check_statistic(MONOIDS[name], weights, seed=seed)


class ForgetsTheState(Gini):
    def update(self, state, part):
        return (self.of(part),)


class CountsMerges(Gini):
    def merge(self, a, b):
        return (a[0] + b[0] + 1e-3,)


class ForgetsAState(Gini):
    def merge(self, a, b):
        return a


class HidesAGradient(Gini):
    def merge(self, a, b):
        return (a[0] + b[0].detach(),)


class IsNotDeterministic(Gini):
    def of(self, part):
        return super().of(part) * torch.rand(())


class Divides(Gini):
    """A mean of squares: its own count is missing from the state."""

    def update(self, state, part):
        return (state[0] + (part.weights**2).mean(-1),)


class IsNotLinear(Gini):
    linear = True


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (ForgetsTheState(), r"update\(update\(init, a\), b\) is not"),
        (CountsMerges(), r"merge\(split\(x\)\) is not whole\(x\): "),
        (ForgetsAState(), r"merge\(split\(x\)\) is not whole\(x\): "),
        (HidesAGradient(), r"merge\(split\(x\)\) is not whole\(x\), in the gradient: "),
        (IsNotDeterministic(), "is not"),
        (Divides(), r"update\(update\(init, a\), b\) is not"),
        (IsNotLinear(), r"linear: evaluate\(mean of x\) is not the mean of evaluate\(x\)"),
    ],
)
def test_the_public_check_sees_a_law_that_is_broken(wrong, law):
    weights = attlas.attention(*qkv(2, 2, L, S)).weights
    with pytest.raises(AssertionError, match=law):
        attlas.check_statistic(wrong, weights)


def test_the_messages_of_the_public_check():
    weights = attlas.attention(*qkv(2, 2, L, S)).weights
    with pytest.raises(TypeError, match=r"^statistic must be a Statistic, got type; subclass"):
        attlas.check_statistic(Gini, weights)
    with pytest.raises(TypeError, match=r"^weights must be lazy weights, got Tensor; pass"):
        attlas.check_statistic(Gini(), weights.to_dense())
    with pytest.raises(ValueError, match=r"^cuts must be at least 0, got -1; "):
        attlas.check_statistic(Gini(), weights, cuts=-1)


def test_every_statistic_of_the_module_is_tested():
    """But for those that are given whole rows, and have nothing to merge."""
    found = [*vars(statistics).values(), *vars(divergence).values()]
    own = {s for s in found if isinstance(s, type) and issubclass(s, Statistic)}
    split = {s for s in own - {Statistic, Sum, statistics.Through} if s.scans is not None}
    assert split == {type(s) for s in MONOIDS.values()} - {Gini, Weighted}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("impl", ["reference", "blocked", NATIVE])
def test_a_statistic_of_ones_own_streams_and_differentiates(impl, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    q, k, v = qkv(2, 2, L, S, grad=True)
    u, w = (t.clone().requires_grad_() for t in (U, W))
    weights = attlas.attention(q, k, v, is_causal=True, impl=impl).weights
    dense = weights.to_dense()
    torch.testing.assert_close(weights.evaluate(Gini()), dense.square().sum(-1))
    found = weights.evaluate(Weighted(u, w))
    expected = (dense * u[..., None] * w[..., None, :]).sum(-1)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, u, w), upstream, retain_graph=True),
        torch.autograd.grad(expected, (q, k, u, w), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_methods_that_are_to_be_written_say_so():
    part = part_of(Gini(), whole(SHAPE))
    for call in (
        lambda: Statistic().init(whole(SHAPE), LOG),
        lambda: Statistic().update((), part),
        lambda: Statistic().merge((), ()),
        lambda: Sum().of(part),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert Statistic().finalize((LOG,)) == (LOG,)


def test_a_part_knows_its_positions():
    q, k, v = qkv(1, 1, 3, 5)
    seen = []

    class Look(Sum):
        def of(self, part: Part) -> torch.Tensor:
            seen.append((part.queries.flatten().tolist(), part.keys.tolist()))
            return part.weights.sum(-1)

    attlas.attention(q, k, v, causal_alignment="lower_right").weights.evaluate(Look())
    assert seen == [([2, 3, 4], [0, 1, 2, 3, 4])]


# --- each special branch, and that it ran -----------------------------------------------


class Calls:
    """Counts the calls of a function, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner, name: str) -> None:
        self.given: list[tuple] = []
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            self.given.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    def __len__(self) -> int:
        return len(self.given)


BRANCHES = {
    # options, the calls of the fused forward (None: more than one for each 8 rows), streamed
    "no mask: one fused call": ({}, 1),
    "causal: one fused call": ({"is_causal": True}, 1),
    "key padding: one fused call": ({"mask": masks.padding(torch.tensor([9]))}, 1),
    "a window: rows at a time": ({"window_size": (3, 3)}, 32 // 8),
    "two runs of keys: rows at a time, then merged": (
        {"mask": masks.from_tensor((torch.arange(32) % 16 < 4).expand(32, 32))},
        2 * (32 // 8),
    ),
    "softcap: no fused call": ({"softcap": 9.0}, 0),
    "NaN behind a mask: no fused call": ({"mask": masks.padding(torch.tensor([9]))}, 0),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_the_forward_takes_the_branch_that_it_should(case, small_blocks, monkeypatch):
    options, count = BRANCHES[case]
    q, k, v = qkv(1, 1, 32)
    if "NaN" in case:
        v[:, :, 20] = torch.nan
    from attlas.kernels import blocked

    calls = Calls(monkeypatch, fused, "_forward")
    streamed = Calls(monkeypatch, blocked, "_stream")
    output = attlas.attention(q, k, v, **options, impl="blocked").output
    assert len(calls) == count
    assert len(streamed) == (count == 0)
    expected = attlas.attention(q, k, v, **options, impl="reference").output
    torch.testing.assert_close(output, expected)


def test_the_backward_takes_the_branch_that_it_should(small_blocks, monkeypatch):
    from attlas.kernels import blocked

    q, k, v = qkv(1, 1, 32, grad=True)
    bias = torch.zeros(32, 32, dtype=torch.float64, requires_grad=True)
    calls = Calls(monkeypatch, fused, "_backward")
    streamed = Calls(monkeypatch, blocked, "_stream_backward")
    attlas.attention(q, k, v, impl="blocked").output.sum().backward()
    assert (len(calls), len(streamed)) == (1, 0)
    attlas.attention(q, k, v, window_size=(3, 3), impl="blocked").output.sum().backward()
    assert (len(calls), len(streamed)) == (1 + 32 // 8, 0)
    attlas.attention(q, k, v, bias=bias, impl="blocked").output.sum().backward()
    assert (len(calls), len(streamed)) == (1 + 32 // 8, 1)


@pytest.mark.parametrize(
    ("readout", "largest"),
    [
        # The axis that is summed away is cut at SPAN = 16; 192 elements leave 12 of the other
        # one, evened out to 11.
        (lambda w: w.entropy(), (11, 16)),
        (lambda w: w.received(), (16, 11)),
        # A cell of 32 x 4 needs 32 rows of 64 keys: three rows at a time fit.
        (lambda w: w.pool((32, 4)), (3, 64)),
        # Whole rows are never cut.
        (lambda w: w.map_rows(lambda rows: rows.sum(-1)), (3, 64)),
    ],
    ids=["key split", "query split", "rows within a cell", "whole rows"],
)
def test_a_statistic_is_cut_as_it_should_be(readout, largest, small_blocks, monkeypatch):
    q, k, v = qkv(1, 1, 64)
    weights = attlas.attention(q, k, v, impl="blocked").weights
    calls = Calls(monkeypatch, streaming.Source, "part")
    readout(weights)
    sizes = [given[1].sizes("qk") for given in calls.given]
    assert (max(q for q, _ in sizes), max(k for _, k in sizes)) == largest
    assert sum(q * k for q, k in sizes) == 64 * 64


# --- what the C++ library computes ----------------------------------------------------------

CHUNK = slice(2, 5)
IN_ONE_PASS = {
    "entropy": lambda w: w.entropy(),
    "expected position": lambda w: w.expected_position(),
    "mass": lambda w: w.mass(CHUNK),
    "mean of heads, mass": lambda w: w.head_mean().mass(CHUNK),
    "mean of heads, received": lambda w: w.head_mean().received(),
    "mean of heads, window": lambda w: w.head_mean().windowed_mass(2, 0),
    "product": lambda w: w.T @ torch.ones(L, 2, dtype=torch.float64),
    "received": lambda w: w.received(),
    "received from some": lambda w: w.received(queries=torch.tensor([0, 2])),
    "window": lambda w: w.windowed_mass(2, 0),
}


@pytest.mark.parametrize("impl", [NATIVE])
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_the_library_computes_and_differentiates_it(name, impl, monkeypatch):
    def refuse(*_):
        raise AssertionError("PyTorch streams it")

    monkeypatch.setattr(streaming, "stream", refuse)
    monkeypatch.setattr(streaming, "stream_backward", refuse)
    q, k, v = qkv(2, 2, L, S, grad=True)
    weights = attlas.attention(q, k, v, is_causal=True, impl=impl).weights
    torch.autograd.grad(IN_ONE_PASS[name](weights).square().sum(), (q, k))
