"""`capture` in any run, and weights on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import attlas
import attlas.huggingface
from attlas import masks
from attlas.huggingface import capture, load, save

from .architectures import NAMES, attentions, dense, inputs, pair
from .helpers import KERNELS, gap, qkv, same


@pytest.mark.parametrize("name", NAMES)
def test_a_capture_of_all_is_what_the_model_gives(name):
    _, model = pair(name)
    given = inputs(name)
    with torch.no_grad():
        expected = dict(attentions(model(**given, output_attentions=True)))
        with capture(model) as run:
            model(**given)
    assert len(run) == len(expected)
    assert {call.step for call in run} == {0}
    stacks = {}
    for key in expected:
        stacks.setdefault(key.rsplit(".", 2)[0], []).append(key)
    found = [run.of(stack=stack) for stack in run.stacks]
    assert sorted(map(len, found)) == sorted(map(len, stacks.values()))
    by_value = list(expected.values())
    for call in run:  # layers are counted as outputs count them
        match = [w for w in by_value if w.shape == call.weights.shape]
        assert any(same(dense(w), dense(call.weights)) for w in match), call.name
        assert call.layer < len(run.of(stack=call.stack))
    if not {"encoder", "text"} & {part for key in stacks for part in key.split("_")}:
        for layer, key in enumerate(expected):
            assert same(dense(run.of(layer=layer)[0].weights), dense(expected[key]))


@pytest.mark.parametrize("name", ["eager", "sdpa", "attlas"])
def test_a_capture_needs_no_flag_and_leaves_the_implementation(name):
    config = pair("clip")[0].config
    model = hf.CLIPModel._from_config(config, attn_implementation=name).eval()
    with torch.no_grad(), capture(model) as run:
        assert model.config._attn_implementation == "attlas"
        model(**inputs("clip"))
    assert len(run) == 4
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {name}
    with torch.no_grad():
        model(**inputs("clip"))
    assert len(run) == 4


def test_an_error_in_the_run_leaves_the_implementation():
    eager, _ = pair("bert")
    with pytest.raises(RuntimeError, match="stop"), capture(eager) as run:  # noqa: PT012
        eager(**inputs("bert"))
        raise RuntimeError("stop")
    assert eager.config._attn_implementation == "eager"
    assert len(run) == 2


def test_chosen_layers_and_heads():
    _, model = pair("llama")
    given = inputs("llama")
    with torch.no_grad(), capture(model) as whole:
        model(**given)
    with torch.no_grad(), capture(model, layers=[1], heads=[0, 3]) as some:
        model(**given)
    assert [call.layer for call in some] == [1]
    assert gap(dense(some.calls[0].weights), dense(whole.of(layer=1)[0].weights)[:, [0, 3]]) < 1e-6
    with torch.no_grad(), capture(model, heads={0: [2]}) as mapped:
        model(**given)
    assert [call.layer for call in mapped] == [0]
    assert gap(dense(mapped.calls[0].weights), dense(whole.of(layer=0)[0].weights)[:, [2]]) < 1e-6
    assert some.nbytes < whole.nbytes / 2
    assert "1 calls of ['model.layers.*.self_attn']" in repr(some)


def test_one_layer_and_one_head():
    _, model = pair("llama")
    with (
        torch.no_grad(),
        capture(model, layers=1, heads=3) as run,
        capture(model, heads={1: 3}) as b,
    ):
        model(**inputs("llama"))
    for call in (*run, *b):
        assert (call.layer, call.weights.shape[1]) == (1, 1)
    assert len(run) == len(b) == 1


def test_a_function_without_a_name_is_refused():
    message = r"reduce must be names, or functions by name, got function; name it: reduce=\{'mine'"
    with pytest.raises(TypeError, match=message):
        capture(pair("bert")[1], reduce=lambda weights: weights.entropy())


def test_statistics_in_place_of_weights():
    _, model = pair("gpt2")
    given = inputs("gpt2")
    names = ["entropy", "max", "mean_distance", "received", "sink_mass", "topk"]
    with torch.no_grad(), capture(model, reduce=names) as run:
        weights = model(**given, output_attentions=True).attentions
    assert all(call.weights is None for call in run)
    for call, layer in zip(run, weights, strict=True):
        assert list(call.statistics) == names
        assert same(call.statistics["entropy"], layer.entropy())
        assert same(call.statistics["received"], layer.received())
        assert same(call.statistics["topk"].keys, layer.topk(8).keys)
    with torch.no_grad(), capture(model, reduce={"first": lambda w: w[..., 0]}) as run:
        model(**given)
    assert same(run.calls[0].statistics["first"], weights[0][..., 0])
    with torch.no_grad(), capture(model, reduce="entropy") as run:
        model(**given)
    assert list(run.calls[0].statistics) == ["entropy"]


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("reduce", [None, "entropy"])
def test_generate(name, reduce):
    eager, model = pair(name)
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with capture(model, reduce=reduce) as run:
        model.generate(**given, **options)
    expected = eager.generate(
        **given, **options, output_attentions=True, return_dict_in_generate=True
    )
    kind = ".encoder_attn" if name == "bart" else ".self_attn"
    steps = expected.cross_attentions if name == "bart" else expected.attentions
    for step, layers in enumerate(steps):
        for layer, weights in enumerate(layers):
            (call,) = run.of(layer, kind, step)
            if reduce:
                exact = -torch.special.xlogy(weights, weights).sum(-1)
                rows = slice(None) if weights.shape[2] == 1 else slice(-1, None)
                assert gap(call.statistics["entropy"][..., rows], exact[..., rows]) < 1e-5
            else:
                assert gap(dense(call.weights)[:, :, -1], weights[:, :, -1]) < 5e-6
    assert len(run.of(stack=kind)) == 5 * 2


def test_training_with_checkpoints_counts_each_call_once():
    _, model = pair("llama")
    model.config.use_cache = False
    model.train().activation_checkpointing_enable() if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.train().gradient_checkpointing_enable()
    given = inputs("llama")
    with capture(model) as run:
        for _ in range(2):
            loss = model(**given, labels=given["input_ids"]).loss
            loss = loss + 0.1 * run.calls[-1].weights.entropy().mean()
            loss.backward()
    assert [(call.step, call.layer) for call in run] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(p.grad is not None for p in model.model.layers[1].self_attn.q_proj.parameters())


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_a_forward_that_is_called_by_its_name(name):
    """As sentence-transformers does; hooks of modules do not run there."""
    _, model = pair(name)
    given = inputs(name)
    with torch.no_grad(), capture(model) as expected:
        model(**given)
        model(**given)
    with torch.no_grad(), capture(model) as run, capture(model, layers=[1]) as inner:
        model.forward(**given)
        model.forward(**given)
    assert [(c.name, c.layer, c.step) for c in run] == [(c.name, c.layer, c.step) for c in expected]
    assert len(inner) == len(run) / 2
    assert len(run) >= 4
    assert "forward" not in vars(model)


def test_captures_that_end_in_the_order_they_began():
    _, model = pair("bert")
    first, second = capture(model), capture(model)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__()
        model(**inputs("bert"))
        second.__exit__()
    assert (len(first), len(second)) == (0, 2)
    assert "forward" not in vars(model)


def test_a_forward_of_its_own_is_there_again():
    _, model = pair("bert")
    plain, seen = model.forward, []

    def own(*args, **kwargs):  # as accelerate's hooks have it
        seen.append(len(args))
        return plain(*args, **kwargs)

    model.forward = own
    try:
        with torch.no_grad(), capture(model) as run:
            model(**inputs("bert"))
        assert model.forward is own
    finally:
        del model.forward
    assert (len(run), len(seen)) == (2, 1)


def test_several_captures_at_once():
    _, model = pair("bert")
    with torch.no_grad(), capture(model, layers=[0]) as a, capture(model, layers=[1]) as b:
        model(**inputs("bert"))
    assert ([c.layer for c in a], [c.layer for c in b]) == ([0], [1])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be a transformers.PreTrained"),
        ({"layers": [-1]}, ValueError, "layers must be at least 0, got -1"),
        ({"reduce": "mode"}, ValueError, "reduce must be out of .*, got 'mode'; pass"),
    ],
)
def test_messages(arguments, kind, message):
    with pytest.raises(kind, match=message):
        capture(**{"model": pair("bert")[1], **arguments})


def test_a_model_that_bypasses_the_interface_is_refused():
    model = hf.MPNetModel(hf.MPNetConfig(vocab_size=60, hidden_size=12, num_hidden_layers=1))
    with pytest.raises(NotImplementedError, match=r"attention interface .* got MPNetModel"):
        capture(model)


# --- on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_back_as_they_were_saved(name, tmp_path):
    _, model = pair(name)
    with torch.no_grad(), capture(model) as run:
        model(**inputs(name))
    layers = [call.weights for call in run]
    save(tmp_path / "run.safetensors", layers, ["a", "b"])
    found = load(tmp_path / "run.safetensors")
    assert found.tokens == ["a", "b"]
    for before, after in zip(layers, found.layers, strict=True):
        assert isinstance(after, attlas.AttentionWeights)
        assert same(after.to_dense(), before.to_dense())
        assert same(after.logsumexp, before.logsumexp)
        assert gap(after.sink_mass(), before.sink_mass()) == 0
    size = (tmp_path / "run.safetensors").stat().st_size
    assert size < run.nbytes + 4000 * len(layers)


def again(weights, path):
    """The weights as a file gives them back."""
    save(path, [weights])
    (found,) = load(path).layers
    return found


def assert_the_same(before, after, impl):
    """What is read by an index, dense, of what is dropped too, has the same bits by `impl`."""
    assert after.impl == attlas.attention(*qkv()).weights.impl
    assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert same(before.logsumexp, after.logsumexp)
    before, after = (replace(weights, impl=impl) for weights in (before, after))
    for one, other in ((before, after), (before.dropped, after.dropped)):
        assert same(one.to_dense(), other.to_dense())
        for index in (..., (..., 1), (..., slice(1, 4), [0, 2]), (..., [3, 0], [1, 1]), 0):
            assert same(one[index], other[index])
    assert same(before.entropy(), after.entropy())
    assert same(before.sink_mass(), after.sink_mass())
    total = after.entropy().new_ones(after.logsumexp.shape)
    total[after.logsumexp == -torch.inf] = 0
    assert gap(after.to_dense().double().sum(-1), total - after.sink_mass()) < 0.02


HEAD_STARTS = torch.tensor([[[0], [2], [0], [4]]])
MASKS = {
    "none": None,
    "keys of each head": (torch.arange(7) >= HEAD_STARTS[..., None]).int(),
    "pairs": torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6,
    "pairs of each batch item": torch.ones(2, 1, 5, 7).tril(1).expand(2, 4, 5, 7),
    "padding": masks.padding(torch.tensor([7, 0])),
    "causal": masks.causal("lower_right"),
    "window": masks.sliding_window(1, None),
    "documents": masks.documents(torch.tensor([0, 0, 1, 1, 2]), torch.arange(7) // 3),
    "prefix": masks.causal() | masks.prefix(torch.tensor([2, 3])),
    "inverted": ~masks.sliding_window(0, 0),
    "intervals": masks.intervals(torch.arange(5), torch.arange(5) + 3),
    "intervals of each head": masks.intervals(HEAD_STARTS, torch.tensor([[[9]], [[6]]])),
    "function": masks.from_function(lambda b, h, q, k: (q + k + h) % 3 != b),
    "function and causal": masks.from_function(lambda b, h, q, k: (q - k) % 2 == 0)
    & masks.causal(),
}
OPTIONS = {
    "plain": {},
    "bias of each head": {"bias": torch.linspace(-1, 1, 28).view(1, 4, 1, 7)},
    "bias of one row": {"bias": torch.linspace(-1, 1, 7).expand(2, 4, 5, 7)},
    "scores": {"sinks": torch.linspace(-1, 2, 4), "softcap": 2.0, "scale": 0.7},
    "groups": {"kv_heads": 2, "enable_gqa": True},
    "window": {"is_causal": True, "window_size": (3, 1), "causal_alignment": "lower_right"},
    "dropout": {"dropout_p": 0.3, "kv_heads": 1, "enable_gqa": True},
}


def made(mask, dtype=torch.float32, kv_heads=4, **options) -> attlas.AttentionWeights:
    """Weights `[2, 4, 5, 7]`."""
    query, key, value = qkv(2, 4, 5, 7, kv_heads=kv_heads, dtype=dtype)
    for name in {"bias", "sinks"} & set(options):
        options[name] = options[name].to(dtype)
    return attlas.attention(query, key, value, mask, **options).weights


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_read_back_has_the_same_bits(mask, options, impl, tmp_path):
    before = made(MASKS[mask], **OPTIONS[options])
    assert_the_same(before, again(before, tmp_path / "one"), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_of_every_dtype_are_read_back(options, dtype, impl, tmp_path):
    before = made(MASKS["intervals of each head"], dtype, **OPTIONS[options])
    assert_the_same(before, again(before, tmp_path / "one"), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [[2, 0], [1, 1, 3], slice(1, 3)], ids=str)
def test_selected_heads_are_read_back(heads, mask, impl, tmp_path):
    whole = made(MASKS[mask], dropout_p=0.4, is_causal=True)
    before = whole.select_heads(heads)
    after = again(before, tmp_path / "one")
    assert_the_same(before, after, impl)
    assert same(after.dropped.keep(), whole.dropped.keep()[:, heads])
    assert_the_same(before.select_heads([1]), again(after.select_heads([1]), tmp_path / "b"), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_any_weights_can_be_saved(shape, impl, tmp_path):
    query = torch.randn(shape)
    rules = [None, torch.rand(5, 5) < 0.5, masks.padding(torch.tensor([4])), masks.causal()]
    layers = [attlas.attention(query, query, query, m, dropout_p=0.2).weights for m in rules]
    save(tmp_path / "some", layers)
    for before, after in zip(layers, load(tmp_path / "some").layers, strict=True):
        assert_the_same(before, after, impl)
        assert not same(after.to_dense(), after.dropped.to_dense())


def test_a_mask_takes_in_a_file_what_it_takes_in_memory(tmp_path):
    query = torch.randn(1, 8, 512, 1)
    pairs = torch.rand(1, 1, 512, 512) < 0.5
    own = 2 * query.nbytes + 8 * 512 * 2 * 4  # query, key, and two numbers for each row
    for mask, size in (
        (None, 0),
        (masks.causal(), 0),
        (masks.intervals(torch.arange(512), torch.arange(512) + 9), 2 * 512 * 8),
        (pairs, 512 * 512),
        (pairs.expand(1, 8, 512, 512), 512 * 512),
        (masks.from_function(lambda b, h, q, k: (q - k) % 2 == 0), 512 * 512),
    ):
        save(tmp_path / "one", [attlas.attention(query, query, query, mask).weights])
        assert own + size < (tmp_path / "one").stat().st_size < own + size + 2000


# The code of each mask, and the tensors that it takes: what files hold, and will.
CODES = {
    "window": ([0, 1, 2, 0], [], masks.sliding_window(1, 2)),
    "causal": ([0, -1, 0, 1], [], masks.causal("lower_right")),
    "padding": ([1], [torch.tensor([5, 3])], masks.padding(torch.tensor([5, 3]))),
    "documents": (
        [2],
        [torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])],
        masks.documents(torch.arange(5) // 3, torch.arange(7) // 4),
    ),
    "dense": ([3], [torch.ones(1, 1, 5, 7).tril() > 0], torch.ones(5, 7).tril()),
    "and": (
        [4, 0, 1, 2, 0, 0, -1, 0, 1],
        [],
        masks.sliding_window(1, 2) & masks.causal("lower_right"),
    ),
    "or": (
        [5, 0, 1, 2, 0, 0, -1, 0, 1],
        [],
        masks.sliding_window(1, 2) | masks.causal("lower_right"),
    ),
    "not": ([6, 0, 1, 2, 0], [], ~masks.sliding_window(1, 2)),
    "heads": (
        [7, 9],
        [torch.tensor([1, 0, 3, 2]), HEAD_STARTS, torch.tensor([[[7]]])],
        masks.intervals(HEAD_STARTS, torch.tensor([[[7]]])).of_heads(torch.tensor([1, 0, 3, 2])),
    ),
    "intervals": (
        [9],
        [HEAD_STARTS, torch.tensor([[[7]]])],
        masks.intervals(HEAD_STARTS, torch.tensor([[[7]]])),
    ),
}


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("name", CODES)
def test_a_file_of_the_format_is_read(name, impl, tmp_path):
    """As it was written by hand, number by number: a change of the format needs a new name."""
    code, tensors, mask = CODES[name]
    expected = made(mask, causal_alignment="lower_right", softcap=3.0, dropout_p=0.3)
    held = {f"0.{n}": getattr(expected, n).contiguous() for n in ("query", "key", "normaliser")}
    held["0.seed"] = expected.dropout.seed
    held |= {f"0.encoded.{n}": tensor for n, tensor in enumerate(tensors)}
    layer = {
        "code": [1, 1, *code],
        "encoded": len(tensors),
        "scale": 0.5,
        "softcap": 3.0,
        "dropout_p": 0.3,
        "expanded": {},
        "lead": [2, 4],
    }
    header = json.dumps({"layers": [layer], "tokens": ["a"]})
    save_file(held, tmp_path / "two", {"format": "attlas 2", "attlas": header})
    found = load(tmp_path / "two")
    assert found.tokens == ["a"]
    assert_the_same(expected, found.layers[0], impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_a_file_of_the_first_format_is_read(impl, tmp_path):
    """It held intervals, with an axis of heads that was not read, or a bool tensor."""
    mask, pairs = masks.intervals(HEAD_STARTS, torch.tensor([[[7]]])), MASKS["pairs"]
    sinks = torch.linspace(-1, 2, 4)
    options = {"causal_alignment": "lower_right", "softcap": 3.0, "sinks": sinks}
    layers = [made(None), made(mask, **options), made(pairs, bias=torch.ones(5, 7))]
    bounds = {"start": HEAD_STARTS, "stop": torch.tensor([[[7]]])}
    held, described = {}, []
    for i, (weights, own) in enumerate(zip(layers, ({}, bounds, {"allowed": pairs}), strict=True)):
        held[f"{i}.lse"] = weights.logsumexp.contiguous()
        for name in ("query", "key", "bias", "sinks"):
            if getattr(weights, name) is not None:
                held[f"{i}.{name}"] = getattr(weights, name).contiguous()
        held |= {f"{i}.{name}": tensor for name, tensor in own.items()}
        spec = weights.spec
        layer = {name: getattr(spec, name) for name in ("scale", "softcap", "alignment", "guard")}
        described.append({**layer, "shape": list(spec.shape), "lead": [2, 4]})
    header = json.dumps({"layers": described, "tokens": []})
    save_file(held, tmp_path / "one", {"format": "attlas 1", "attlas": header})
    for weights, after in zip(layers, load(tmp_path / "one").layers, strict=True):
        lse = weights.logsumexp
        before = replace(weights, normaliser=torch.stack([lse, torch.ones_like(lse)], -1))
        assert_the_same(before, after, impl)
        assert same(before.mean_distance(), after.mean_distance())


@pytest.mark.parametrize("name", ["dropped", "head_mean"])
def test_what_is_made_of_weights_cannot_be_saved(name, tmp_path):
    weights = made(None, dropout_p=0.5)
    one = {"dropped": weights.dropped, "head_mean": weights.head_mean()}[name]
    message = rf"layers\[0\] must be AttentionWeights, got {type(one).__name__}; .* its \.weights"
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "some", [one])


def test_what_cannot_be_saved_or_read(tmp_path):
    with pytest.raises(TypeError, match=r"layers\[0\] must be AttentionWeights, got Tensor; keep"):
        save(tmp_path / "some", [torch.zeros(1)])
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="path must be a file of 'attlas 2', got format None"):
        load(tmp_path / "other")


def test_a_layer_that_the_model_does_not_have_is_named():
    _, model = pair("bert")
    message = r"^layers must be from 0 to 1, got \[7\]; nothing was kept"
    with pytest.warns(UserWarning, match=message), capture(model, layers=[1, 7]) as run:
        model(**inputs("bert"))
    assert [call.layer for call in run] == [1]
