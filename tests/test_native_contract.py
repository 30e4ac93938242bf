"""What the library may be given: sizes, strides and memory that would lead it astray."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import attlas
from attlas import masks, statistics
from attlas.kernels import native as kernel
from attlas.kernels.native import contract, library
from attlas.spec import Inputs

from .helpers import IMPLS, NATIVE, plain, qkv, same
from .native_calls import FORWARD, Problem, agree, cotangents

pytestmark = list(NATIVE.marks)

STRUCTS = {
    "attlas_problem": library.Problem,
    "attlas_forward_out": library.Forward,
    "attlas_readout": library.Readout,
    "attlas_backward_args": library.Backward,
}


def native(*inputs: Tensor | masks.Mask, **options) -> attlas.attention:
    return attlas.attention(*inputs, **options, impl="native")


# --- the interface ----------------------------------------------------------------------


def header() -> dict[str, list[str]]:
    """The fields of each struct of attlas.h, in order."""
    text = re.sub(r"//.*", "", (Path(library.__file__).parent / "attlas.h").read_text())
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        found[name] = re.findall(r"(\w+)(?:\[\d\])?\s*[,;]", body)
    return found


def test_the_structs_are_those_of_the_header():
    fields = {name: [f[0] for f in struct._fields_] for name, struct in STRUCTS.items()}
    assert fields == header()


def test_every_pointer_has_a_layout_with_the_strides_of_its_struct():
    pointers = set()
    for struct in STRUCTS.values():
        fields = {field[0]: field[1] for field in struct._fields_}
        for name, kind in fields.items():
            if kind is ctypes.c_void_p and name != "parallel_for":
                pointers.add(name)
                strides = len(fields[f"{name}_s"]()) if f"{name}_s" in fields else 0
                before, bar, _ = contract.LAYOUT[name].partition("|")
                assert len(before.split()[1:]) * bool(bar) == strides, name
    assert pointers == set(contract.LAYOUT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"row1": 7},
        {"row0": -1},
        {"row0": 4, "row1": 3},
        {"key1": 9},
        {"key0": -1},
        {"k": 0},
        {"cell_rows": 0},
        {"cell_keys": -1},
    ],
    ids=str,
)
def test_a_tile_outside_of_the_weights_is_refused(wrong):
    inputs = qkv(1, 1, 6, 8)
    fine = {"row0": 0, "row1": 6, "key0": 0, "key1": 8, "k": 1, "cell_rows": 1, "cell_keys": 1}
    assert contract.plan(*inputs, library.Readout(**fine)).sizes["keys"] == 8
    with pytest.raises(AssertionError):
        contract.plan(*inputs, library.Readout(**fine | wrong))


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path, monkeypatch):
    name = f"libattlas_{library.load()[1]}.so"
    (tmp_path / name).write_text("not a library")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    library.load.cache_clear()
    library._warn.cache_clear()
    try:
        x = torch.randn(2, 3)
        with pytest.warns(RuntimeWarning, match="its library cannot be loaded"):
            assert attlas.attention(x, x, x).weights.impl == "blocked"
        with pytest.raises(
            NotImplementedError, match=r"its library cannot be loaded \(.*\); install"
        ):
            native(x, x, x)
    finally:
        library.load.cache_clear()


# --- sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["max", "mass"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_cell_larger_than_the_matrix_is_all_of_it(impl, how):
    q, k, v = qkv(1, 2, 5, 6)
    weights = attlas.attention(q, k, v, impl=impl).weights
    for cell in (7, 1 << 31, (1 << 63) - 1, (1 << 64) + 1):  # the last is 1 in 64 bits
        assert same(weights.pool(cell, how), weights.pool((5, 6), how))


def test_queries_beyond_the_last_are_refused():
    weights = native(*qkv(1, 2, 5, 6)).weights
    for wrong in (slice(0, 6), slice(-1, 3), slice(4, 2)):
        with pytest.raises(ValueError, match=r"queries must lie within the 5 queries, got slice"):
            weights.evaluate(statistics.Received(wrong))
    assert weights.evaluate(statistics.Received(slice(5, 5))).eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_share_of_the_queries_with_weights_of_their_own(impl):
    weights = attlas.attention(*qkv(1, 2, 5, 6), impl=impl).weights
    shares = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = (weights.to_dense() * shares[..., None])[..., 1:4, :].sum(-2)
    found = weights.evaluate(statistics.Received(slice(1, 4), shares))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("k", [0, 5, 9, 70])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_top_of_fewer_keys_than_asked(impl, k):
    weights = attlas.attention(*qkv(1, 2, 5, 6), is_causal=True, impl=impl).weights
    values, keys = weights.evaluate(statistics.TopK(k))
    assert values.shape == keys.shape == (1, 2, 5, k)
    assert (keys[0, 0, 1, 2:] == -1).all()
    assert (values[0, 0, 1, 2:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_values_of_no_size(impl):
    q, k, v = qkv(2, 2, 5, 6, value_size=0, grad=True)
    output, weights = attlas.attention(q, k, v, is_causal=True, impl=impl)
    assert output.shape == (2, 2, 5, 0)
    grads = torch.autograd.grad(output.sum() + weights.logsumexp.sum(), (q, k, v))
    _, _, lse = plain(q, k, v, is_causal=True)
    for found, expected in zip(grads, torch.autograd.grad(lse.sum(), (q, k)), strict=False):
        torch.testing.assert_close(found, expected)
    assert grads[2].shape == v.shape


@pytest.mark.parametrize("keys", [1 << 44, 1 << 57])  # too much memory, and too much for 64 bits
@pytest.mark.parametrize("queries", [1, 100])
def test_a_workspace_that_cannot_be_had_is_an_error(queries, keys):
    query = torch.randn(1, 1, queries, 32)
    key = torch.randn(1, 1, 1, 32).expand(1, 1, keys, 32)
    with pytest.raises(MemoryError, match="workspace must fit into memory, got no memory for it;"):
        native(query, key, key)


# --- memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["query", "key", "value", "bias", "sinks", "mask"])
def test_a_tensor_without_memory_is_refused(which):
    inputs = dict(zip(("query", "key", "value"), qkv(1, 2, 5, 6), strict=True))
    options = {"bias": torch.randn(1, 2, 5, 6), "sinks": torch.randn(2)}
    if which == "mask":  # without one the inputs are not looked at for NaN
        options = {"mask": torch.rand(1, 2, 5, 6) > 0.5}
    given = inputs | options
    given[which].untyped_storage().resize_(0)  # as those do who shard parameters
    with pytest.raises(ValueError, match=r"must lie in memory, got a Tensor of none; it was freed"):
        native(**given)


def test_a_fake_tensor_gives_fake_results_and_never_reaches_the_library():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(2, 3))
        output, weights = attlas.attention(x, x, x, impl="native")
        assert type(output) is type(weights.entropy()) is type(x)
        assert output.shape == (2, 3)
    spec = attlas.attention(*[torch.randn(2, 3)] * 3).weights.spec
    with (
        pytest.warns(UserWarning, match="data pointer of FakeTensor"),
        pytest.raises(ValueError, match="must lie in memory, got a FakeTensor of none"),
    ):
        kernel.forward(spec, Inputs(*[x[None, None]] * 3, None, None))


def test_a_mask_that_lies_elsewhere_is_never_left_out():
    x = torch.randn(5, 4)
    mask = masks.from_tensor(torch.ones(5, 5, dtype=torch.bool, device="meta"))
    with pytest.raises(NotImplementedError, match="meta tensor"):
        native(x, x, x, mask)


def test_bounds_of_another_dtype_are_converted():
    class Rule(masks.Mask):
        def allowed(self, at: masks.Positions) -> Tensor:
            return at.k <= at.q

        def bounds(self, shape):
            own = torch.arange(shape.queries, dtype=torch.int32).view(1, 1, -1)
            return masks.Bounds(own * 0, own + 1, True)

    q, k, v = qkv(1, 2, 5, 5)
    assert same(native(q, k, v, Rule()).output, native(q, k, v, is_causal=True).output)


def test_a_view_that_negates_is_resolved():
    parts = torch.randn(3, 1, 2, 6, 1, dtype=torch.complex64).conj().imag
    assert parts.is_neg()
    plain = parts.resolve_neg()
    assert same(native(*parts).output, native(*plain).output)
    bias = torch.randn(6, 6, 1, dtype=torch.complex64).conj().imag[..., 0]
    found, expected = (native(*plain, bias=b).output for b in (bias, bias.resolve_neg()))
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_addresses_between_two_elements(dtype):
    inputs = qkv(1, 2, 5, 5, size=17, dtype=dtype)
    moved = []
    for tensor in inputs:
        raw = bytearray(tensor.nbytes + 1)
        raw[1:] = tensor.view(torch.uint8).flatten().tolist()
        there = torch.frombuffer(raw, dtype=dtype, offset=1, count=tensor.numel())
        moved.append(there.view_as(tensor))
    assert same(native(*moved).output, native(*inputs).output)


# --- beyond 2^31 elements ---------------------------------------------------------------


def spread(tensor: Tensor, dim: int) -> Tensor:
    """The values in memory of which most is never touched, 2^33 elements from first to last."""
    step = (1 << 33) // (tensor.shape[dim] - 1)  # 2^31 at least, for 5 or fewer
    strides = [step if d == dim else tensor.stride(d) for d in range(tensor.ndim)]
    count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name since Python 3.11
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    room = torch.frombuffer(mmap.mmap(-1, count * tensor.itemsize, flags), dtype=tensor.dtype)
    there = room.as_strided(tensor.shape, strides)
    return there.copy_(tensor)


@pytest.mark.parametrize("keys", [5, 4100])  # packed, and read where they lie
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits(dim, keys):
    query, key, value = qkv(2, 2, 5, keys, 9, dtype=torch.bfloat16)
    bias, pairs = torch.randn(2, 2, 5, keys), torch.rand(2, 2, 5, keys) > 0.3
    near = Problem.of(query, key, value, bias, masks=[masks.from_tensor(pairs)])
    wide = [spread(t, dim) for t in (query, key, value)]
    mask = masks.from_tensor(spread(pairs, dim))
    far = Problem.of(*wide, spread(bias, 3 if dim == 2 else dim), masks=[mask])
    assert all(t.stride(dim) * (t.shape[dim] - 1) > 1 << 32 for t in wide)
    expected, room = near.forward(), {}
    for name in ("output", "weights"):
        room[name] = spread(torch.full_like(expected[name], math.nan), dim)
    found = far.forward(room=room)
    assert [n for n in FORWARD if not same(found[n], expected[n])] == []
    gradients = cotangents(near)
    there = {n: spread(g, dim) if g.ndim == 4 else g for n, g in gradients.items()}
    expected, found = near.backward(gradients), far.backward(there)
    assert [n for n in expected if not same(found[n], expected[n])] == []


def test_more_than_2_to_the_32_pairs():
    length, last, width = 66000, 130, 20
    query, key, value = qkv(1, 1, length, length, 4, dtype=torch.float32)
    whole = Problem.of(query, key, value, masks=[masks.sliding_window(width, 0)])
    inputs = (query[:, :, -last:], key[:, :, -last - width :], value[:, :, -last - width :])
    end = Problem.of(*inputs, masks=[masks.sliding_window(width, 0, "lower_right")])
    names = ("output", "normaliser", "entropy", "max_value", "received")
    gradients = {"output": torch.randn(1, 1, length, 4)}
    found = whole.forward(names) | whole.backward(gradients)
    del found["normaliser"]
    gradients = {"output": gradients["output"][:, :, -last:]}
    expected, bounds = end.expected(gradients), end.bounds(gradients)
    found = {n: t[:, :, -last:] for n, t in found.items()}
    agree(found, {n: expected[n][:, :, -last:] for n in found}, bounds)
