"""Every implementation, option and dtype against the float64 reference, with derived tolerances.

    |attlas - oracle|  <=  2 · |plain PyTorch - oracle| + one rounding

The plain computation (`helpers.plain`, a few eager lines) runs in the dtype of the inputs, once
for each of four orders of keys and features, because its error in one order may be 0 by luck.
For readouts, and for every second output and gradient, it does what the name lazy means: it
computes the scores again, with features in another order and scaled before the product, and
subtracts the lse that it kept. In half precision it runs in float32 as well, which
is what scores are there. The oracle is float64. The error of plain
float64 is that of plain float32, scaled by the ratio of the two roundings; there the oracle is
as rough as what is tested, and its error counts once more.
"""

from __future__ import annotations

from copy import copy
from functools import cache

import pytest
import torch
from torch import Tensor

import attlas
from attlas import fused, masks
from attlas.kernels import native

from .helpers import (
    KERNELS,
    NATIVE,
    dense_statistics,
    gap,
    plain,
    plain_scores,
    qkv,
    rounding,
    same,
    statistics_of,
)

pytestmark = pytest.mark.numeric

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 0.4


# Options, beside the sizes of the inputs; "bias" and "sinks" are shapes.
CASES: dict[str, dict] = {
    "plain": {},
    "L < S": {"queries": 7},
    "L > S": {"keys": 7},
    "one query": {"queries": 1},
    "one key": {"keys": 1},
    "Ev < E": {"value_size": 3},
    "Ev > E": {"value_size": 11},
    "padding mask": {"mask": random_mask(2, 1, 1, 65)},
    "pair mask": {"mask": random_mask(63, 65)},
    "pair mask for each batch item": {"mask": random_mask(2, 1, 63, 65)},
    "pair mask for each head": {"mask": random_mask(1, 4, 63, 65).float()},
    "query mask": {"mask": random_mask(63, 1).int()},
    "rule": {"mask": masks.padding(torch.tensor([50, 3])) & ~masks.sliding_window(2, 2)},
    "causal": {"is_causal": True},
    "causal, L < S": {"is_causal": True, "queries": 7},
    "causal, L > S": {"is_causal": True, "keys": 7},
    "causal lower right": {"is_causal": True, "causal_alignment": "lower_right"},
    "causal lower right, L > S": {
        "is_causal": True,
        "causal_alignment": "lower_right",
        "keys": 7,
    },
    "window": {"window_size": (3, 2)},
    "window left": {"window_size": (5, None)},
    "window right": {"window_size": (None, 4)},
    "window lower right": {"window_size": (4, 1), "causal_alignment": "lower_right", "queries": 9},
    "softcap": {"softcap": 1.3},
    "scale": {"scale": -0.41},
    "bias": {"bias": (2, 4, 63, 65)},
    "bias of each key": {"bias": (1, 1, 1, 65)},
    "bias of each query": {"bias": (2, 1, 63, 1)},
    "bias of each head": {"bias": (4, 1, 1)},
    "bias of each pair": {"bias": (63, 65)},
    "sinks": {"sinks": True},
    "grouped heads": {"enable_gqa": True, "kv_heads": 2},
    "one key head": {"enable_gqa": True, "kv_heads": 1},
    "causal, padding mask": {"is_causal": True, "mask": random_mask(2, 1, 1, 65)},
    "all": {
        "mask": random_mask(2, 1, 1, 65),
        "bias": (1, 4, 63, 65),
        "is_causal": True,
        "causal_alignment": "lower_right",
        "window_size": (30, 10),
        "softcap": 2.1,
        "sinks": True,
        "scale": 0.3,
        "enable_gqa": True,
        "kv_heads": 2,
        "value_size": 9,
    },
    "all but softcap": {
        "mask": random_mask(63, 65),
        "bias": (4, 63, 1),
        "window_size": (30, 10),
        "sinks": True,
        "scale": 0.3,
        "enable_gqa": True,
        "kv_heads": 2,
        "value_size": 9,
    },
}
SIZES = ("queries", "keys", "value_size", "kv_heads")


