"""Corners of the compiled kernels that the parity grid does not reach, straight at the library.

Sizes that break its tiles, keys split over tasks, rows longer than the cache, every result and
every gradient of attlas.h, any strides, and the promise that bits depend on nothing else. What is
not marked slow is the reduced suite, which runs for each instruction set and under sanitizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int32, c_int64, c_void_p, cast
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attlas import masks
from attlas.kernels.native import library

from .helpers import NATIVE, qkv, same
from .native_calls import FORWARD, HOOKS, READS, Problem, agree, check, cotangents

pytestmark = [*NATIVE.marks, pytest.mark.numeric, pytest.mark.usefixtures("poison")]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LENGTHS = (1, 5, 6, 7, 63, 64, 65, 111, 257, 511, 513)
HEAD_SIZES = (1, 3, 16, 64, 65, 128, 200)


def everything(queries: int, keys: int) -> dict:
    """Intervals, a dense mask, bias, softcap, sinks and a scale at once."""
    lengths = torch.tensor([keys, keys // 2 + 1])
    holes = torch.where(torch.rand(1, 4, queries, keys) > 0.8, -math.inf, torch.randn(queries, 1))
    return {
        "masks": [
            masks.sliding_window(keys // 2, 9, "lower_right"),
            masks.padding(lengths),
            masks.from_tensor(torch.rand(2, 1, queries, keys) > 0.3),
        ],
        "bias": holes,
        "softcap": 2.0,
        "sinks": torch.randn(4),
        "scale": 0.4,
    }


OPTIONS: dict[str, Callable[[int, int], dict]] = {
    "plain": lambda L, S: {},
    "causal": lambda L, S: {"masks": [masks.causal()]},
    "lower right": lambda L, S: {"masks": [masks.causal("lower_right")]},
    "window": lambda L, S: {"masks": [masks.sliding_window(5, 4)]},
    "padding": lambda L, S: {"masks": [masks.padding(torch.tensor([S // 3, 0]))]},
    "left padding": lambda L, S: {"masks": [masks.from_tensor(torch.arange(S) >= S // 3)]},
    "pairs": lambda L, S: {"masks": [masks.from_tensor(torch.rand(2, 4, L, S) > 0.6)]},
    "softcap": lambda L, S: {"softcap": 1.5},
    "bias": lambda L, S: {"bias": torch.randn(1, 4, L, S)},
    "bias of each query": lambda L, S: {"bias": torch.randn(2, 1, L, 1)},
    "high sinks": lambda L, S: {"sinks": torch.full((4,), 9.0)},
    "everything": everything,
}


def make(queries: int, keys: int, option: str = "plain", *, group: int = 2, **sizes) -> Problem:
    """A problem of 2 batch items and 4 heads with an option."""
    torch.manual_seed(0)
    options = OPTIONS[option](queries, keys)
    tensors = qkv(2, 4, queries, keys, kv_heads=4 // group, **{"dtype": torch.float32} | sizes)
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].to(wide)
    return Problem.of(*tensors, **options)


# --- results ----------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [*pairwise(LENGTHS), (513, 1), (64, 7)])
def test_sizes_that_break_tiles(queries, keys):
    check(make(queries, keys, size=19, value_size=33).item(1))


@pytest.mark.parametrize("length", LENGTHS)
def test_sizes_that_break_masked_tiles(length):
    check(make(length, length, "lower right", size=19, value_size=33).item(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "value_size"),
    [*zip(HEAD_SIZES, HEAD_SIZES, strict=True), *pairwise(HEAD_SIZES), *pairwise(HEAD_SIZES[::-1])],
)
def test_head_sizes(size, value_size, dtype):
    check(make(37, 45, "everything", size=size, value_size=value_size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_result_of_every_option(option, dtype):
    check(make(65, 111, option, size=24, value_size=40, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["mask", "bias"])
@pytest.mark.parametrize("pattern", ["blocks", "band", "triangle", "documents"])
def test_holes_of_dense_masks(pattern, how, dtype):
    queries, keys = 70, 700
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    allowed = {
        "blocks": (i // 24 + j // 64) % 3 == 0,  # holes between what is allowed
        "band": (j - 9 * i).abs() < 70,
        "triangle": j <= i + 300,
        "documents": i // 20 == j // 190,
    }[pattern]
    allowed[33] = False
    tensors = qkv(1, 2, queries, keys, 24, dtype=dtype)
    if how == "mask":
        unseen = ~allowed.any(0)
        tensors[1][:, :, unseen] = tensors[2][:, :, unseen] = math.nan
        check(Problem.of(*tensors, masks=[masks.from_tensor(allowed)]))
    else:
        check(Problem.of(*tensors, bias=torch.where(allowed, 0.1, -math.inf)[None, None].to(dtype)))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("option", ["causal", "everything"])
def test_each_gradient_alone(option, hook):
    problem = make(21, 70, option)
    gradients = {hook: cotangents(problem)[hook]}
    found, expected = problem.backward(gradients), problem.expected(gradients)
    bounds = problem.bounds(gradients)
    for name, result in found.items():
        assert (result - expected[name]).abs().max() <= bounds[name], name


@pytest.mark.parametrize(
    ("queries", "option"),  # 2 rows for each query: 8 are read where they lie, 10 and 64 packed
    [
        *((1, option) for option in ("plain", "lower right", "padding", "pairs", "everything")),
        *((queries, option) for queries in (4, 5) for option in ("plain", "everything")),
        (32, "everything"),
    ],
)
def test_few_queries_split_the_keys(queries, option):
    check(make(queries, 4500, option, size=24, value_size=40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 65])
def test_few_queries_of_each_dtype(size, dtype):
    check(make(2, 4099, "everything", size=size, value_size=size + 2, dtype=dtype, group=4))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("group", [1, 4])
def test_few_queries_of_each_option(option, group):
    """Keys and values are read where they lie: in one piece, and whole rows where weights are."""
    problem = make(2, 700, option, size=24, value_size=40, group=group)
    check(problem)
    expected, bounds = problem.expected(), problem.bounds()
    found = problem.forward(("output", "normaliser", "entropy"))
    del found["normaliser"]  # lse is made of it
    agree(found, expected, bounds)


@pytest.mark.parametrize("keys", [300, 4097, 5000])  # one piece, and splits
@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 4), (2, 4), (8, 1)])
@pytest.mark.parametrize("largest", [40.0, 180.0, 500.0])
def test_weights_of_few_queries_sum_to_one(largest, queries, group, keys):
    """The scores that are read are those that were summed: four roundings at any size."""
    query, key, value = make(queries, keys, size=128, group=group).inputs[:3]
    repeated = key.repeat_interleave(group, 1)
    scale = largest / float((query @ repeated.mT).abs().max())
    problem = Problem.of(query, key, value, scale=scale)
    normaliser = problem.forward(("output", "normaliser"))["normaliser"]
    ones, names = torch.ones(2, 4, keys, 1), ("wx", "received", "weights")
    read = problem.read(normaliser, (0, queries), (0, keys), names, x=ones)
    share = 4 * torch.finfo(torch.float32).eps
    again = (128 + keys / 128) * share / 4  # of the product, which sums chains of 128 in float32
    assert (read["wx"] - 1).abs().max() <= share + again
    assert (read["weights"].double().sum(-1) - 1).abs().max() <= share
    assert (read["received"].double().sum(-1) - queries).abs().max() <= queries * share
    again = problem.forward(("weights", "received"))
    assert (again["weights"].double().sum(-1) - 1).abs().max() <= share
    assert (again["received"].double().sum(-1) - queries).abs().max() <= queries * share


@pytest.mark.parametrize(
    ("dtype", "keys"),
    [(torch.float32, 33000), pytest.param(torch.float64, 17000, marks=pytest.mark.slow)],
    ids=str,
)
def test_rows_longer_than_the_cache(dtype, keys):
    problem = make(67, keys, "lower right", size=3, value_size=5, dtype=dtype, group=1)
    expected, bounds = problem.item(0).expected(), problem.item(0).bounds()
    found = problem.item(0).forward()
    for name in {"lse", *FORWARD} - {"max_key", "normaliser"}:
        assert (found[name] - expected[name]).abs().max() <= bounds[name], name
    assert all(same(problem.item(0).forward((name,))[name], found[name]) for name in FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_so_large_that_one_weight_is_all(dtype):
    problem = make(40, 80, size=16, dtype=dtype)
    query, key, *rest = problem.inputs
    check(Problem.of(query * 30, key * 30, *rest))


# --- strides ----------------------------------------------------------------------------


def like(tensor: Tensor, how: str) -> Tensor:
    """The values of a 4-D tensor in another place: strided, shifted, of another order."""
    match how:
        case "rows of heads":  # [B, L, H, E], as a projection gives it
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        case "columns":
            return tensor.mT.contiguous().mT
        case "batch last":
            return tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        case "every second":
            room = tensor.new_full((*tensor.shape[:3], 2 * tensor.shape[3] + 1), math.nan)
            room[..., 1::2] = tensor
            return room[..., 1::2]
        case _:  # "a slice": an odd offset, and rows that are longer than those that are read
            room = tensor.new_full([n + 3 for n in tensor.shape], math.nan)
            inner = room[1:-2, 2:-1, 1:-2, 3:]
            return inner.copy_(tensor)


PLACES = ["rows of heads", "columns", "batch last", "every second", "a slice"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [70, 4200])  # packed, and read where they lie
@pytest.mark.parametrize("how", PLACES)
def test_strides_do_not_change_a_bit(how, keys, dtype):
    problem = make(3, keys, "everything", size=17, value_size=23, dtype=dtype)
    query, key, value, bias, sinks = problem.inputs
    moved = [like(t, how) for t in (query, key, value)]
    assert not any(t.is_contiguous() for t in moved)
    *rest, pairs = problem.spec.masks
    places = {"scale": problem.spec.scale, "softcap": problem.spec.softcap, "sinks": sinks}
    pairs = masks.from_tensor(like(pairs.tensor.float(), how).bool())
    other = Problem.of(*moved, like(bias, how), masks=[*rest, pairs], **places)
    gradients = cotangents(problem)
    there = {n: like(g, how) if g.ndim == 4 else g.mT.contiguous().mT for n, g in gradients.items()}
    a, b = problem.forward(), other.forward()
    assert all(same(a[name], b[name]) for name in FORWARD)
    a, b = problem.backward(gradients), other.backward(there)
    assert all(same(a[name], b[name]) for name in a)


def test_expanded_inputs_are_not_copied_and_do_not_change_a_bit():
    query, key, value = qkv(1, 1, 30, 40, 16, dtype=torch.float32)
    wide = [t.expand(3, 4, -1, -1) for t in (query, key, value)]
    bias = torch.randn(1, 1, 1, 40)
    a = Problem.of(*wide, bias).forward()
    b = Problem.of(*(t.clone() for t in wide), bias.expand(3, 4, 30, 40).clone()).forward()
    assert all(same(a[name], b[name]) for name in FORWARD)
    row = key[:, :, :1].expand(-1, -1, 40, -1)  # every key is one key: a stride of 0
    a, b = Problem.of(query, row, value).forward(), Problem.of(query, row.clone(), value).forward()
    assert all(same(a[name], b[name]) for name in FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(33, 65), pytest.param(700, 1100, marks=pytest.mark.slow)],  # and past the caches
)
def test_results_in_a_larger_tensor_leave_the_rest_alone(queries, keys, dtype):
    problem = make(queries, keys, "causal", dtype=dtype)
    plain = problem.forward()
    room, whole = {}, {}
    for name in ("output", "weights"):
        shape = plain[name].shape
        whole[name] = torch.full([n + 5 for n in shape], 77.0, dtype=dtype)
        room[name] = whole[name][2:-3, 1:-4, 4:-1, 3:-2]
    found = problem.forward(room=room)
    assert all(same(found[name], plain[name]) for name in FORWARD)
    for name, tensor in room.items():
        tensor.fill_(77.0)
        assert (whole[name] == 77.0).all(), name


# --- bits -------------------------------------------------------------------------------


def all_bits(problem: Problem) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = problem.forward()
    shape = problem.spec.shape
    rows = (shape.batch, shape.heads, shape.queries)
    x, y = torch.ones(*rows[:2], shape.keys, 3), torch.ones(*rows, 3)
    extra = {"x": x, "y": y, "row_weight": torch.ones(rows)}
    read = problem.read(found["normaliser"], (0, shape.queries), (0, shape.keys), **extra)
    gradients = {n: torch.ones_like(g) for n, g in cotangents(problem).items()}
    return found | problem.backward(gradients) | {f"read {n}": t for n, t in read.items()}


@pytest.fixture
def two_threads():
    """One thread more than the other tests have."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# Tasks by rows, by splits of keys, in runs, and of few rows. The reduced suite leaves them out:
