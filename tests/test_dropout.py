"""Dropout: the generator, the same bits everywhere, gradients, what is before it and what after."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attlas
from attlas import encoding, masks, ops
from attlas.blocks import Block, Shape, whole
from attlas.dropout import Dropout, philox
from attlas.spec import Inputs

from .helpers import IMPLS, KERNELS, NATIVE, gap, grads, qkv, same

pytestmark = pytest.mark.numeric

CLOSE = 1e-12  # float64, tens of sums
P = 0.3
SEED = Dropout(P, torch.tensor(0x1234_5678_9ABC_DEF0))
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def call(*inputs: Tensor, seed: int = 5, p: float = P, **options):
    torch.manual_seed(seed)
    return attlas.attention(*inputs, dropout_p=p, **options)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


# --- the generator ----------------------------------------------------------------------

FULL = 0xFFFFFFFF
KNOWN = [  # philox4x32 with 10 rounds, of the file kat_vectors of Random123: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    found = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(map(int, found)) == words


def python_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in the integers of Python, as the paper writes it."""
    for _ in range(10):
        x, y = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(y >> 32) ^ counter[1] ^ key[0], y & FULL, (x >> 32) ^ counter[3] ^ key[1]]
        counter.append(x & FULL)
        key = [(key[0] + 0x9E3779B9) & FULL, (key[1] + 0xBB67AE85) & FULL]
    return counter


