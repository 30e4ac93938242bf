"""Every message that a user can meet: its type, its rule, what was given, and the mend."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import attlas
from attlas import masks
from attlas.kernels.native import library

from .helpers import IMPLS, Watch

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 7, 8)
V = torch.randn(2, 4, 7, 6)
Q3, K3 = Q[:, 0], K[:, 0]
SPARSE = K.to_sparse()


def call(query=Q, key=K, value=V, *args, **options):
    return attlas.attention(query, key, value, *args, **options)


def taught(Q=Q3, K=K3, V=K3, mask=None):
    return attlas.scaled_dot_product_attention(Q, K, V, mask)


GRAMMAR = re.compile(r"(?s).+ must .+, got .+; .+")

# (what is done, the exception, a pattern for "<argument> must <rule>, got <value>; <mend>")
INPUTS = [
    (lambda: call("text"), TypeError, r"query must be a torch.Tensor, got str; convert it with"),
    (
        lambda: call(Q, [1.0]),
        TypeError,
        r"key must be a torch.Tensor, got list; .*as_tensor\(key\)",
    ),
    (lambda: taught(V=None), TypeError, r"V must be a torch.Tensor, got NoneType; "),
    (
        lambda: call(Q, SPARSE),
        ValueError,
        r"key must be a dense tensor, got torch.sparse_coo; convert it with key.to_dense\(\)",
    ),
    (
        lambda: call(Q.int()),
        ValueError,
        r"query must be float16.* got torch.int32; .*query.float\(\)",
    ),
    (lambda: taught(Q3.bool()), ValueError, r"Q must be .*float64, got torch.bool; .*Q.float\(\)"),
    (
        lambda: call(Q, K.double()),
        ValueError,
        r"key must have the dtype of query, torch.float32, got torch.float64; .*key.to\(query",
    ),
    (lambda: call(Q, K, V.half()), ValueError, r"value must have the dtype.*float16; .*value.to"),
    (
        lambda: call(Q, K.to("meta")),
        ValueError,
        r"key must be on the device of query, cpu, got meta; move it with key.to\(query.device\)",
    ),
    (
        lambda: call(Q, K3),
        ValueError,
        r"key must have the 4 dimensions of query, got 3 \(\[2, 7, 8",
    ),
    (
        lambda: taught(*[torch.ones(3)] * 3),
        ValueError,
        r"Q must have at least 2 .*, got \[3\]; .*unsq",
    ),
    (
        lambda: call(Q[..., :0], K[..., :0]),
        ValueError,
        r"query must have a head size E of at least 1, got \[2, 4, 5, 0\]; check its shape",
    ),
    (
        lambda: call(Q, K[..., :5]),
        ValueError,
        r"key must have the head size of query, E=8, got \[2, 4, 7, 5\]; .*check the projections",
    ),
    (
        lambda: call(Q, K, V[:, :, :3]),
        ValueError,
        r"value must have one row for each key, \[2, 4, 7\] .*got \[2, 4, 3, 6\]; .*same sequence",
    ),
    (
        lambda: call(Q, K[:, :2], V[:, :2]),
        ValueError,
        r"key must have as many heads as query, 4, got 2; pass enable_gqa=True",
    ),
    (
        lambda: call(Q, K[:, :3], V[:, :3], enable_gqa=True),
        ValueError,
        r"key must have a number of heads that divides 4, got 3; each key head serves",
    ),
    (
        lambda: call(Q, K[:, :0], V[:, :0], enable_gqa=True),
        ValueError,
        r"key must have a number of heads that divides 4, got 0; ",
    ),
    (
        lambda: call(Q, K[:1], V[:1]),
        ValueError,
        r"key must have the leading dimensions of query, \[2, 4\], got \[1, 4, 7, 8\]; expand",
    ),
    (
        lambda: taught(Q3, K3[:1], K3[:1]),
        ValueError,
        r"K must have the leading dimensions of Q, \[2\]",
    ),
    (
        lambda: call(Q[None], K[None], V[None]),
        ValueError,
        r"query must be \[B, H, L, E\].* got \[1, 2, 4, 5, 8\]; flatten the leading dimensions",
    ),
]

OPTIONS = [
    (
        lambda: call(is_causal=1),
        TypeError,
        r"is_causal must be True or False, got int; pass bool\(is_causal\)",
    ),
    (
        lambda: call(causal_alignment="left"),
        ValueError,
        r"causal_alignment must be 'upper_left' or 'lower_right', got 'left'; choose one of these",
    ),
    (
        lambda: call(softcap=0.0),
        ValueError,
        r"softcap must be a positive finite number, got 0.0; pass None for no",
    ),
    (lambda: call(softcap=-1), ValueError, r"softcap must be a positive finite number, got -1; "),
    (lambda: call(softcap="1"), TypeError, r"softcap must be a positive finite number, got str; "),
    (lambda: call(softcap=True), TypeError, r"softcap must be a positive finite number, got bool"),
    (
        lambda: call(scale=math.nan),
        ValueError,
        r"scale must be a finite number, got nan; pass None for 1 / sqrt",
    ),
    (
        lambda: call(dropout_p=1.5),
        ValueError,
        r"dropout_p must be a number from 0 to 1, got 1.5; it is the chance that a weight",
    ),
    (
        lambda: call(dropout_p="0.1"),
        TypeError,
        r"dropout_p must be a number from 0 to 1, got str; ",
    ),
    (lambda: call(scale=math.inf), ValueError, r"scale must be a finite number, got inf; "),
    (lambda: call(scale=torch.ones(())), TypeError, r"scale must be a finite number, got Tensor; "),
    (
        lambda: call(sinks=[0.0] * 4),
        TypeError,
        r"sinks must be a floating tensor, got list; .*each qu",
    ),
    (
        lambda: call(sinks=torch.ones(4).int()),
        ValueError,
        r"sinks must be a floating tensor, got torch",
    ),
    (
        lambda: call(sinks=torch.ones(3)),
        ValueError,
        r"sinks must have shape \[Hq\] = \[4\], got \[3\]; ",
    ),
    (
        lambda: call(sinks=torch.ones(4).double()),
        ValueError,
        r"sinks must not be wider than query, tor",
    ),
    (
        lambda: call(sinks=torch.ones(4).to("meta")),
        ValueError,
        r"sinks must be on the device of query",
    ),
    (
        lambda: call(bias=1.0),
        TypeError,
        r"bias must be a floating tensor, got float; .*goes in mask=",
    ),
    (
        lambda: call(bias=torch.ones(5, 7).bool()),
        ValueError,
        r"bias must be a floating.*torch.bool; ",
    ),
    (
        lambda: call(bias=torch.ones(5, 7).double()),
        ValueError,
        r"bias must not be wider than query, ",
    ),
    (lambda: call(bias=torch.ones(4, 5, 7)), ValueError, r"bias must have 2 or 4 dimensions"),
    (lambda: call(bias=torch.ones(5, 6)), ValueError, r"bias must broadcast to .*got \[5, 6\]; "),
    (
        lambda: call(bias=torch.ones(7, 5)),
        ValueError,
        r"bias .*; it looks transposed: write bias.mT",
    ),
    (
        lambda: call(window_size=3),
        TypeError,
        r"window_size must be \(left, right\), .*, got 3; None",
    ),
    (lambda: call(window_size=(1, 2, 3)), TypeError, r"window_size must be .*got \(1, 2, 3\); "),
    (lambda: call(window_size=(1.0, 0)), TypeError, r"window_size must be .*got \(1.0, 0\); "),
    (lambda: call(window_size=(True, 0)), TypeError, r"window_size must be .*got \(True, 0\); "),
    (
        lambda: call(window_size=(-1, 0)),
        ValueError,
        r"window_size must be .*got \(-1, 0\); None means",
    ),
    (
        lambda: call(impl="fast"),
        ValueError,
        r"impl must be one of .*'auto'.*, got 'fast'; choose",
    ),
    (
        lambda: call(impl="triton"),
        NotImplementedError,
        r"impl must be able to do this call, got 'triton'; this version has no Triton kernels",
    ),
    (
        lambda: call(Q, K, scale=1e300),  # inf in float32
        ValueError,
        r"scale must be within the range of torch.float32, got 1e\+300; pass None",
    ),
    (
        lambda: call(Q, K, softcap=1e39),
        ValueError,
        r"softcap must be within the range of torch.float32, got 1e\+39; pass None",
    ),
    (
        lambda: call(Q, K, softcap=1e-46),  # 0 in float32
        ValueError,
        r"softcap must be within the range of torch.float32, got 1e-46; pass None",
    ),
    (
        lambda: call(Q, K, is_causal=np.bool_(True)),
        TypeError,
        r"is_causal must be True or False, got numpy.bool_?; pass bool\(is_causal\)",
    ),
]

MASKS = [
    (
        lambda: call(Q, K, V, [[1]]),
        TypeError,
        r"mask must be a tensor or a mask of .*got list; .*as_ten",
    ),
    (
        lambda: call(Q, K, V, torch.full((5, 7), -1e9)),
        ValueError,
        r"mask must hold only 1 \(attend\) and 0 \(masked\), got -1000000000.0; .*go in bias=",
    ),
    (lambda: call(Q, K, V, torch.full((5, 7), 2)), ValueError, r"mask must hold .*got 2; .*bias="),
    (
        lambda: call(Q, K, V, torch.zeros(5, 7)),  # an additive mask of a batch without padding
        ValueError,
        r"mask must hold a 1 \(attend\) where it is floating, got zeros only; .*bias=, and mask",
    ),
    (
        lambda: taught(mask=torch.zeros(5, 7).half()),
        ValueError,
        r"mask must hold a 1 \(attend\) where it is floating, got zeros only; ",
    ),
    (
        lambda: call(Q, K, V, SPARSE),
        ValueError,
        r"mask must be a dense tensor, got torch.sparse_coo; convert it with mask.to_dense\(\)",
    ),
    (
        lambda: call(Q, K, V, torch.ones(5, 7, dtype=torch.cfloat)),
        ValueError,
        r"mask must be bool, integer or floating, got torch.complex64; convert it with mask != 0",
    ),
    (lambda: call(Q, K, V, torch.full((5, 7), -math.inf)), ValueError, r"mask .*got -inf; .*bias="),
    (
        lambda: call(Q, K, V, torch.full((5, 7), math.nan)),
        ValueError,
        r"mask must hold .*got nan; ",
    ),
    (
        lambda: taught(mask=torch.full((5, 7), 0.5)),
        ValueError,
        r"mask must hold .*got 0.5; .*bias=",
    ),
    (
        lambda: call(Q, K, V, torch.ones(2, 5, 7)),
        ValueError,
        r"mask must have 2 or 4 dimensions, .*got \[2, 5, 7\]; write mask.unsqueeze\(1\)",
    ),
    (
        lambda: taught(mask=torch.ones(2, 1, 5, 7)),
        ValueError,
        r"mask must have 2 or 3 dimensions, as query has 3, got \[2, 1, 5, 7\]; its last two",
    ),
    (
        lambda: call(Q, K, V, torch.ones(2, 7)),
        ValueError,
        r"mask must broadcast to .*\[2, 4, 5, 7\], got \[2, 7\]; a padding mask \[B, S\] is "
        r"mask\[:, None, None, :\], or use attlas.masks.padding",
    ),
    (
        lambda: taught(mask=torch.ones(2, 7)),
        ValueError,
        r"padding mask \[B, S\] is mask\[:, None, :\]",
    ),
    (
        lambda: call(Q, K, V, torch.ones(2, 1, 7, 5)),
        ValueError,
        r"mask must broadcast .*got \[2, 1, 7, 5\]; it looks transposed: write mask.mT",
    ),
    (
        lambda: call(Q, K, V, torch.ones(5, 6)),
        ValueError,
        r"mask must broadcast .*\[5, 6\]; .*\[L, S\]",
    ),
    (
        lambda: masks.padding([3]),
        TypeError,
        r"lengths must be an integer tensor \[B\], got list; pass to",
    ),
    (lambda: masks.padding(torch.ones(2)), TypeError, r"lengths must be an .*got torch.float32; "),
    (lambda: masks.padding(torch.ones(2).bool()), TypeError, r"lengths must be .*got torch.bool; "),
    (
        lambda: masks.padding(torch.ones(2, 1).int()),
        ValueError,
        r"lengths must be .*got \[2, 1\]; ",
    ),
    (
        lambda: masks.padding(torch.tensor([-1])),
        ValueError,
        r"lengths must be at least 0, got -1; che",
    ),
    (
        lambda: call(Q, K, V, masks.padding(torch.tensor([1, 2, 3]))),
        ValueError,
        r"lengths must have 2 \(the batch size\) or 1 entries, got 3; pass one for each sequence",
    ),
    (
        lambda: masks.causal("up"),
        ValueError,
        r"alignment must be 'upper_left' or 'lower_right', got 'up",
    ),
    (lambda: masks.sliding_window(1, 1, "x"), ValueError, r"alignment must be .*got 'x'; "),
    (lambda: masks.sliding_window(-1, 0), ValueError, r"\(left, right\) must be .*got \(-1, 0\); "),
    (
        lambda: masks.sliding_window("a", 0),
        TypeError,
        r"\(left, right\) must be .*got \('a', 0\); ",
    ),
    (
        lambda: masks.documents([1]),
        TypeError,
        r"ids must be an integer tensor \[L\] or \[B, L\], got",
    ),
    (
        lambda: masks.documents(torch.ones(1, 1, 1).int()),
        ValueError,
        r"ids must be .*got \[1, 1, 1\]; ",
    ),
    (
        lambda: call(Q, K, V, masks.documents(torch.zeros(5).int())),
        ValueError,
        r"key_ids must have one id for each position, S=7, got \[1, 5\]; pass key_ids=",
    ),
    (
        lambda: call(Q, Q, Q, masks.documents(torch.zeros(3, 5).int())),
        ValueError,
        r"ids must have 2 \(the batch size\) or 1 entries, got 3; ",
    ),
    (lambda: masks.prefix(-1), ValueError, r"length must be at least 0, got -1; "),
    (
        lambda: masks.prefix("a"),
        TypeError,
        r"length must be an integer tensor an int or \[B\], got str",
    ),
    (
        lambda: masks.intervals([0], torch.ones(1).int()),
        TypeError,
        r"start must be an integer tensor \[L\] or \[B, H, L\], got list; pass torch.tensor",
    ),
    (
        lambda: masks.intervals(torch.zeros(2, 5).int(), torch.ones(5).int()),
        ValueError,
        r"start must be an integer tensor \[L\] or \[B, H, L\], got \[2, 5\]; check its dim",
    ),
    (
        lambda: masks.intervals(torch.zeros(5).int(), torch.tensor([-1])),
        ValueError,
        r"stop must be at least 0, got -1; check",
    ),
    (
        lambda: call(Q, K, V, masks.intervals(torch.zeros(5).int(), torch.ones(7).int())),
        ValueError,
        r"stop must broadcast to \[B, H, L\] = \[2, \d, 5\], got \[1, 1, 7\]; pass one end",
    ),
    (lambda: masks.from_tensor([1]), TypeError, r"tensor must be a tensor or a mask .*got list; "),
    (
        lambda: masks.from_tensor(torch.ones(2, 5, 7)),
        ValueError,
        r"tensor must have 2 or 4 dimensions",
    ),
    (
        lambda: masks.from_tensor(torch.full((2, 2), 3)),
        ValueError,
        r"tensor must hold .*got 3; .*bias=",
    ),
    (
        lambda: call(Q, K, V, masks.from_tensor(torch.ones(4, 7))),
        ValueError,
        r"mask must broadcast to \[..., L, S\] = \[2, 4, 5, 7\], got \[1, 1, 4, 7\]; ",
    ),
    (lambda: masks.from_function(3), TypeError, r"fn must be callable, got int; pass a function"),
    (
        lambda: masks.causal() & torch.ones(2),
        TypeError,
        r"the right side of & must be a mask, got Tensor; wrap a tensor with .*from_tensor",
    ),
    (lambda: masks.causal() | 1, TypeError, r"the right side of \| must be a mask, got int; wrap"),
]

W = call().weights
READOUTS = [
    (
        lambda: W[torch.tensor(True)],
        TypeError,
        r"a bool index must have a dimension, got one value; write None",
    ),
    (lambda: W.topk(0), ValueError, r"k must be from 1 to 7, got 0; choose a value in that range"),
    (lambda: W.topk(8), ValueError, r"k must be from 1 to 7, got 8; "),
    (lambda: W.topk(1.0), TypeError, r"k must be an int from 1 to 7, got float; pass a Python int"),
    (
        lambda: W.received("median"),
        ValueError,
        r"reduce must be 'sum', 'mean' or 'max', got 'median'; ",
    ),
    (lambda: W.pool(4, "sum"), ValueError, r"how must be 'max' or 'mass', got 'sum'; "),
    (lambda: W.pool(0), ValueError, r"cell must be at least 1, got 0; "),
    (lambda: W.pool((2, -1)), ValueError, r"cell must be at least 1, got -1; "),
    (lambda: W.pool((2, 1.5)), TypeError, r"cell must be an int at least 1, got float; "),
    (
        lambda: W.pool((1, 2, 3)),
        TypeError,
        r"cell must be an int or \(queries, keys\), got \(1, 2, 3",
    ),
    (
        lambda: W.pool("a"),
        TypeError,
        r"cell must be an int or \(queries, keys\), got 'a'; write pool",
    ),
    (lambda: W.map_rows(3), TypeError, r"fn must be callable, got int; "),
    (
        lambda: W.map_rows(lambda w: 3),
        ValueError,
        r"fn must return a tensor .*, got int; map each row",
    ),
    (
        lambda: W.map_rows(lambda w: w.sum(-2)),
        ValueError,
        r"fn must return a tensor .*got \[.*\]; map",
    ),
    (
        lambda: W @ 3,
        TypeError,
        r"x must be a floating tensor, got int; convert it with x.float\(\)",
    ),
    (lambda: W @ torch.ones(7).int(), TypeError, r"x must be a floating tensor, got torch.int32; "),
    (
        lambda: W @ torch.ones(6, 2),
        ValueError,
        r"x must be \[..., S, D\], S=7, got \[6, 2\]; its last",
    ),
    (lambda: W.T @ torch.ones(7, 2), ValueError, r"x must be \[..., L, D\], L=5, got \[7, 2\]; "),
    (
        lambda: W @ torch.ones(4, 7, 2),
        ValueError,
        r"x must be \[..., S, D\], S=7, got \[4, 7, 2\]; ",
    ),
    (
        lambda: W @ torch.ones(2, 3, 7, 2),
        ValueError,
        r"x must broadcast to \[2, 4, 7, 2\], got \[2, 3",
    ),
    (
        lambda: W @ torch.ones(7, 2).to("meta"),
        ValueError,
        r"x must be on the device of query, cpu, ",
    ),
    (
        lambda: W.mass(torch.ones(5).bool()),
        ValueError,
        r"keys must be \[7\] where bool, got \[5\]; pass",
    ),
    (
        lambda: W.received(queries=torch.ones(7).bool()),
        ValueError,
        r"queries must be \[5\] where bool",
    ),
    (
        lambda: W.mass([7]),
        IndexError,
        r"index must be from -7 to 6 in dimension 0, got 7; check it",
    ),
    (
        lambda: W.mass("a"),
        TypeError,
        r"keys must be a slice, a range, positions or a bool tensor, got str; write keys=",
    ),
]


@pytest.mark.parametrize(("make", "kind", "pattern"), INPUTS + OPTIONS + MASKS + READOUTS)
def test_a_message_says_the_rule_the_value_and_the_mend(make, kind, pattern):
    with pytest.raises(kind, match=pattern) as caught:
        make()
    assert type(caught.value) is kind
    assert GRAMMAR.match(str(caught.value)), "the grammar of checks.py"


@pytest.mark.parametrize(("make", "kind", "pattern"), INPUTS + OPTIONS + MASKS)
def test_nothing_is_computed_before_a_message(make, kind, pattern, native_calls):
    with Watch() as watch, pytest.raises(kind):
        make()
    assert watch.products + native_calls == []


@pytest.mark.parametrize("impl", IMPLS)
def test_a_computation_is_seen(impl, native_calls):
    """The test above would pass with a watch that is blind."""
    with Watch() as watch:
        call(impl=impl)
    assert watch.products + native_calls


@pytest.fixture
def native_calls(monkeypatch) -> list[str]:
    """The calls of the C++ library, which PyTorch does not see."""
    names: list[str] = []
    original = library.call

    def recorded(name, *args):
        names.append(name)
        return original(name, *args)

    monkeypatch.setattr(library, "call", recorded)
    return names


def test_two_problems_are_told_one_at_a_time_in_the_order_of_the_arguments():
    with pytest.raises(ValueError, match=r"^query must"):
        call(Q.int(), K.int(), scale=math.nan)


@pytest.mark.parametrize("value", [2, 1, 0.5])
def test_numbers_of_each_python_kind_are_taken(value):
    assert call(softcap=value, scale=value).output.isfinite().all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is:UserWarning")  # torch's
def test_a_nested_tensor_is_refused():
    """Torch asked to file an issue."""
    x = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(2, 8)])
    with pytest.raises(ValueError, match=r"query must be a dense tensor, got a nested one; .*pad"):
        call(x, x, x)
