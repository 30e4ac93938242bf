"""`verify` passes what is right, and sees what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attlas
from attlas import masks

from .helpers import IMPLS, Watch, qkv

pytestmark = pytest.mark.numeric

SINKS, BIAS = torch.ones(4), torch.randn(4, 1, 30)[None]
CASES = {
    "plain": {},
    "causal": {"is_causal": True, "causal_alignment": "lower_right"},
    "window": {"window_size": (4, 2)},
    "rules": {"mask": masks.padding(torch.tensor([30, 0])) & masks.prefix(20)},
    "a mask tensor": {"mask": torch.rand(2, 4, 20, 30) > 0.5},
    "grouped, softcap": {"softcap": 3.0, "enable_gqa": True},
    "sharp": {"scale": 2.0},
    "bias, sinks": {"bias": BIAS, "sinks": SINKS},
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def inputs(case: str, dtype: torch.dtype):
    options = {
        name: value.to(dtype) if name in ("bias", "sinks") else value
        for name, value in CASES[case].items()
    }
    kv_heads = 2 if "enable_gqa" in options else 4
    return qkv(2, 4, 20, 30, size=16, value_size=9, kv_heads=kv_heads, dtype=dtype), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_each_implementation_passes(impl, case, dtype):
    tensors, options = inputs(case, dtype)
    report = attlas.verify(*tensors, **options, impl=impl)
    assert report.passed, report
    assert set(report.errors) == {"output", "logsumexp", "weights"}
    assert report.errors["output"].absolute > 0, "it compared something"


@pytest.mark.parametrize("lead", [(), (2,), (2, 4)], ids=str)
def test_results_of_others_pass(lead):
    q, k, v = torch.randn(3, *lead, 40, 16).unbind()
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert attlas.verify(q, k, v, output=theirs, is_causal=True).passed
    scores = (q @ k.mT / 4).masked_fill(torch.ones(40, 40).triu(1) > 0, -math.inf)
    given = {"logsumexp": scores.logsumexp(-1), "weights": scores.softmax(-1)}
    report = attlas.verify(q, k, v, is_causal=True, **given)
    assert report.passed, report
    assert set(report.errors) == {"logsumexp", "weights"}
    lazy = attlas.attention(q, k, v, is_causal=True).weights
    assert attlas.verify(q, k, v, weights=lazy, is_causal=True).passed


WRONG = {
    "causal, but one too far": (
        lambda q, k, v: attlas.attention(q, k, v, window_size=(None, 1)).output,
        {"is_causal": True},
    ),
    "no mask": (lambda q, k, v: attlas.attention(q, k, v).output, {"is_causal": True}),
    "another scale": (lambda q, k, v: attlas.attention(q, k, v, scale=0.2501).output, {}),
    "computed in bfloat16": (
        lambda q, k, v: attlas.attention(*(t.bfloat16() for t in (q, k, v))).output.float(),
        {},
    ),
    "rounded to the 13 bits of TF32": (
        lambda q, k, v: (attlas.attention(q, k, v).output * 2**10).round() / 2**10,
        {},
    ),
    "NaN": (lambda q, k, v: attlas.attention(q, k, v).output * math.nan, {}),
    "an empty row that is not 0": (
        lambda q, k, v: (
            attlas.attention(q, k, v, masks.padding(torch.tensor([0, 40]))).output + 1e-20
        ),
        {"mask": masks.padding(torch.tensor([0, 40]))},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_seen(case):
    q, k, v = torch.randn(3, 2, 4, 40, 16).unbind()
    make, options = WRONG[case]
    report = attlas.verify(q, k, v, output=make(q, k, v), **options)
    assert not report.passed, report


def test_one_wrong_row_is_found_where_it_is():
    q, k, v = torch.randn(3, 2, 2, 10, 16).unbind()
    output, weights = attlas.attention(q, k, v)
    output[1, 0, 7, 3] += 0.01
    report = attlas.verify(q, k, v, output=output, rows=10_000)
    assert report.errors["output"].at == (1, 0, 7)
    assert report.errors["output"].absolute == pytest.approx(0.01, rel=1e-3)
    assert report.rows == 2 * 2 * 10, "all of them"
    assert not report.passed
    lse, dense = weights.logsumexp.clone(), weights.to_dense()
    lse[0, 1, 9], dense[0, 0, 0, 0] = math.inf, 0.9
    report = attlas.verify(q, k, v, logsumexp=lse, weights=dense, rows=10_000)
    assert report.errors["logsumexp"].at == (0, 1, 9)
    assert report.errors["logsumexp"].units == math.inf
    assert report.errors["weights"].at == (0, 0, 0)


def test_what_is_masked_may_be_anything():
    q, k, v = torch.randn(3, 2, 2, 10, 16).unbind()
    k[:, :, 6:], v[:, :, 6:] = math.nan, math.inf
    assert attlas.verify(q, k, v, masks.padding(torch.tensor([6]))).passed


def test_the_report_reads_well():
    q, k, v = torch.randn(3, 1, 2, 10, 16).unbind()
    lines = str(attlas.verify(q, k, v, rows=5)).splitlines()
    assert lines[0] == "5 rows against float64, errors in roundings of torch.float32:"
    assert [line.split()[0] for line in lines[1:]] == ["output", "logsumexp", "weights"]
    assert all(line.endswith("passed") for line in lines[1:])
    wrong = str(attlas.verify(q, k, v, output=v, rows=5))
    assert wrong.endswith("FAILED")


def test_the_same_seed_looks_at_the_same_rows():
    q, k, v = torch.randn(3, 2, 4, 40, 16).unbind()
    reports = [attlas.verify(q, k, v, rows=9, seed=seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1] != reports[2]
    assert reports[0].rows == 9


def test_sizes_of_zero():
    q = torch.randn(1, 2, 3, 4)
    assert attlas.verify(q, q[:, :, :0], q[:, :, :0]).passed
    report = attlas.verify(q[:, :, :0], q, q)
    assert report.passed
    assert report.rows == 0


def test_no_matrix_is_held():
    q, k, v = torch.randn(3, 1, 2, 2048, 16).unbind()
    with Watch() as watch:
        attlas.verify(q, k, v, is_causal=True, rows=16)
    assert 2048 < watch.largest <= 1 << 18  # the matrices hold 1 << 23


Q = torch.randn(2, 4, 5, 8)
MESSAGES = [
    ({"output": 3}, TypeError, "output must be a tensor, got int; pass the output of the same"),
    (
        {"output": Q[..., :7]},
        ValueError,
        r"output must have the shape \[2, 4, 5, 8\], got \[2, 4, 5, 7\]; pass the output of the",
    ),
    (
        {"logsumexp": Q},
        ValueError,
        r"logsumexp must have the shape \[2, 4, 5\], got \[2, 4, 5, 8\]; pass the logsumexp",
    ),
    ({"weights": "a"}, TypeError, "weights must be a tensor, got str; pass the weights of the"),
    (
        {"output": Q.to("meta")},
        ValueError,
        "output must be on the device cpu, got meta; pass the output of the same query, key",
    ),
    ({"rows": 0}, ValueError, "rows must be at least 1, got 0; choose a value in that range"),
    ({"seed": 1.5}, TypeError, "seed must be an int at least 0, got float; pass a Python int"),
    ({"scale": "a"}, TypeError, "scale must be a finite number, got str; pass a Python float"),
]


@pytest.mark.parametrize(("options", "kind", "pattern"), MESSAGES)
def test_a_message_says_the_rule_the_value_and_the_mend(options, kind, pattern):
    with pytest.raises(kind, match=f"^{pattern}") as caught:
        attlas.verify(Q, Q, Q, **options)
    assert type(caught.value) is kind