BAND = ("is_causal", "causal_alignment", "window_size")


class Problem:
    """One call: inputs in a dtype, and every result of the oracle and of plain PyTorch."""

    def __init__(self, case: dict, dtype: torch.dtype) -> None:
        sizes = {"queries": 63, "keys": 65, "size": 5, "kv_heads": 4} | {
            name: case[name] for name in SIZES if name in case
        }
        q, k, v = qkv(2, 4, dtype=dtype, **sizes)
        self.dtype, self.tensors = dtype, {"query": q, "key": k, "value": v}
        self.options = {n: v for n, v in case.items() if n not in (*SIZES, "bias", "sinks")}
        if "bias" in case:
            shape = (1,) * (4 - len(case["bias"])) + case["bias"]
            self.tensors["bias"] = torch.randn(shape).to(dtype)
        if "sinks" in case:
            self.tensors["sinks"] = torch.randn(4).to(dtype)
        self.up = torch.randn(2, 4, q.shape[2], v.shape[3]).to(dtype)
        self.up_lse = torch.randn(2, 4, q.shape[2])
        self.x, self.y = torch.randn(k.shape[2], 3), torch.randn(q.shape[2], 3)
        lower = case.get("causal_alignment") == "lower_right"
        self.offset = k.shape[2] - q.shape[2] if lower else 0
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        masking = {n: v for n, v in self.options.items() if n in (*BAND, "mask", "enable_gqa")}
        dense = attlas.attention(q.float(), k.float(), k.float(), **masking, impl="reference")
        self.allowed = dense.weights.to_dense() > 0
        self.oracle = self.attlas("reference", torch.float64)
        self.bounds = self.tolerances()

    def attlas(self, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = self._leaves(dtype)
        output, weights = attlas.attention(**leaves, **self.options, impl=impl)
        lse = weights.logsumexp
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = statistics_of(weights, self.x.to(wide), self.y.to(wide))
        return {"output": output, "lse": lse, **found, **self._gradients(output, lse, leaves)}

    def plain(self, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
        """Eager PyTorch; `order` permutes keys and features: the same, but for roundings."""
        leaves = self._leaves(dtype)
        keys, size = leaves["key"].shape[2:]
        j, e = torch.arange(keys), torch.arange(size)
        if order:
            j, e = torch.randperm(keys), torch.randperm(size)
        bias = leaves.get("bias")
        options = {n: v for n, v in self.options.items() if n not in (*BAND, "mask")}
        options["bias"] = bias if bias is None or bias.shape[-1] == 1 else bias[..., j]
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        key, value, mask = key[:, :, j], value[:, :, j], self.allowed[..., j]
        sinks = leaves.get("sinks")
        output, _, lse = plain(query[..., e], key[..., e], value, mask, sinks=sinks, **options)
        again = torch.randperm(size)
        options["scale"], factor = 1.0, options.get("scale", size**-0.5)
        scores = plain_scores(query[..., again] * factor, key[..., again], mask, **options)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        if order % 2:
            output = weights @ value.repeat_interleave(4 // value.shape[1], dim=1)
        gradients = self._gradients(output, lse, leaves)
        weights = weights[..., j.argsort()].detach()
        x, y = self.x.to(dtype), self.y.to(dtype)
        found = dense_statistics(weights, lse, sinks, x, y, self.offset)
        return {"output": output, "lse": lse, **found, **gradients}

    def _leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.detach().to(dtype).requires_grad_() for n, t in self.tensors.items()}

    def _gradients(self, output: Tensor, lse: Tensor, leaves: dict) -> dict[str, Tensor]:
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        up = [self.up.to(output.dtype), self.up_lse.to(lse.dtype)]
        grads = torch.autograd.grad([output, seen], list(leaves.values()), up)
        return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def tolerances(self) -> dict[str, float]:
        """2 x the error of plain PyTorch, and one rounding, for each result."""
        double = self.dtype == torch.float64
        narrow = torch.float32 if double else self.dtype
        factor = 3 * torch.finfo(self.dtype).eps / torch.finfo(narrow).eps if double else 2
        orders = 4 if self.allowed.numel() > 1000 else 16  # few numbers are a poor sample
        runs = [self.plain(d, order) for d in {narrow, torch.float32} for order in range(orders)]
        bounds = {
            name: factor * max(gap(run[name], expected) for run in runs)
            + rounding(self.dtype if double else narrow, expected)
            for name, expected in self.oracle.items()
        }
        bounds["row"] = bounds["to_dense"]  # the same numbers, of which it has too few to measure
        return bounds

    def check(self, impl: str) -> None:
        results = self.attlas(impl, self.dtype)
        errors = {name: gap(results[name], expected) for name, expected in self.oracle.items()}
        over = {n: (e, self.bounds[n]) for n, e in errors.items() if not e <= self.bounds[n]}
        assert not over, "\n".join(f"{n}: {e:.2g} > {b:.2g}" for n, (e, b) in over.items())
        assert results["output"].dtype == results["dquery"].dtype == self.dtype
        for name in ("lse", "entropy", "received sum", "mass", "weights.T @ y"):
            assert results[name].dtype == self.wide, name


@cache
def problem(case: str, dtype: torch.dtype, size: int | None = None) -> Problem:
    torch.manual_seed(0)
    sizes = {} if size is None else {"queries": size, "keys": size}
    return Problem(CASES[case] | sizes, dtype)


# Implementations change fastest: they share a problem.
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_implementation_equals_the_oracle(impl, case, dtype, poison):
    problem(case, dtype).check(impl)


# What is summed over blocks, and rounds: in half precision, too. Sizes and masks only choose pairs.
SUMS = ["plain", "causal", "window", "softcap", "sinks", "grouped heads", "one key head"]
SUMS += [case for case in CASES if case.startswith(("bias", "all"))]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float64) for case in CASES), *((case, torch.bfloat16) for case in SUMS)],
    ids=str,
)
def test_small_blocks_equal_the_oracle(impl, case, dtype, poison, request):
    known = problem(case, dtype)  # from large blocks
    request.getfixturevalue("small_blocks")
    known.check(impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_itself_in_float64(case, dtype):
    problem(case, dtype).check("reference")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("size", [1, 7, 65, 111, 257])
@pytest.mark.parametrize("case", ["plain", "causal", "softcap", "window", "sinks"])
def test_odd_sizes(impl, case, size, poison, request):
    known = problem(case, torch.float32, size)
    if size < 100:
        request.getfixturevalue("small_blocks")
    known.check(impl)


@pytest.mark.parametrize("case", ["plain", "all", "bias", "rule"])
@pytest.mark.parametrize("there", [False, NATIVE])
def test_auto_is_the_first_that_can(case, there, monkeypatch):
    if not there:
        monkeypatch.setattr(native, "unsupported_reason", lambda *_: "switched off by a test")
    one = problem(case, torch.float32)
    name = "native" if there else "blocked"
    auto, named = (one.attlas(impl, torch.float32) for impl in ("auto", name))
    assert all(same(auto[name], named[name]) for name in named)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_streamed_in_float32(case, monkeypatch, request):
    """attlas's own loops sum in float32: on half inputs they are as exact as plain float32."""
    monkeypatch.setattr(fused, "unsupported_reason", lambda *_: "switched off by a test")
    dtype = torch.bfloat16
    half = problem(case, dtype)
    wide = copy(half)
    wide.dtype, wide.tensors = torch.float32, {n: t.float() for n, t in half.tensors.items()}
    bounds = wide.tolerances()
    if case in SUMS:
        request.getfixturevalue("small_blocks")
    results = half.attlas("blocked", dtype)
    for name in ("lse", "entropy", "max", "mass", "received sum", "pool mass", "weights.T @ y"):
        assert gap(results[name], half.oracle[name]) <= bounds[name], name
    rounded = rounding(dtype, half.oracle["output"])
    assert gap(results["output"], half.oracle["output"]) <= bounds["output"] + rounded
