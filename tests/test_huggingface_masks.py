"""The mask function against transformers' own, and what it keeps in memory."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from transformers import masking_utils as theirs

import attlas.huggingface
from attlas.huggingface.masks import KeyIntervals, attention_mask

# Before 5.4 the positions of the queries come as a tensor.
OLD = "cache_position" in inspect.signature(theirs.sdpa_mask).parameters


def place(q_length, q_offset):
    if OLD:
        return {"cache_position": torch.arange(q_offset, q_offset + q_length)}
    return {"q_length": q_length, "q_offset": q_offset}


def documents(*lengths):
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]


RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]).bool()
CASES = {
    "causal": {},
    "causal, padded on the left": {"attention_mask": RIGHT.flip(1)},
    "causal, padded on the right": {"attention_mask": RIGHT},
    "bidirectional, padded": {
        "mask_function": theirs.bidirectional_mask_function,
        "attention_mask": RIGHT,
    },
    "sliding": {"mask_function": theirs.sliding_window_causal_mask_function(3)},
    "sliding, padded": {
        "mask_function": theirs.sliding_window_causal_mask_function(3),
        "attention_mask": RIGHT.flip(1),
    },
    "chunked": {
        "mask_function": theirs.chunked_causal_mask_function(4, torch.tensor([0, 2])),
        "attention_mask": RIGHT.flip(1),
    },
    "packed": {
        "batch_size": 1,
        "mask_function": theirs.and_masks(
            theirs.causal_mask_function, theirs.packed_sequence_mask_function(documents(4, 3, 2))
        ),
    },
    "prefix, by numbers": {
        "mask_function": theirs.or_masks(
            theirs.causal_mask_function, lambda b, h, q, k: (k < 3) & (q >= 0)
        ),
        "use_vmap": True,
    },
    "decoding": {"q_length": 1, "q_offset": 5, "kv_length": 6},
    "decoding in a static cache": {"q_length": 1, "q_offset": 5, "kv_length": 9},
    "a piece in a static cache": {"q_length": 3, "q_offset": 4, "kv_length": 9},
    "a static cache that is longer than the padding": {
        "q_length": 3,
        "kv_length": 12,
        "attention_mask": RIGHT[:, :3],
    },
    "a rolling cache": {
        "q_length": 2,
        "q_offset": 9,
        "kv_length": 4,
        "kv_offset": 7,
        "mask_function": theirs.sliding_window_causal_mask_function(4),
    },
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_mask_is_that_of_transformers(name, small, monkeypatch):
    if small:
        monkeypatch.setattr(attlas.huggingface.masks, "ELEMENTS", 20)
    case = {"batch_size": 2, "q_length": 9, "kv_length": 9, "q_offset": 0, **CASES[name]}
    case |= place(case.pop("q_length"), case.pop("q_offset"))
    expected = theirs.sdpa_mask(**case, allow_is_causal_skip=False)
    found = attention_mask(**case, allow_is_causal_skip=False)
    assert isinstance(found, KeyIntervals)
    batch, _, queries, keys = found.shape
    assert found.to_dense(queries=queries, keys=keys, batch=batch).equal(expected)
    assert found.start.numel() <= batch * queries
    assert found.shape == expected.shape
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dense(queries=queries, keys=keys, batch=batch).equal(expected)
    assert attention_mask(**{**case, "attention_mask": found}) is found


@pytest.mark.parametrize("function", ["causal_mask_function", "bidirectional_mask_function"])
def test_keys_that_are_no_interval_make_a_dense_mask(function):
    padding = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    case = {
        "batch_size": 2,
        "kv_length": 5,
        "mask_function": getattr(theirs, function),
        "attention_mask": padding,
        **place(5, 0),
    }
    found = attention_mask(**case)
    assert found.equal(theirs.sdpa_mask(**case, allow_is_causal_skip=False))
    if function == "bidirectional_mask_function":
        assert found.stride(2) == 0  # one row in memory


def test_no_mask_where_nothing_is_masked():
    full = torch.ones(2, 5, dtype=torch.bool)
    both = {"mask_function": theirs.bidirectional_mask_function, "kv_length": 5, "batch_size": 2}
    assert attention_mask(**both, **place(5, 0), allow_is_bidirectional_skip=True) is None
    given = {"attention_mask": full, "allow_is_bidirectional_skip": True}
    assert attention_mask(**both, **place(5, 0), **given) is None
    assert attention_mask(batch_size=2, kv_length=6, **place(1, 5)) is None
    assert attention_mask(batch_size=2, kv_length=5, **place(5, 0)) is not None


def test_a_mask_for_other_sizes_is_refused():
    mask = attention_mask(batch_size=1, kv_length=5, **place(5, 0))
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[1, 1, 4, 4\], got \[1, 1, 5, 5\]; make it"
    ):
        attlas.attention(query, query, query, mask)


def test_a_window_of_a_long_text_takes_memory_for_its_ends_alone():
    function = theirs.sliding_window_causal_mask_function(16)
    mask = attention_mask(batch_size=1, kv_length=5000, mask_function=function, **place(5000, 0))
    assert isinstance(mask, KeyIntervals)
    assert mask.start.numel() == mask.stop.numel() == 5000
    query = torch.randn(1, 1, 5000, 8)
    weights = attlas.attention(query, query, query, mask).weights
    window = attlas.attention(query, query, query, is_causal=True, window_size=(15, 0)).weights
    assert weights[0, 0, 4000].equal(window[0, 0, 4000])
    assert weights.max().keys.equal(window.max().keys)
