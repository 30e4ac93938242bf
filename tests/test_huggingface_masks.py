"""The mask function against transformers' own, and what it keeps in memory."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from transformers import masking_utils as theirs

import attlas.huggingface
from attlas import encoding
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
    mask = attention_mask(**case, allow_is_causal_skip=False)
    found = mask.rule
    assert isinstance(found, KeyIntervals)
    batch, _, queries, keys = found.shape
    assert found.to_dense(queries=queries, keys=keys, batch=batch).equal(expected)
    assert found.start.numel() <= batch * queries
    assert mask.shape == found.shape == expected.shape
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dense(queries=queries, keys=keys, batch=batch).equal(expected)
    eager = theirs.eager_mask(**case, allow_is_causal_skip=False, dtype=torch.float32)
    assert mask.make().equal(eager)


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
    mask = attention_mask(**case)
    found = mask.rule
    assert found.equal(theirs.sdpa_mask(**case, allow_is_causal_skip=False))
    assert mask.make().equal(theirs.eager_mask(**case, dtype=torch.float32))
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
    mask = attention_mask(batch_size=1, kv_length=5, **place(5, 0)).rule
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[1, 1, 4, 4\], got \[1, 1, 5, 5\]; make it"
    ):
        attlas.attention(query, query, query, mask)


def test_intervals_of_each_head_hold_for_their_head():
    start, shape = torch.tensor([[[0], [3]]]), torch.Size((1, 2, 1, 5))
    rule = KeyIntervals(start, torch.full_like(start, 5), shape)
    found = rule.to_dense(queries=1, keys=5, heads=2)
    assert found[0, :, 0].int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_intervals_are_tensors_for_an_operator():
    mask = attention_mask(batch_size=1, kv_length=5, **place(5, 0)).rule
    query = torch.randn(1, 2, 5, 8)
    spec = attlas.attention(query, query, query, mask).weights.spec
    encoded = encoding.encode(spec, "native")
    assert encoding.RULES[encoded.code[2]] == "intervals"
    assert encoded.tensors[0] is mask.start
    (found,) = encoding.decode(encoded, query, query).masks
    assert found.to_dense(queries=5, keys=5).equal(mask.to_dense(queries=5, keys=5))


def test_a_window_of_a_long_text_takes_memory_for_its_ends_alone():
    function = theirs.sliding_window_causal_mask_function(16)
    mask = attention_mask(
        batch_size=1, kv_length=5000, mask_function=function, **place(5000, 0)
    ).rule
    assert isinstance(mask, KeyIntervals)
    assert mask.start.numel() == mask.stop.numel() == 5000
    query = torch.randn(1, 1, 5000, 8)
    weights = attlas.attention(query, query, query, mask).weights
    window = attlas.attention(query, query, query, is_causal=True, window_size=(15, 0)).weights
    assert weights[0, 0, 4000].equal(window[0, 0, 4000])
    assert weights.max().keys.equal(window.max().keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_with_its_mask_has_that_of_eager_attention(dtype):
    case = {"batch_size": 2, "kv_length": 5, "attention_mask": RIGHT[:, :5], **place(5, 0)}
    eager = theirs.eager_mask(**case, dtype=dtype)
    scores = torch.randn(2, 4, 5, 5, dtype=dtype)
    for use in (
        lambda mask: scores + mask,
        lambda mask: (1.0 - mask) * -1e4,
        lambda mask: torch.where(mask != 0, 1.0, scores),
        lambda mask: torch.cat([mask, mask.to(torch.float64)], dim=-1),
        lambda mask: mask[:, :, -2:, :3],
        lambda mask: mask.to(torch.float64),
        lambda mask: scores.masked_fill_(mask != 0, 2.0),
    ):
        assert use(attention_mask(**case, dtype=dtype)).equal(use(eager))
    assert attention_mask(**case, dtype=dtype).dtype == dtype


def test_what_is_asked_of_a_mask_without_its_values_does_not_make_it():
    mask = attention_mask(batch_size=2, kv_length=5, **place(5, 0))
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (2, 1, 5, 5) == mask.size()
    assert mask.ndim == mask.dim() == 4
    assert mask.dtype == torch.float32
    assert mask.is_floating_point()
    assert mask.to("cpu") is mask.to(device=mask.device) is mask.contiguous() is mask
    assert mask.made is None


def test_what_a_model_writes_to_its_mask_holds():
    query = torch.randn(1, 2, 5, 8)
    mask = attention_mask(batch_size=1, kv_length=5, **place(5, 0))
    forward = attlas.huggingface.attention.attention_forward
    before = forward(torch.nn.Identity(), query, query, query, mask)[1]
    assert bool((mask[0, 0, 3] == mask[0, 0, 4]).any())  # it is made, and not changed
    assert not mask.changed
    assert forward(torch.nn.Identity(), query, query, query, mask)[1][0].equal(before[0])
    mask[:, :, :, 1] = torch.finfo(torch.float32).min
    assert mask.changed
    found = forward(torch.nn.Identity(), query, query, query, mask)[1]
    assert float(found[0, :, :, 1].max()) == 0 < float(before[0, :, 1:, 1].min())


def test_without_a_mask_all_keys_are_read_as_in_eager_attention():
    """A module that calls itself causal, as Phi4's of pictures does, is not asked."""
    query = torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    module.is_causal = True
    forward = attlas.huggingface.attention.attention_forward
    assert float(forward(module, query, query, query, None)[1].to_dense().min()) > 0
    causal = forward(module, query, query, query, None, is_causal=True)[1]
    assert float(causal[0, :, 0, 1:].max()) == 0
