"""KL divergence and cross-entropy: against dense weights, to every kind of other, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attlas
from attlas import blocks, masks

from .helpers import IMPLS, KERNELS, NATIVE, Watch, grads, qkv

pytestmark = pytest.mark.numeric

MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0], [1] * 6, [1] * 6])
P_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "an empty row": {"mask": MASK},
    "window": {"window_size": (2, 1)},
    "softcap, scale": {"softcap": 2.0, "scale": 0.9},
    "grouped by 2": {"kv_heads": 2, "is_causal": True},
    "grouped by 4": {"kv_heads": 1, "sinks": True},
    "bias, sinks": {"bias": True, "sinks": True, "is_causal": True},
}
Q_CASES = {
    "plain": {},
    "another head size": {"size": 7, "bias": True},
    "grouped by 2": {"kv_heads": 2, "softcap": 3.0},
    "grouped by 4": {"kv_heads": 1},
    "sinks, a mask": {"sinks": True, "mask": MASK},
    "causal": {"is_causal": True},
}


def inputs(case: dict, queries: int = 5, keys: int = 6) -> dict[str, Tensor]:
    """The leaves of one call with 4 heads."""
    q, k, _ = qkv(2, 4, queries, keys, case.get("size", 4), kv_heads=case.get("kv_heads", 4))
    found = {"query": q, "key": k}
    if "bias" in case:
        found["bias"] = torch.randn(1, 4, queries, keys, dtype=torch.float64)
    if "sinks" in case:
        found["sinks"] = torch.randn(4, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def weigh(case: dict, leaves: dict[str, Tensor], impl: str = "auto") -> attlas.AttentionWeights:
    options = {n: v for n, v in case.items() if n not in ("size", "kv_heads", "bias", "sinks")}
    grouped = "kv_heads" in case
    value = leaves["key"]
    return attlas.attention(**leaves, value=value, enable_gqa=grouped, impl=impl, **options).weights


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def plain_ce(target: Tensor, p: Tensor) -> Tensor:
    return -torch.special.xlogy(target, p).sum(-1)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("q_case", Q_CASES)
@pytest.mark.parametrize("p_case", P_CASES)
def test_a_divergence_is_that_of_the_dense_weights(p_case, q_case, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    p = weigh(P_CASES[p_case], inputs(P_CASES[p_case]))
    q = weigh(Q_CASES[q_case], inputs(Q_CASES[q_case]), "blocked")
    dense_p, dense_q = p.to_dense(), q.to_dense()
    expected = plain_kl(dense_p, dense_q)
    torch.testing.assert_close(p.kl_divergence(q), expected)
    torch.testing.assert_close(p.kl_divergence(dense_q), expected)
    expected = plain_ce(dense_p, dense_q)
    torch.testing.assert_close(q.cross_entropy(p), expected)
    torch.testing.assert_close(q.cross_entropy(dense_p), expected)
    torch.testing.assert_close(q.cross_entropy(dense_p.detach().to_sparse()), expected)
    torch.testing.assert_close(q.cross_entropy(tuple(p.topk(6))), expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("p_case", "q_case"),
    [
        ("plain", "grouped by 4"),
        ("causal", "grouped by 2"),
        ("an empty row", "another head size"),
        ("window", "plain"),
        ("softcap, scale", "grouped by 2"),
        ("grouped by 2", "grouped by 4"),
        ("grouped by 4", "another head size"),
        ("bias, sinks", "plain"),
    ],
)
def test_gradients_of_both_are_those_of_the_dense_weights(p_case, q_case, impl, small_blocks):
    """20 queries, 40 keys: rows take several steps, heads are cut within the other's groups."""
    p_case = {**P_CASES[p_case]}
    if "mask" in p_case:
        p_case["mask"] = torch.rand(20, 40) > 0.3
        p_case["mask"][3] = False
    q_case = Q_CASES[q_case]
    p_in, q_in = inputs(p_case, 20, 40), inputs(q_case, 20, 40)
    leaves = [*p_in.values(), *q_in.values()]
    up = torch.randn(2, 4, 20, dtype=torch.float64)
    p, q = weigh(p_case, p_in, impl), weigh(q_case, q_in, impl)
    ref_p, ref_q = weigh(p_case, p_in, "reference"), weigh(q_case, q_in, "reference")
    for found, expected in (
        (p.kl_divergence(q), ref_p.kl_divergence(ref_q)),
        (q.cross_entropy(p), ref_q.cross_entropy(ref_p)),
        (p.kl_divergence(ref_q.to_dense()), ref_p.kl_divergence(ref_q)),
        (q.cross_entropy(ref_p.to_dense()), ref_q.cross_entropy(ref_p)),
    ):
        torch.testing.assert_close(found, expected)
        one, two = (grads((result * up).sum(), *leaves) for result in (found, expected))
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b)


