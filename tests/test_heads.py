"""The mean over heads: every readout, index and product is that of the dense mean."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas import blocks, masks, streaming

from .helpers import IMPLS, KERNELS, Watch, dense_statistics, grads, qkv, statistics_of

pytestmark = pytest.mark.numeric

MASK = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(2)) > 0.4
MASK[:, :, 2] = False
KINDS = {
    "plain": {},
    "causal": {"is_causal": True, "softcap": 2.0},
    "an empty row, a mask for each head": {"mask": MASK},
    "grouped": {"enable_gqa": True, "window_size": (3, 1)},
    "bias, sinks": {"bias": torch.randn(4, 5, 6).double()[None], "sinks": torch.ones(4).double()},
}


def make(kind: str, impl: str = "auto", grad: bool = False) -> attlas.AttentionWeights:
    torch.manual_seed(1)
    kv_heads = 2 if kind == "grouped" else 4
    q, k, v = qkv(2, 4, 5, 6, kv_heads=kv_heads, grad=grad)
    return attlas.attention(q, k, v, **KINDS[kind], impl=impl).weights


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_of_the_mean_is_that_of_the_dense_mean(kind, impl, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    weights = make(kind, impl)
    mean, dense = weights.head_mean(), weights.to_dense().mean(1)
    x, y = (torch.randn(n, 3, dtype=torch.float64) for n in (6, 5))
    found = statistics_of(mean, x, y)
    lse = torch.zeros(2, 1, 5, dtype=torch.float64)
    expected = dense_statistics(dense[:, None], lse, None, x, y, 0)
    expected["sink_mass"] = weights.sink_mass().mean(1, keepdim=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value[:, 0], msg=lambda m, n=name: f"{n}: {m}")
    empty = dense.eq(0).all(-1)
    assert torch.equal(mean.max().keys, dense.argmax(-1).masked_fill(empty, -1))
    if impl != "reference":
        assert torch.equal(mean.quantile(0.7), counts(dense, 0.7))
    torch.testing.assert_close(mean.received("mean", queries=[0, 3]), dense[:, [0, 3]].mean(1))


def counts(dense: torch.Tensor, share: float) -> torch.Tensor:
    held = dense.sort(-1, descending=True).values.cumsum(-1)
    count = (held < share * (1 - 1e-14) * dense.sum(-1, keepdim=True)).sum(-1) + 1
    return count.masked_fill(dense.eq(0).all(-1), 0)


ROWS, COLUMNS = torch.tensor([0, 2, -1]), torch.tensor([[1], [3]])


@pytest.mark.parametrize("kind", ["plain", "an empty row, a mask for each head", "grouped"])
@pytest.mark.parametrize(
    "index",
    [
        0,
        (0, 3),
        (..., -1),
        (1, slice(1, 4), 2),
        (..., ROWS, ROWS),
        (..., ROWS, COLUMNS),
        ...,
        (0, ROWS, COLUMNS),
        (None, slice(None), [0, 1]),
        (ROWS % 2, ROWS, ROWS),
        (..., ROWS[:0]),
    ],
    ids=str,
)
def test_an_index_reads_the_dense_mean(kind, index):
    mean = make(kind).head_mean()
    torch.testing.assert_close(mean[index], mean.to_dense()[index])
    log = mean._read(index, "logs")
    torch.testing.assert_close(log.exp(), mean.to_dense()[index])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_an_operator(kind):
    weights = make(kind)
    mean, dense = weights.head_mean(), weights.to_dense().mean(1)
    for lazy, matrix in ((mean, dense), (mean.T, dense.mT)):
        rows, columns = matrix.shape[-2:]
        for shape in ((columns,), (columns, 3), (2, columns, 3), (1, columns, 3)):
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(lazy @ x, matrix @ x)
        x = torch.randn(2, 3, rows, dtype=torch.float64)
        torch.testing.assert_close(x @ lazy, x @ matrix)
    torch.testing.assert_close(torch.sum(mean), dense.sum())
    torch.testing.assert_close(torch.stack(list(mean)), dense)


def test_the_mean_looks_like_a_tensor():
    mean = make("plain").head_mean()
    assert repr(mean) == "HeadMean(shape=[2, 5, 6], dtype=torch.float64, lazy, 480 B if dense)"
    assert (mean.shape, mean.ndim, len(mean), mean.T.shape) == ((2, 5, 6), 3, 2, (2, 6, 5))
    assert not make("plain", grad=True).head_mean().detach().requires_grad
    assert make("plain", grad=True).head_mean().requires_grad


# --- compared ---------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
def test_means_are_compared_with_each_other_and_with_single_heads(small, request):
    """A teacher of 6 heads and a student of 4, both averaged; and one of a single head."""
    if small:
        request.getfixturevalue("small_blocks")
    size = 30
    (q, k, v), (r, s, _) = qkv(2, 4, size, grad=True), qkv(2, 6, size, kv_heads=2, size=3)
    student = attlas.attention(q, k, v, is_causal=True).weights
    teacher = attlas.attention(r, s, s, is_causal=True, softcap=4.0, enable_gqa=True).weights
    one = attlas.attention(r[:, 0], s[:, 0], s[:, 0], is_causal=True).weights
    for p, other in (
        (teacher.head_mean(), student.head_mean()),
        (student.head_mean(), teacher.head_mean()),
        (student.head_mean(), one),
        (one, student.head_mean()),
    ):
        a, b = p.to_dense(), other.to_dense()
        expected = (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)
        torch.testing.assert_close(p.kl_divergence(other), expected)
        entropy = -torch.special.xlogy(a, a).sum(-1)
        torch.testing.assert_close(other.cross_entropy(p), expected + entropy)
        torch.testing.assert_close(other.cross_entropy(a), expected + entropy)
        for found, wanted in zip(
            grads(p.kl_divergence(other).square().sum(), q, k),
            grads(expected.square().sum(), q, k),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted)
    keys = torch.arange(size) // 2
    expected = -student.head_mean().to_dense()[:, torch.arange(size), keys].log()
    torch.testing.assert_close(student.head_mean().cross_entropy(keys), expected)


def test_the_entropy_of_the_mean_is_at_least_the_mean_of_the_entropies():
    weights = make("causal")
    assert (weights.head_mean().entropy() >= weights.entropy().mean(1) - 1e-12).all()
    row = weights.head_mean().entropy()[:, 3] - weights.entropy()[:, :, 3].mean(1)
    assert (row > 1e-3).all(), "the heads differ, and so do the two"


# --- gradients --------------------------------------------------------------------------

READOUTS = {
    "entropy": lambda m, x: m.entropy(),
    "topk": lambda m, x: m.topk(2).values,
    "received": lambda m, x: m.received(query_weights=x[:, 0]),
    "received max": lambda m, x: m.received("max"),
    "pool": lambda m, x: m.pool(2),
    "products": lambda m, x: (m @ x, m.T @ x),
    "map_rows": lambda m, x: m.map_rows(lambda rows: rows.square().cumsum(-1)),
    "index": lambda m, x: (m[0, 1], m[..., torch.tensor([0, 1]), torch.tensor([1, 3])]),
    "cross-entropy": lambda m, x: (m.cross_entropy(torch.tensor([0, 1, 2, 0])), m.entropy()),
    "kl to a tensor": lambda m, x: m.kl_divergence(x.square()[:, :1].expand(4, 4) + 0.1),
}


@pytest.mark.parametrize("readout", READOUTS)
def test_gradcheck(readout, small_blocks):
    q, k, _ = qkv(1, 2, 4, size=2, kv_heads=1, grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 4) if "kl" in readout else torch.ones(4, 4).tril()
    mask = mask[None, None].repeat(1, 2, 1, 1)
    mask[0, 0, 3] = 0  # a row that is empty in one head

    def run(q, k, bias, sinks, x):
        call = attlas.attention(q, k, k, mask, bias=bias, sinks=sinks, enable_gqa=True)
        return READOUTS[readout](call.weights.head_mean(), x)

    assert torch.autograd.gradcheck(run, (q, k, bias, sinks, x))
    assert torch.autograd.gradgradcheck(run, (q, k, bias, sinks, x), fast_mode=True)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("readout", READOUTS)
def test_gradients_over_many_steps_are_those_of_the_reference(readout, impl, small_blocks):
    q, k, _ = qkv(1, 2, 40, size=3, kv_heads=1, grad=True)
    x = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for name in (impl, "reference"):
        weights = attlas.attention(q, k, k, enable_gqa=True, window_size=(9, 30), impl=name).weights
        if "kl" in readout or "entropy" in readout:
            weights = attlas.attention(q, k, k, enable_gqa=True, impl=name).weights
        mean = weights.head_mean()
        if readout == "cross-entropy":
            results = (mean.cross_entropy(torch.arange(40)), mean.entropy())
        elif readout == "kl to a tensor":
            results = (mean.kl_divergence(x.square()[:, :1].expand(40, 40) + 0.1),)
        else:
            results = READOUTS[readout](mean, x)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(
            (r * torch.arange(r.numel()).double().cos().view(r.shape)).sum() for r in results
        )
        found.append(grads(loss, q, k, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- memory, and what is not read -------------------------------------------------------


@pytest.mark.parametrize("impl", KERNELS)
def test_the_mean_holds_no_matrix(impl, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 1 << 14)
    monkeypatch.setattr(streaming, "ELEMENTS", 1 << 14)
    q, k, v = qkv(1, 4, 512, grad=True)
    mean = attlas.attention(q, k, v, impl=impl).weights.head_mean()
    with Watch() as watch:
        grads(mean.entropy().sum() + mean.kl_divergence(mean.detach()).sum(), q, k)
    assert 4096 < watch.largest <= 1 << 16  # the mean of the matrices holds 1 << 18


def test_heads_are_cut_where_no_mean_is_taken(small_blocks):
    """The law above would hold, and need no code, if blocks always had all heads."""
    seen = []

    class Look(attlas.statistics.Sum):
        def of(self, part):
            seen.append(part.weights.shape[1])
            return part.weights.sum(-1)

    q, k, v = qkv(1, 4, 40, grad=True)
    weights = attlas.attention(q, k, v, impl="blocked").weights
    weights.evaluate(Look())
    assert max(seen) < 4
    streamed, original = [], streaming.Source.part

    def part(*args):
        streamed.append(args[1].sizes("h"))
        return original(*args)

    streaming.Source.part = part
    try:
        weights.head_mean().evaluate(Look())
    finally:
        streaming.Source.part = original
    assert set(streamed) == {(4,)}


def test_what_is_masked_is_not_read():
    results = []
    for bad in (0.0, math.nan):
        torch.manual_seed(0)
        q, k, v = qkv(queries=6)
        k[:, :, 4:] = bad
        k.requires_grad_()
        mean = attlas.attention(q, k, v, masks.padding(torch.tensor([4]))).weights.head_mean()
        found = (mean.entropy(), mean[0, 2], mean.received(), mean @ torch.ones(6).double())
        results.append((*found, *grads(sum(f.sum() for f in found), k)))
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


def test_messages():
    weights = attlas.attention(*(t[:, 0] for t in qkv())).weights
    with pytest.raises(
        ValueError, match=r"^weights must be \[B, H, L, S\] to have a mean of heads"
    ):
        weights.head_mean()
    mean = make("plain").head_mean()
    for x in (torch.ones(2, 4, 6, 3), torch.ones(5, 3), torch.ones(3, 6, 3)):
        with pytest.raises(ValueError, match=r"^x must "):
            mean @ x