# they are large.
SHARED = [(300, 1100), (2, 9001), (1100, 130), (2, 900)]


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), SHARED)
@pytest.mark.parametrize("option", ["plain", "lower right", "everything"])
def test_bits_do_not_depend_on_threads(option, queries, keys, two_threads):
    problem = make(queries, keys, option)
    two = all_bits(problem)
    torch.set_num_threads(1)
    one = all_bits(problem)
    assert [n for n in one if not same(one[n], two[n])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), SHARED)
@pytest.mark.parametrize("option", ["plain", "lower right", "bias"])
def test_bits_do_not_depend_on_the_batch(option, queries, keys):
    problem = make(queries, keys, option)
    whole, alone = all_bits(problem), all_bits(problem.item(1))
    assert [n for n in whole if n != "dsinks" and not same(whole[n][1:], alone[n])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), SHARED)
def test_bits_do_not_depend_on_what_else_is_asked(queries, keys):
    problem = make(queries, keys, "everything")
    whole = problem.forward()
    for names in [
        *((name,) for name in FORWARD),
        ("output", "normaliser"),
        ("normaliser", "received"),
    ]:
        found = problem.forward(names)
        assert [n for n in names if not same(found[n], whole[n])] == [], names
    rows, columns = (0, queries), (0, keys)
    sums = {"x": torch.ones(2, 4, keys, 3), "y": torch.ones(2, 4, queries, 3)}
    every = problem.read(whole["normaliser"], rows, columns, **sums)
    for name in READS:
        assert same(
            problem.read(whole["normaliser"], rows, columns, (name,), **sums)[name], every[name]
        )


