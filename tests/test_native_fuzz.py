"""Random shapes, strides, masks, options and dtypes against the reference, shrunk when they fail.

`pytest --hypothesis-profile=long tests/test_native_fuzz.py` looks longer, with other examples each
time.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attlas import masks
from attlas.dropout import Dropout

from .helpers import NATIVE
from .native_calls import HOOKS, Problem, check
from .test_native import DTYPES, PLACES, like

pytestmark = [*NATIVE.marks, pytest.mark.numeric]

EXAMPLES = 4 * settings().max_examples  # of the profile in use
small = st.integers(1, 3)
rows = st.one_of(st.integers(1, 12), st.sampled_from([47, 48, 63, 64, 65, 143, 145, 191, 193, 260]))
keys = st.one_of(rows, st.sampled_from([511, 512, 513, 1025, 4095, 4097, 8200]))
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65, 130]))
MOST = 1 << 21  # multiplications of an example, so that it takes milliseconds


@st.composite
def rules(draw, batch: int, heads: int, queries: int, keys: int):
    """A mask: an interval of keys, pairs in any broadcast shape, or a function."""
    side = st.one_of(st.none(), st.integers(0, keys + 3))
    alignment = draw(st.sampled_from(["upper_left", "lower_right"]))
    match draw(st.sampled_from(["causal", "window", "padding", "documents", "pairs", "function"])):
        case "causal":
            return masks.causal(alignment)
        case "window":
            return masks.sliding_window(draw(side), draw(side), alignment)
        case "padding":
            return masks.padding(torch.randint(0, keys + 2, (batch,)))
        case "documents":
            ids, key_ids = (torch.randint(0, 4, (n,)).sort().values for n in (queries, keys))
            return masks.documents(ids, key_ids)
        case "pairs":
            shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
            return masks.from_tensor(torch.rand(shape) < draw(st.sampled_from([0.05, 0.5, 0.95])))
        case _:
            modulus = draw(st.integers(1, 5))
            return masks.from_function(lambda b, h, i, j: (i + 2 * j + h) % modulus == 0)


@st.composite
def problems(draw):
    """A problem of up to `MOST` multiplications, its tensors in any place."""
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    batch, kv_heads, group, queries = draw(small), draw(small), draw(small), draw(rows)
    size, value_size = draw(sizes), draw(sizes)
    heads, count = kv_heads * group, draw(keys)
    assume(batch * heads * queries * count * (size + value_size) <= MOST)
    dtype = draw(st.sampled_from(DTYPES))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loud = draw(st.sampled_from([0.1, 1.0, 10.0]))

    def tensor(*shape: int) -> torch.Tensor:
        contents = (torch.randn(shape) * loud).to(dtype)
        how = draw(st.sampled_from([None, *PLACES]))
        return contents if how is None else like(contents, how)

    query = tensor(batch, heads, queries, size)
    key, value = tensor(batch, kv_heads, count, size), tensor(batch, kv_heads, count, value_size)
    bias = None
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, count)]
        bias = torch.where(torch.rand(shape) < 0.1, -math.inf, torch.randn(shape)).to(wide)
        bias = like(bias, draw(st.sampled_from(PLACES)))
    return Problem.of(
        query,
        key,
        value,
        bias,
        torch.randn(heads).to(wide) if draw(st.booleans()) else None,
        draw(st.lists(rules(batch, heads, queries, count), max_size=3)),
        draw(st.sampled_from([None, 0.0, -0.7, 1.3])),
        draw(st.sampled_from([None, 0.5, 30.0])),
        draw(st.sampled_from([None, None, Dropout(0.4, torch.tensor(3 << 40 | 5))])),
    )


def tiles(shape):
    """A rectangle of the weights that holds something."""

    def part(length: int):
        ends = st.tuples(st.integers(0, length), st.integers(0, length))
        return ends.map(sorted).filter(lambda pair: pair[0] < pair[1])

    return st.tuples(part(shape.queries), part(shape.keys))


@settings(max_examples=EXAMPLES)
@given(problems(), st.data())
def test_the_library_equals_the_reference(problem, data):
    shape = problem.spec.shape
    check(
        problem,
        hooks=data.draw(st.sets(st.sampled_from(HOOKS), min_size=1)),
        tile=data.draw(tiles(shape)),
        k=data.draw(st.sampled_from([1, 2, 5, 64])),
        cell=data.draw(st.tuples(st.integers(1, shape.queries + 2), st.integers(1, 300))),
    )