def divergences(p: attlas.AttentionWeights, q: attlas.AttentionWeights, t: Tensor) -> list[Tensor]:
    keys = torch.tensor([0, 2, -1])
    sparse = torch.eye(3, 4, dtype=torch.float64).expand(p.shape).to_sparse()
    found = [p.kl_divergence(q), p.cross_entropy(q), p.cross_entropy(keys)]
    found += [p.cross_entropy(t.square()), p.kl_divergence(t.square()), p.cross_entropy(sparse)]
    return [*found, p.cross_entropy((t[..., :2].square(), torch.tensor([[0, 1]] * 3)))]


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.7}], ids=str)
def test_gradcheck_and_gradgradcheck(options, small_blocks):
    q, k, _ = qkv(1, 2, 3, 4, size=2, kv_heads=1, grad=True)
    other, other_k, _ = qkv(1, 2, 3, 4, size=3, grad=True)
    bias, sinks = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    t = (torch.rand(3, 4, dtype=torch.float64) + 0.1).requires_grad_()

    def run(q, k, bias, sinks, other, other_k, t):
        extra = {"bias": bias, "sinks": sinks, "enable_gqa": True, **options}
        p = attlas.attention(q, k, k, **extra).weights
        return divergences(p, attlas.attention(other, other_k, other_k).weights, t)

    leaves = (q, k, bias, sinks, other, other_k, t)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_gradcheck_where_both_are_masked(small_blocks):
    """p sees less than q: everything is finite. Row 0 of p is empty."""
    narrow = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]])
    q, k, _ = qkv(1, 2, 4, 3, size=2, grad=True)
    other, other_k, _ = qkv(1, 2, 4, 3, size=2, grad=True)

    def run(q, k, other, other_k):
        p = attlas.attention(q, k, k, narrow).weights
        wide = attlas.attention(other, other_k, other_k, narrow | torch.eye(4, 3).int()).weights
        return p.kl_divergence(wide), wide.cross_entropy(p), p.kl_divergence(wide.to_dense())

    leaves = (q, k, other, other_k)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


