"""Every implementation, option and dtype against the float64 reference, with derived tolerances.

    |attlas - oracle|  <=  2 · |plain PyTorch - oracle| + one rounding

The plain computation (`helpers.plain`, a few eager lines) runs in the dtype of the inputs, once
for each of three orders of keys and features, because its error in one order may be 0 by luck.
lse and statistics are float32 (float64) whatever the inputs are, so for them it runs in float32.
The oracle is float64; the error of plain float64 is that of plain float32, scaled by the ratio of
the two roundings.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import fused, masks, spec, statistics
from attlas.kernels import blocked

from .helpers import dense_statistics, gap, plain, qkv, rounding, same, statistics_of

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

    def attlas(self, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = self._leaves(dtype)
        output, weights = attlas.attention(**leaves, **self.options, impl=impl)
        lse = weights.logsumexp
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = statistics_of(weights, self.x.to(wide), self.y.to(wide))
        return {"output": output, "lse": lse, **found, **self._gradients(output, lse, leaves)}

    def plain(self, dtype: torch.dtype, order: int) -> dict[str, Tensor]:
        """Eager PyTorch; `order` permutes keys and features, which changes nothing but roundings."""
        leaves = self._leaves(dtype)
        keys, size = leaves["key"].shape[2:]
        j, e = torch.arange(keys), torch.arange(size)
        if order:
            j, e = torch.randperm(keys), torch.randperm(size)
        back = j.argsort()
        options = {n: v for n, v in self.options.items() if n not in BAND + ("mask",)}
        allowed = self._allowed(keys)
        bias = leaves.get("bias")
        output, weights, lse = plain(
            leaves["query"][..., e],
            leaves["key"][:, :, j][..., e],
            leaves["value"][:, :, j],
            allowed[..., j],
            **options,
            bias=bias if bias is None or bias.shape[-1] == 1 else bias[..., j],
            sinks=leaves.get("sinks"),
        )
        weights = weights[..., back]
        found = dense_statistics(
            weights.detach(),
            lse,
            leaves.get("sinks"),
            self.x.to(dtype),
            self.y.to(dtype),
            self.offset,
        )
        return {"output": output, "lse": lse, **found, **self._gradients(output, lse, leaves)}

    def _leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.detach().to(dtype).requires_grad_() for n, t in self.tensors.items()}

    def _allowed(self, keys: int) -> Tensor:
        """Every mask of the call as one bool matrix, by the reference."""
        q = self.tensors["query"].float()
        k = self.tensors["key"].float()
        options = {n: v for n, v in self.options.items() if n in (*BAND, "mask", "enable_gqa")}
        return attlas.attention(q, k, k, **options, impl="reference").weights.to_dense() > 0

    def _gradients(self, output: Tensor, lse: Tensor, leaves: dict) -> dict[str, Tensor]:
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        up = [self.up.to(output.dtype), self.up_lse.to(lse.dtype)]
        grads = torch.autograd.grad([output, seen], list(leaves.values()), up)
        return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def tolerances(self, oracle: dict[str, Tensor]) -> dict[str, float]:
        """2 x the error of plain PyTorch, and one rounding, for each result."""
        narrow = torch.float32 if self.dtype == torch.float64 else self.dtype
        ratio = torch.finfo(self.dtype).eps / torch.finfo(narrow).eps
        runs = {d: [self.plain(d, o) for o in range(3)] for d in {narrow, torch.float32}}
        bounds = {}
        for name, expected in oracle.items():
            own = name == "output" or name.startswith("d")
            result = self.dtype if own or name in ("to_dense", "row") else self.wide
            errors = [gap(run[name], expected) for run in runs[narrow if own else torch.float32]]
            bounds[name] = 2 * ratio * max(errors) + rounding(result, expected)
        return bounds


BAND = ("is_causal", "causal_alignment", "window_size")


def check(case: dict, dtype: torch.dtype, impl: str) -> None:
    problem = Problem(case, dtype)
    oracle = problem.attlas("reference", torch.float64)
    bounds = problem.tolerances(oracle)
    results = problem.attlas(impl, dtype)
    errors = {name: gap(results[name], oracle[name]) for name in oracle}
    assert not [f"{n}: {e:.2g} > {bounds[n]:.2g}" for n, e in errors.items() if not e <= bounds[n]]
    for name in ("lse", "entropy", "received sum", "mass"):
        assert results[name].dtype == problem.wide


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_blocked_equals_the_oracle(case, dtype, small, request, poison):
    if small:
        request.getfixturevalue("small_blocks")
    check(CASES[case], dtype, "blocked")