def rows_of(problem: Problem, rows: slice) -> Problem:
    """Some queries of a problem whose only mask is a tensor."""
    query, key, value, bias, sinks = problem.inputs
    spec, bias = problem.spec, bias if bias is None else bias[:, :, rows]
    rules = [masks.from_tensor(mask.tensor[..., rows, :]) for mask in spec.masks]
    options = {"masks": rules, "scale": spec.scale, "softcap": spec.softcap}
    return Problem.of(query[:, :, rows], key, value, bias, sinks, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [300, 4097, 5000])  # one piece, and splits
@pytest.mark.parametrize(("size", "option"), [(24, "plain"), (65, "everything"), (128, "pairs")])
def test_bits_of_few_queries_are_those_among_many(option, size, keys, dtype):
    many = make(64, keys, option, size=size, value_size=size + 3, dtype=dtype, group=1)
    many.inputs.value[:, :, keys // 2, 2] = math.inf  # to be added to the rows that attend to it
    if option == "everything":
        rules = replace(many.spec, masks=many.spec.masks[-1:])
        many = Problem(rules, many.inputs)
    names = [name for name in FORWARD if name != "received"]
    expected = many.forward(names)
    for rows in (slice(0, 1), slice(40, 45), slice(56, 64)):
        few = rows_of(many, rows)
        found = few.forward(names) | few.forward(("output", "normaliser"))
        assert [n for n in names if not same(found[n], expected[n][:, :, rows])] == [], rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bits_of_a_tile_do_not_depend_on_threads(dtype, two_threads):
    """Small. The keys of a task depend on the threads; those of the first begin within a vector."""
    problem = make(60, 1030, dtype=dtype).item(0)
    normaliser, weight = (
        problem.forward(("normaliser",))["normaliser"],
        torch.randn(1, 4, 60, dtype=dtype),
    )
    tile = {"rows": (0, 60), "keys": (5, 1029), "y": weight[..., None], "row_weight": weight}
    names = ("received", "received_max", "wty")
    two = problem.read(normaliser, names=names, **tile)
    torch.set_num_threads(1)
    one = problem.read(normaliser, names=names, **tile)
    assert [n for n in one if not same(one[n], two[n])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bits_of_a_wide_cell_do_not_depend_on_threads(dtype, two_threads):
    """Small. A cell of several chunks of keys, and of more rows than a task would score at once."""
    problem = make(60, 1030, dtype=dtype).item(0)
    normaliser = problem.forward(("normaliser",))["normaliser"]
    cell = {"rows": (0, 60), "keys": (0, 1030), "names": ("pool_mass",), "cell": (60, 1030)}
    two = problem.read(normaliser, **cell)["pool_mass"]
    torch.set_num_threads(1)
    assert same(problem.read(normaliser, **cell)["pool_mass"], two)


def test_what_a_pool_of_threads_leaves_is_done_all_the_same(two_threads):
    problem = make(70, 600)
    expected, call, out = problem.forward(("output",))["output"], problem.call(), library.Forward()
    output = call.write(out, "output")
    calls = []

    @CFUNCTYPE(c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p)
    def refuse(*arguments):  # as torch_parallel_for answers where it has no threads
        calls.append(arguments)
        return 1

    call.problem.parallel_for = cast(refuse, c_void_p).value
    call.run("forward", out)
    assert calls
    assert same(output, expected)


def test_bits_of_bf16_depend_on_nothing_else():
    """Small, for the reduced suite: scores of bf16 may be summed by an instruction of their own."""
    problem = make(50, 600, "lower right", size=17, value_size=23, dtype=torch.bfloat16)
    whole, alone = all_bits(problem), all_bits(problem.item(1))
    assert [n for n in whole if n != "dsinks" and not same(whole[n][1:], alone[n])] == []
    assert all(same(problem.forward((name,))[name], whole[name]) for name in FORWARD)


def test_scores_of_bf16_are_summed_by_pairs_where_the_library_says_so():
    """2^24 + 1 rounds to 2^24: 0 where the second of a pair is added first, and 1 in order."""
    key = torch.tensor([1.0, 2.0**24, -(2.0**24), 1.0]).bfloat16().view(1, 1, 1, 4)
    problem = Problem.of(torch.ones_like(key), key, torch.ones_like(key), scale=1.0)
    pairs = "bf16" in library.load()[0].attlas_isa().decode()
    found = problem.forward()
    normaliser = found["normaliser"]
    assert found["lse"].item() == (0.0 if pairs else 1.0)
    read = problem.read(normaliser, (0, 1), (0, 1), ("max_value",))
    assert read["max_value"].item() == 1.0  # the readouts sum as the forward does


# --- what is masked is never read -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [90, 4200])
@pytest.mark.parametrize("by", ["interval", "pairs", "bias"])
@pytest.mark.parametrize("evil", [math.nan, math.inf])
def test_what_is_masked_reaches_nothing(evil, by, keys, dtype):
    query, key, value = qkv(2, 2, 9, keys, 12, dtype=dtype)
    allowed = (torch.arange(keys) < keys - 30).expand(9, keys).clone()
    allowed[8] = False
    rule = masks.from_function(lambda b, h, i, j: (j < keys - 30) & (i < 8))
    options = {
        "interval": {"masks": [masks.padding(torch.tensor([keys - 30])), rule]},
        "pairs": {"masks": [masks.from_tensor(allowed)]},
        "bias": {"bias": torch.where(allowed, 0.0, -math.inf)[None, None]},
    }[by]
    clean = Problem.of(query, key, value, **options)
    gradients = cotangents(clean)
    before = clean.forward() | clean.backward(gradients)
    bad = [t.clone() for t in (query, key, value)]
    bad[0][:, :, 8], bad[1][:, :, -30:], bad[2][:, :, -30:] = evil, evil, evil
    gradients["output"][:, :, 8] = gradients["weights"][:, :, 8] = evil
    gradients["weights"][..., -30:] = evil
    dirty = Problem.of(*bad, **options)
    after = dirty.forward() | dirty.backward(gradients)
    assert [n for n in before if not same(before[n], after[n])] == []


# --- halves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("size", [5, 16, 21])
def test_subnormal_halves_are_read_alike_at_every_place(size, flush):
    value = torch.tensor([2.0**-24, 2.0**-20, -(2.0**-15), 2.0**-14, 1.5]).half()
    value = value[:, None].expand(5, size)[None, None].contiguous()
    query, key = (
        torch.full((1, 1, 5, size), 64.0).half(),
        torch.full((1, 1, 5, size), 2.0**-22).half(),
    )
    allowed = masks.from_tensor(torch.eye(5).bool())
    torch.set_flush_denormal(flush)
    try:
        problem = Problem.of(query, key, value, masks=[allowed], scale=1.0)
        found = problem.forward(("output", "normaliser"))
    finally:
        torch.set_flush_denormal(False)
    assert found["output"].equal(value)
    assert (found["lse"] == size * 2.0**-16).all()


# --- NaN is never lost ------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [1, 0x1FF, -1], ids=["1", "1ff", "all ones"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [64, 4200])
def test_a_key_of_nan_is_seen_whatever_its_payload(keys, dtype, payload):
    query, key, value = qkv(1, 2, 9, keys, 16, dtype=dtype)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.tensor([math.nan], dtype=dtype).view(integer) | payload
    key.view(integer)[:, 1, 3, 5] = bits
    problem = Problem.of(query, key, value)
    found = problem.forward() | problem.backward(cotangents(problem))
    read = ("weights", "entropy", "received")
    tile = problem.read(found["normaliser"], (0, 9), (0, keys), read)
    found |= {f"read {n}": t for n, t in tile.items()}
    names = ("output", "weights", "lse", "entropy", "received", "dq", "dk", "dv", "read weights")
    for name in (*names, "read entropy", "read received"):
        assert found[name][:, 1].isnan().all(), name
        assert found[name][:, 0].isfinite().all(), name


@pytest.mark.parametrize("keys", [300, 5000])
@pytest.mark.parametrize("loud", [1e4, 1e5])
def test_weights_of_scores_past_all_digits_are_not_garbage(loud, keys):
    query, key, value = (t * loud for t in qkv(1, 2, 4, keys, 64, dtype=torch.float32))
    problem = Problem.of(query, key, value)
    found, names = problem.forward(("weights", "normaliser")), ("weights", "received", "max_value")
    read = problem.read(found["normaliser"], (0, 4), (0, keys), names)
    for result in (found["weights"], *read.values()):
        assert (result >= 0).all()
    for result in (found["weights"], read["weights"], read["max_value"]):
        assert (result <= 1).all()


# --- scores near the lowest float, which other masks add -----------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(9, 1100), (3, 8300)])  # chunks, and splits
def test_the_lowest_bias_beside_other_keys_is_as_good_as_a_mask(queries, keys, dtype):
    tensors = qkv(1, 2, queries, keys, 12, dtype=dtype)
    found = []
    for low in (torch.finfo(dtype).min, -math.inf):
        bias = torch.zeros(1, 1, 1, keys, dtype=dtype)
        bias[..., : keys // 2 + 9] = low
        problem = Problem.of(*tensors, bias)
        torch.manual_seed(1)
        found.append(problem.forward() | problem.backward(cotangents(problem)))
    low, masked = found
    assert [name for name in low if not same(low[name], masked[name])] == []
    assert masked["entropy"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_lowest_bias_everywhere_leaves_all_to_the_sink(dtype):
    bias = torch.full((1, 1, 1, 30), torch.finfo(dtype).min, dtype=dtype)
    sinks = torch.randn(2, dtype=dtype)
    problem = Problem.of(*qkv(1, 2, 7, 30, 12, dtype=dtype), bias, sinks)
    found = problem.forward() | problem.backward(cotangents(problem))
    assert same(found["lse"], sinks[None, :, None].expand(1, 2, 7))
    assert all((found[name] == 0).all() for name in ("output", "weights", "entropy", "dq", "dv"))
    assert found["dsinks"].isfinite().all()


def test_the_library_was_compiled_for_its_instructions():
    loaded, isa = library.load()
    assert loaded.attlas_isa().decode().split()[0] == isa