# --- zeros and infinities ---------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("small", [False, True])
def test_a_target_where_the_weight_is_zero_is_infinite_and_leaves_the_gradients_finite(
    impl, small, request
):
    if small:
        request.getfixturevalue("small_blocks")
    size = 40
    q, k, v = qkv(1, 1, size, size, grad=True)
    weights = attlas.attention(q, k, v, is_causal=True, impl=impl).weights
    full = attlas.attention(v, q, q, impl=impl).weights.detach()
    dense = torch.zeros(size, size, dtype=torch.float64)
    dense[5, 2], dense[5, 30], dense[7, 3] = 0.5, 0.5, 1.0  # key 30 is masked for query 5
    keys = torch.full((size,), -1)
    keys[5], keys[7] = 30, 3
    rest = torch.arange(size) != 5
    log = weights[0, 0, 7, 3].log()
    for target in (dense, dense[None, None].to_sparse(), keys):
        found = weights.cross_entropy(target)
        assert found[0, 0, 5] == math.inf
        torch.testing.assert_close(found[0, 0, 7], -log)
        assert found[0, 0, rest].sum() == found[0, 0, 7]
        everything, clean = grads(found.sum(), q, k), grads(found[..., rest].sum(), q, k)
        assert all(g.isfinite().all() for g in everything)
        torch.testing.assert_close(everything[0][:, :, rest], clean[0][:, :, rest])
    # The finite part of the row keeps its gradient: only the infinite term is a constant.
    finite = dense.clone()
    finite[5, 30] = 0
    for a, b in zip(
        grads(weights.cross_entropy(dense).sum(), q, k),
        grads(weights.cross_entropy(finite).sum(), q, k),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    found = full.kl_divergence(weights)
    assert found[0, 0, :-1].eq(math.inf).all()
    assert found[0, 0, -1].isfinite()
    assert all(g.isfinite().all() for g in grads(found.sum(), q, k))
    assert weights.kl_divergence(full).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_term_of_a_divergence_is_a_constant(impl, small_blocks):
    """The gradient is that of the other terms, for both."""
    q, k, v = qkv(1, 2, 30, grad=True)
    p = attlas.attention(q, k, v, impl=impl).weights
    other = attlas.attention(v, q, k, is_causal=True, impl=impl).weights
    assert p.kl_divergence(other).eq(math.inf).sum() == 2 * 29
    dense_p, dense_q = p.to_dense(), other.to_dense()
    ratio = dense_p.log() - dense_q.masked_fill(dense_q == 0, 1.0).log()
    rest = (dense_p * ratio).tril().sum(-1)
    up = torch.randn_like(rest)
    for a, b in zip(
        grads((p.kl_divergence(other) * up).sum(), q, k, v),
        grads((rest * up).sum(), q, k, v),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [(1, 2), (3, 2), (2, 3)])
def test_blocks_of_heads_may_cut_the_groups_of_the_other(groups, small_blocks, monkeypatch):
    cuts, original = [], attlas.divergence._whole_groups

    def whole_groups(key, block):
        found = original(key, block)
        cuts.append(found is not key)
        return found

    monkeypatch.setattr(attlas.divergence, "_whole_groups", whole_groups)
    calls = []
    for group in groups:
        q, k, _ = qkv(1, 6, 8, 4, kv_heads=6 // group)
        calls.append(attlas.attention(q, k, k, enable_gqa=True).weights)
    p, other = calls
    expected = plain_kl(p.to_dense(), other.to_dense())
    torch.testing.assert_close(p.kl_divergence(other), expected)
    assert any(cuts)


def test_the_divergence_from_itself_is_zero():
    weights = weigh(P_CASES["bias, sinks"], inputs(P_CASES["bias, sinks"]))
    assert weights.kl_divergence(weights).eq(0).all()
    torch.testing.assert_close(weights.cross_entropy(weights), weights.entropy())


def test_a_weight_that_underflows_is_no_infinity():
    """exp(-2000) is 0 in every float, and its logarithm is known."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -2000.0]).view(1, 1, 2, 1)
    weights = attlas.attention(q, k, k).weights
    assert weights.cross_entropy(torch.tensor([1])).item() == 2000
    assert weights.cross_entropy(torch.tensor([[0.5, 0.5]])).item() == 1000
    flat = attlas.attention(q, 0 * k, k).weights
    assert flat.kl_divergence(weights).item() == pytest.approx(1000 + math.log(0.5))
    assert weights.kl_divergence(flat).item() == pytest.approx(math.log(2))


def test_what_is_masked_in_either_is_not_read():
    def run(bad: float) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        (q, k, _), (r, s, _) = qkv(queries=6), qkv(queries=6)
        for key in (k, s):
            key[:, :, 4:] = bad
        leaves = [t.requires_grad_() for t in (q, k, r, s)]
        hidden = masks.padding(torch.tensor([4]))
        p = attlas.attention(q, k, k, hidden, is_causal=True).weights
        other = attlas.attention(r, s, s, hidden, softcap=2.0).weights
        found = p.kl_divergence(other), other.cross_entropy(p), p.cross_entropy(torch.tensor([0]))
        return *found, *grads(sum(f.sum() for f in found), *leaves)

    for a, b in zip(run(0.0), run(math.nan), strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


# --- shapes and dtypes ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # as torch makes one
@pytest.mark.parametrize("lead", [(), (2,), (2, 4)], ids=str)
def test_targets_of_every_shape(lead):
    q = torch.randn(*lead, 5, 4, dtype=torch.float64)
    weights = attlas.attention(q, q, q).weights
    dense, keys = weights.to_dense(), torch.randint(-1, 5, (*lead, 5))
    expected = -dense.log().gather(-1, keys.clamp(min=0)[..., None]).squeeze(-1)
    expected = expected.masked_fill(keys < 0, 0.0)
    torch.testing.assert_close(weights.cross_entropy(keys), expected)
    torch.testing.assert_close(weights.cross_entropy(keys.int()), expected)
    one_hot = torch.nn.functional.one_hot(keys.clamp(min=0), 5).double() * (keys >= 0)[..., None]
    torch.testing.assert_close(weights.cross_entropy(one_hot), expected)
    torch.testing.assert_close(weights.cross_entropy(one_hot.to_sparse()), expected)
    if not lead:
        torch.testing.assert_close(weights.cross_entropy(one_hot.to_sparse_csr()), expected)
    torch.testing.assert_close(
        weights.kl_divergence(dense.flip(-1)), plain_kl(dense, dense.flip(-1))
    )
    shared = torch.randint(0, 5, (5,))
    expected = -dense.log().gather(-1, shared[:, None].expand(*lead, 5, 1)).squeeze(-1)
    torch.testing.assert_close(weights.cross_entropy(shared), expected)


def test_a_student_in_half_precision_and_a_teacher_in_double():
    q, k, _ = qkv(2, 4, 5, 6)
    student = attlas.attention(*(t.bfloat16().requires_grad_() for t in (q, k, k))).weights
    teacher = attlas.attention(q, k, k).weights
    found = teacher.kl_divergence(student)
    assert found.dtype == torch.float64
    expected = plain_kl(teacher.to_dense(), student.map_rows(lambda rows: rows).double())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert student.kl_divergence(teacher).dtype in (torch.float32, torch.float64)
    assert grads(found.sum(), student.query)[0].dtype == torch.bfloat16


# --- memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "ce", "keys"])
@pytest.mark.parametrize("impl", KERNELS)
def test_a_divergence_holds_no_matrix(kind, impl, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 1 << 14)
    monkeypatch.setattr(attlas.streaming, "ELEMENTS", 1 << 14)
    q, k, v = qkv(1, 2, 512, grad=True)
    p = attlas.attention(q, k, v, is_causal=True, impl=impl).weights
    other = attlas.attention(k, v, q, is_causal=True, impl=impl).weights
    with Watch() as watch:
        match kind:
            case "kl":
                loss = p.kl_divergence(other).sum()
            case "ce":
                loss = p.cross_entropy(other).sum()
            case _:
                loss = p.cross_entropy(torch.arange(512)).sum()
        grads(loss, q, k, v)
    assert 1024 < watch.largest <= 1 << 16  # the matrices hold 1 << 19


# --- a training run ---------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["blocked", NATIVE])
@pytest.mark.parametrize("loss", ["supervision", "distillation"])
def test_training_on_the_weights_gives_the_curve_of_dense_eager_code(impl, loss):
    torch.manual_seed(3)
    x, labels = torch.randn(2, 12, 8), torch.randint(0, 12, (2, 1, 12))
    target = torch.randn(2, 2, 12, 12).tril().exp().tril()
    target = target / target.sum(-1, keepdim=True)
    start = [torch.randn(8, 16) / 8**0.5 for _ in range(2)]
    curves = []
    for eager in (True, False):
        parameters = [p.clone().requires_grad_() for p in start]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        curve = []
        for _ in range(30):
            q, k = ((x @ p).view(2, 12, 2, 8).transpose(1, 2) for p in parameters)
            labelled = labels.minimum(torch.arange(12))
            if eager:
                scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(12, 12).triu(1) > 0, -math.inf)
                log = scores.log_softmax(-1)
                if loss == "supervision":
                    index = labelled.expand(2, 2, 12)[..., None]
                    value = -log.gather(-1, index).mean()
                else:
                    value = -(target * log.masked_fill(log == -math.inf, 0.0)).sum(-1).mean()
            else:
                weights = attlas.attention(q, k, k, is_causal=True, impl=impl).weights
                value = weights.cross_entropy(labelled if loss == "supervision" else target).mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.8 * curves[0][0], "it learns"
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-5)


# --- messages ---------------------------------------------------------------------------

W = attlas.attention(*qkv(2, 4, 5, 7, dtype=torch.float32)).weights
SHORT = attlas.attention(*qkv(2, 4, 5, 6, dtype=torch.float32)).weights
SOME = torch.ones(2, 4, 5, 7)
MESSAGES = [
    (
        lambda: W.kl_divergence(SHORT),
        ValueError,
        r"other must have the shape \[2, 4, 5, 7\], got \[2, 4, 5, 6\]; compare weights of the",
    ),
    (
        lambda: W.cross_entropy(SHORT),
        ValueError,
        r"target must have the shape \[2, 4, 5, 7\], got \[2, 4, 5, 6\]; compare weights of the",
    ),
    (
        lambda: W.kl_divergence(3),
        TypeError,
        "other must be a floating tensor, got int; pass lazy weights, or a tensor of weights",
    ),
    (
        lambda: W.kl_divergence(SOME.to_sparse()),
        TypeError,
        r"other must be lazy or dense, got torch.sparse_coo; write other.to_dense\(\)",
    ),
    (
        lambda: W.kl_divergence(-SOME),
        ValueError,
        "other must hold weights of at least 0, got -1.0; weights, not scores or logarithms",
    ),
    (
        lambda: W.cross_entropy(-SOME.to_sparse()),
        ValueError,
        "target must hold weights of at least 0, got -1.0; weights, not scores or logarithms",
    ),
    (
        lambda: W.cross_entropy(SOME.double()),
        ValueError,
        "target must not be wider than query, torch.float32, got torch.float64; convert it",
    ),
    (
        lambda: W.cross_entropy(SOME[..., :6]),
        ValueError,
        r"target must broadcast to .* = \[2, 4, 5, 7\], got \[2, 4, 5, 6\]; its last two",
    ),
    (
        lambda: W.cross_entropy(SOME[0]),
        ValueError,
        r"target must have 2 or 4 dimensions, .*, got \[4, 5, 7\]; write target.unsqueeze",
    ),
    (
        lambda: W.cross_entropy(SOME[0].to_sparse()),
        ValueError,
        r"target must have the shape \[2, 4, 5, 7\] where it is sparse, got \[4, 5, 7\]; give",
    ),
    (
        lambda: W.cross_entropy(SOME.int().to_sparse()),
        ValueError,
        r"target must be a floating tensor, got torch.int32; a sparse target holds weights: conv",
    ),
    (
        lambda: W.cross_entropy(SOME > 0),
        TypeError,
        r"target must be floating or positions, got bool; convert it with target.float\(\)",
    ),
    (
        lambda: W.cross_entropy(torch.tensor([7])),
        IndexError,
        "index must be from -7 to 6 in dimension 3, got 7; check it against weights.shape",
    ),
    (
        lambda: W.cross_entropy(torch.ones(2, 3, 5).long()),
        ValueError,
        r"the keys of target must broadcast to \[..., L, k\] = \[2, 4, 5, 1\], got \[2, 3, 5, 1\]",
    ),
    (
        lambda: W.cross_entropy((torch.ones(3), torch.ones(2).long())),
        ValueError,
        r"the values of target must broadcast to .* = \[2, 4, 5, 2\], got \[3\]; pass \(values",
    ),
    (
        lambda: W.cross_entropy((torch.ones(2), torch.ones(2))),
        TypeError,
        r"the keys of target must be an integer tensor, got torch.float32; pass \(values, keys\)",
    ),
    (
        lambda: W.cross_entropy((3, torch.ones(2))),
        TypeError,
        r"the values of target must be a floating tensor, got int; pass \(values, keys\)",
    ),
    (
        lambda: W.cross_entropy(SOME.to("meta")),
        ValueError,
        "target must be on the device of query, cpu, got meta; move it with",
    ),
]


@pytest.mark.parametrize(("make", "kind", "pattern"), MESSAGES)
def test_a_message_says_the_rule_the_value_and_the_mend(make, kind, pattern):
    with pytest.raises(kind, match=f"^{pattern}") as caught:
        make()
    assert type(caught.value) is kind