def test_a_weight_has_the_word_of_its_position():
    shape = Shape(2, 3, 3, 4, 9)
    keep = SEED.keep(whole(shape))
    key = [0x9ABC_DEF0, 0x1234_5678]
    for b, h, i, j in [(0, 0, 0, 0), (0, 0, 0, 5), (1, 2, 3, 8), (1, 0, 2, 7), (0, 2, 0, 3)]:
        word = python_words([j // 4, i, h, b], key)[j % 4]
        assert bool(keep[b, h, i, j]) == (word >= P * 2**32)


def test_a_block_is_a_part_of_the_whole():
    shape = Shape(2, 4, 2, 7, 23)
    keep = SEED.keep(whole(shape))
    for keys in (slice(0, 23), slice(3, 4), slice(5, 18), slice(4, 8), slice(6, 6)):
        block = Block(shape, slice(1, 2), slice(2, 4), slice(3, 6), keys)
        assert same(SEED.keep(block), keep[1:2, 2:4, 3:6, keys])


def test_the_rate_is_p_and_neighbours_are_independent():
    """Counts of independent bits lie within 5 standard deviations of the binomial mean."""
    shape = Shape(4, 4, 4, 128, 129)
    for p in (0.1, 0.5, 0.9):
        keep = Dropout(p, torch.tensor(7)).keep(whole(shape)).double()
        n = keep.numel()
        assert abs(keep.sum() - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))
        for dim in range(4):  # both of two neighbours: (1 - p)²
            size = keep.shape[dim]
            both = keep.narrow(dim, 0, size - 1) * keep.narrow(dim, 1, size - 1)
            m, q = both.numel(), (1 - p) ** 2
            # Each bit is in two pairs, which doubles the variance at most, and once more.
            assert abs(both.sum() - m * q) < 5 * math.sqrt(3 * m * q * (1 - q)), dim
    one, other = (Dropout(0.5, torch.tensor(s)).keep(whole(shape)) for s in (1, 2**32 + 1))
    n = one.numel()
    assert abs(int((one == other).sum()) - n / 2) < 5 * math.sqrt(n / 4)


# --- the same bits everywhere -----------------------------------------------------------

CASES = {
    "odd sizes": ((2, 3, 63, 65), {}),
    "one query of a long context": ((1, 2, 1, 8201), {}),
    "some queries of a long context": ((1, 2, 33, 4099), {"is_causal": True}),
    "several chunks": ((1, 2, 260, 1030), {"window_size": (600, 40)}),
    "grouped heads": ((2, 4, 17, 130), {"kv_heads": 2}),
    "one key head, few rows": ((1, 8, 1, 4200), {"kv_heads": 1}),
    "lower right": ((1, 2, 40, 70), {"is_causal": True, "causal_alignment": "lower_right"}),
    "pair mask": ((2, 2, 31, 67), {"mask": torch.rand(31, 67) > 0.5}),
    "function": (
        (1, 2, 30, 50),
        {"mask": masks.from_function(lambda b, h, q, k: (q + k) % 3 != 1)},
    ),
    "softcap and sinks": ((1, 2, 9, 20), {"softcap": 1.0, "sinks": torch.tensor([0.5, -1.0])}),
    "bias": ((1, 2, 9, 20), {"bias": torch.linspace(-1, 1, 180).view(9, 20)}),
}


def kept(
    impl: str, sizes: tuple[int, ...], dtype: torch.dtype, options: dict
) -> tuple[Tensor, Tensor]:
    """Which weights the implementation keeps, and which are there, read off outputs.

    The values are one column of a unit matrix for each key, so that an output is one weight.
    """
    heads, keys = sizes[1], sizes[3]
    q, k, _ = qkv(*sizes, 4, kv_heads=options.get("kv_heads"), dtype=dtype)
    options = {n: v for n, v in options.items() if n != "kv_heads"} | {"impl": impl}
    parts = []
    for columns in torch.eye(keys, dtype=dtype).split(512, dim=-1):
        v = columns.expand(*k.shape[:2], -1, -1)
        # Queries so small that no weight underflows.
        output, weights = call(q / 8, k, v, enable_gqa=heads != k.shape[1], **options)
        parts.append(output != 0)
    return torch.cat(parts, dim=-1), weights.to_dense() != 0


def drawn(sizes: tuple[int, ...]) -> Tensor:
    """What `call` keeps, from positions."""
    torch.manual_seed(5)
    batch, heads, queries, keys = sizes
    return Dropout.draw(P, torch.device("cpu")).keep(whole(Shape(batch, heads, 1, queries, keys)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@every_impl
def test_the_bits_are_those_of_the_positions(impl, case, dtype):
    sizes, options = CASES[case]
    options = {n: v.to(dtype) if n in ("bias", "sinks") else v for n, v in options.items()}
    found, there = kept(impl, sizes, dtype, options)
    assert same(found, there & drawn(sizes))


@every_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_change_no_bit(impl, threads, small_blocks):
    inputs = qkv(2, 4, 30, 33, kv_heads=2, grad=True)
    rule = masks.from_function(lambda b, h, q, k: (q + 2 * k) % 5 != 1)
    bias = torch.randn(30, 33, dtype=torch.float64, requires_grad=True)
    options = {"mask": rule, "bias": bias, "enable_gqa": True}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for each in (impl, "reference"):
            output, weights = call(*inputs, impl=each, **options)
            loss = output.square().sum() + weights.entropy().sum()
            results.append((output, *grads(loss, *inputs, bias)))
    finally:
        torch.set_num_threads(before)
    assert all(gap(a, b) < CLOSE for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@NATIVE.marks[0]
def test_every_instruction_set_draws_the_same(dtype):
    sizes = (1, 2, 70, 600)
    found, there = kept("native", sizes, dtype, {})
    assert there.all()
    assert same(found, drawn(sizes))


# --- what is computed -------------------------------------------------------------------


@every_impl
def test_the_output_is_that_of_the_dropped_weights_and_the_rest_is_before(impl):
    q, k, v = qkv(2, 4, 13, 21, kv_heads=2, value_size=6)
    options = {"is_causal": True, "enable_gqa": True, "impl": impl}
    output, weights = call(q, k, v, **options)
    plain = attlas.attention(q, k, v, **options)
    dropped = weights.dropped
    assert gap(weights.logsumexp, plain.weights.logsumexp) < CLOSE
    assert gap(weights.to_dense(), plain.weights.to_dense()) < CLOSE
    assert gap(weights.entropy(), plain.weights.entropy()) < CLOSE
    assert gap(weights @ v, plain.output) < CLOSE
    dense = torch.where(dropped.keep(), plain.weights.to_dense() / (1 - P), 0.0)
    assert gap(dropped.to_dense(), dense) < CLOSE
    assert gap(output, dense @ v.repeat_interleave(2, 1)) < CLOSE
    assert gap(output, plain.output) > 0.1


@every_impl
def test_statistics_of_the_same_pass_are_those_before(impl):
    inputs = qkv(2, 2, 40, 70, dtype=torch.float32)
    torch.manual_seed(5)
    output, weights = attlas.attention_statistics(*inputs, dropout_p=P, impl=impl)
    plain = attlas.attention_statistics(*inputs, impl=impl).weights
    assert same(output, call(*inputs, impl=impl).output)
    eps = torch.finfo(torch.float32).eps
    assert gap(weights.entropy(), plain.entropy()) < 40 * eps
    assert gap(weights.received(), plain.received()) < 40 * eps
    for a, b in zip(weights.max(), plain.max(), strict=True):
        assert gap(a, b) < 4 * eps


@every_impl
def test_without_dropout_nothing_is_drawn_and_nothing_changes(impl):
    inputs = qkv(dtype=torch.float32)
    state = torch.get_rng_state()
    plain = attlas.attention(*inputs, impl=impl)
    none = attlas.attention(*inputs, dropout_p=0.0, impl=impl)
    assert same(plain.output, none.output)
    assert none.weights.dropped is none.weights
    with pytest.raises(ValueError, match="window_size"):
        attlas.attention(*inputs, dropout_p=P, window_size=(-1, 0))
    assert torch.equal(state, torch.get_rng_state())
    attlas.attention(*inputs, dropout_p=P, impl=impl)
    assert not torch.equal(state, torch.get_rng_state())


@every_impl
def test_a_seed_gives_the_same_and_the_next_call_another(impl):
    inputs = qkv()
    first, again = (call(*inputs, impl=impl) for _ in range(2))
    following = attlas.attention(*inputs, dropout_p=P, impl=impl)
    assert same(first.output, again.output)
    assert gap(first.output, following.output) > 0.01
    assert not torch.equal(first.weights.dropped.keep(), following.weights.dropped.keep())


@every_impl
def test_the_mean_over_seeds_is_the_output_without(impl):
    q, k, v = qkv(1, 1, 3, 6)
    plain, weights = attlas.attention(q, k, v)
    items = [t.expand(40, -1, -1, -1) for t in (q, k, v)]  # each with bits of its own
    runs = torch.stack([call(*items, seed=s, p=0.5, impl=impl).output for s in range(20)])
    deviation = (weights.to_dense().square() @ v.square()).sqrt()  # of one run, at p = 1/2
    assert ((runs.mean((0, 1)) - plain).abs() < 5 * deviation / math.sqrt(800)).all()


@every_impl
def test_all_are_dropped_with_certainty_and_empty_rows_stay_empty(impl):
    q, k, v = qkv(grad=True)
    output, weights = call(q, k, v, p=1.0, impl=impl)
    assert output.eq(0).all()
    assert weights.dropped.to_dense().eq(0).all()
    assert all(g.eq(0).all() for g in grads(output.sum(), q, k, v))
    output, weights = call(q, k, v, torch.zeros(5, 5).bool(), impl=impl)
    assert output.eq(0).all()
    assert all(g.eq(0).all() for g in grads(output.sum(), q, k, v))


@every_impl
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_sizes_of_nothing(impl, sizes):
    output, weights = call(*qkv(*sizes), impl=impl)
    assert output.eq(0).all()
    assert weights.dropped.to_dense().shape == sizes


@every_impl
@pytest.mark.parametrize("queries", [1, 9])
def test_what_is_masked_or_dropped_is_not_read(impl, queries):
    q, k, v = qkv(1, 2, queries, 12)
    mask = torch.arange(12) < 9
    want, weights = call(q, k, v, mask.expand(queries, 12), impl=impl)
    k[:, :, 9:], v[:, :, 9:] = math.nan, math.inf
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    output = call(*leaves, mask.expand(queries, 12), impl=impl).output
    assert gap(output, want) < CLOSE
    assert all(g[..., :9, :].isfinite().all() for g in grads(output.sum(), *leaves))
    v[:, :, 4] = math.nan  # a value that some queries drop
    read = weights.dropped.keep()[..., 4]
    output = call(q, k, v, mask.expand(queries, 12), impl=impl).output
    assert torch.equal(output.isnan().all(-1), read)
    assert torch.equal(output.isnan().any(-1), read)


# --- gradients --------------------------------------------------------------------------


@every_impl
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's
def test_gradcheck(impl):
    inputs = qkv(1, 2, 3, 4, 2, grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def fn(q, k, v, bias, sinks):
        output, weights = call(q, k, v, bias=bias, sinks=sinks, softcap=2.0, impl=impl)
        return output, weights.entropy(), weights.dropped[..., 1:, :]

    assert torch.autograd.gradcheck(fn, (*inputs, bias, sinks))
    assert torch.autograd.gradgradcheck(
        lambda *t: fn(*t)[0], (*inputs, bias, sinks), fast_mode=True
    )


@every_kernel
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's
def test_forward_mode_and_functional_gradients_have_the_same_bits(impl):
    query, key, value = qkv(batch=1)
    tangent = torch.randn_like(query)

    def of(impl):
        return lambda q: call(q, key, value, impl=impl, is_causal=True).output.square().sum()

    pushed = [torch.func.jvp(of(i), (query,), (tangent,))[1] for i in (impl, "reference")]
    assert gap(*pushed) < CLOSE * 100
    pulled = torch.func.grad(of(impl))(query)
    assert gap((pulled * tangent).sum(), pushed[0]) < CLOSE * 100


@every_impl
def test_vmap_asks_which_randomness_is_meant(impl):
    inputs = [t.unsqueeze(1) for t in qkv(batch=3)]

    def fn(*t):
        return attlas.attention(*t, dropout_p=P, impl=impl).output

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(fn)(*inputs)
    equal = [t[:1].expand(3, *t.shape[1:]) for t in inputs]
    one = torch.vmap(fn, randomness="same")(*equal)
    assert gap(one[0], one[1]) == gap(one[0], one[2]) == 0
    other = torch.vmap(fn, randomness="different")(*equal)
    assert gap(other[0], other[1]) > 0.01


def test_checkpointing_draws_the_same_again():
    inputs, found = qkv(grad=True), []
    for how in (
        lambda fn: torch.utils.checkpoint.checkpoint(fn, *inputs, use_reentrant=False),
        lambda fn: fn(*inputs),
    ):
        torch.manual_seed(5)
        loss = how(lambda *t: attlas.attention(*t, dropout_p=P).output.square().sum())
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(gap(a, b) == 0 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_draws_from_the_seed_and_keeps_its_bits(dynamic):
    torch._dynamo.reset()

    def fn(*t):
        output, weights = attlas.attention(*t, dropout_p=P, is_causal=True)
        return output, weights, weights.entropy(), torch.matmul(weights.dropped, t[2])

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 8):
        inputs = qkv(queries=length, grad=True)
        torch.manual_seed(5)
        output, weights, entropy, again = compiled(*inputs)
        want, _, of_want, _ = (torch.manual_seed(5), fn(*inputs))[1]
        assert gap(output, want) < CLOSE
        assert gap(again, want) < CLOSE
        assert gap(entropy, of_want) < CLOSE
        assert gap(weights.dropped @ inputs[2], want) < CLOSE
        upward = torch.randn_like(output)
        found, expected = (torch.autograd.grad(o, inputs, upward) for o in (output, want))
        assert all(gap(a, b) < CLOSE for a, b in zip(found, expected, strict=True))
    torch._dynamo.reset()


def test_torch_export():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return attlas.attention(query, key, value, dropout_p=P).output

    inputs = qkv()
    exported = torch.export.export(Model(), inputs).module()
    torch.manual_seed(5)
    found = exported(*inputs)
    assert gap(found, call(*inputs).output) == 0


# --- the weights after dropout ----------------------------------------------------------

INDICES = [
    (0,),
    (slice(None), 1, slice(2, 9, 3)),
    (..., 3, slice(None)),
    (1, slice(None), [0, 2, 10], torch.tensor([1, -1, 4])),
    (torch.tensor([0, 1]), 0, torch.tensor([2, 3]), torch.tensor([5, 6])),
    (None, 0, ..., -1),
]


@every_impl
@pytest.mark.parametrize("lead", [(2, 3), (3,), ()], ids=str)
def test_dropped_weights_are_a_lazy_matrix(impl, lead):
    q, k, v = (torch.randn(*lead, n, 4, dtype=torch.float64) for n in (11, 13, 13))
    output, weights = call(q, k, v, impl=impl)
    dropped = weights.dropped
    dense = dropped.to_dense()
    assert dropped.shape == dense.shape == (*lead, 11, 13)
    assert gap(dense @ v, output) < CLOSE
    assert gap(dropped @ v, output) < CLOSE
    assert gap(dropped.T @ q, dense.mT @ q) < CLOSE
    assert gap(dropped.evaluate(attlas.statistics.Received()), dense.sum(-2)) < CLOSE
    assert gap(torch.stack(list(dropped)), dense) < CLOSE
    assert "DroppedWeights(shape=" in repr(dropped)
    for index in INDICES if len(lead) == 2 else [(..., 3, slice(None)), (-1,), ([0, 2],)]:
        assert gap(dropped[index], dense[index]) < CLOSE, index


def test_dropped_weights_have_gradients():
    q, k, v = qkv(grad=True)
    weights = call(q, k, v, is_causal=True).weights
    dropped, x = weights.dropped, torch.randn(5, 3, dtype=torch.float64)
    want = grads((dropped.to_dense() @ x).square().sum(), q, k)
    lazy = grads((dropped @ x).square().sum(), q, k)
    assert all(gap(a, b) < CLOSE for a, b in zip(lazy, want, strict=True))
    want = grads((dropped.to_dense().mT @ x).square().sum(), q, k)
    lazy = grads((dropped.T @ x).square().sum(), q, k)
    assert all(gap(a, b) < CLOSE for a, b in zip(lazy, want, strict=True))


def test_selected_heads_keep_their_bits():
    q, k, v = qkv(2, 6, 5, 7, kv_heads=3)
    weights = call(q, k, v, enable_gqa=True).weights
    some = weights.select_heads([4, 1]).select_heads([1])
    dense = weights.dropped.to_dense()[:, [1]]
    assert gap(some.dropped.to_dense(), dense) < CLOSE
    assert gap(some.dropped[:, 0, 2], dense[:, 0, 2]) < CLOSE
    assert gap(some.dropped.T @ q[:, :1], dense.mT @ q[:, :1]) < CLOSE
    with pytest.raises(NotImplementedError, match="dropped must have all heads, got some of them;"):
        some.dropped @ v[0, 0]
    with pytest.raises(TypeError, match="other must be weights whose rows sum to 1, got dropped"):
        weights.kl_divergence(weights.dropped)


def test_an_encoded_specification_drops_the_same_of_selected_heads():
    q, k, v = qkv(2, 6, 5, 7)
    mask = masks.causal() & masks.padding(torch.tensor([7, 3]))
    some = call(q, k, v, mask).weights.select_heads([4, 1])
    spec = replace(some.spec, dropout=some.dropout)
    decoded = encoding.decode(encoding.encode(spec, "blocked"), some.query, some.key)
    block = whole(spec.shape)
    assert same(decoded.dropout.keep(block), spec.dropout.keep(block))
    assert same(decoded.dropout.heads, torch.tensor([4, 1]))
    inputs = Inputs(some.query, some.key, v[:, [4, 1]], None, None)
    output = ops.attend("blocked", decoded, inputs).output
    assert gap(output, some.dropped.to_dense() @ inputs.value) < CLOSE


def test_copies_of_weights_keep_what_was_dropped():
    weights = call(*qkv()).weights
    for copy in (weights.detach(), weights.clone(), weights.to("cpu")):
        assert same(copy.dropped.keep(), weights.dropped.keep())


@every_impl
def test_verify_knows_dropout(impl):
    inputs = qkv(1, 2, 40, 50, dtype=torch.float32)
    assert attlas.verify(*inputs, dropout_p=P, is_causal=True, impl=impl).passed
    plain = attlas.attention(*inputs).output
    assert not attlas.verify(*inputs, output=plain, dropout_p=P, impl=impl).passed


@every_kernel
def test_readouts_of_a_dropping_specification_are_those_before(impl):
    """A specification that holds dropout drops where weights meet values, and nowhere else."""
    q, k, v = qkv(grad=True)
    weights = attlas.attention(q, k, v, impl=impl).weights
    spec = replace(weights.spec, dropout=SEED)
    statistic = attlas.statistics.TransposedProduct(v.detach())
    found = ops.read(impl, statistic, spec, q, k, None, weights.normaliser)[0]
    want = weights.T @ v.detach()
    assert gap(found, want) == 0
    pairs = zip(grads(found.sum(), q, k), grads(want.sum(), q, k), strict=True)
    assert all(gap(a, b) == 0 for a, b in pairs)
    assert gap(ops.attend(impl, spec, Inputs(q, k, v, None, None)).output, weights @ v) > 0.01


# --- messages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "got"),
    [(-0.1, ValueError, "-0.1"), (1.5, ValueError, "1.5"), (math.nan, ValueError, "nan"),
     ("0.1", TypeError, "str"), (True, TypeError, "bool"), (None, TypeError, "NoneType"),
     (torch.tensor(0.5), TypeError, "Tensor")],
)  # fmt: skip
def test_a_chance_is_a_number_from_0_to_1(value, kind, got):
    message = f"dropout_p must be a number from 0 to 1, got {got}; it is the chance that a weight"
    with pytest.raises(kind, match=message):
        attlas.attention(*qkv(), dropout_p=value)
