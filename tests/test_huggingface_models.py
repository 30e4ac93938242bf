"""Models of transformers with attlas against eager attention: outputs, weights, generation."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers as hf

import attlas
import attlas.huggingface

from .architectures import (
    ARCHITECTURES,
    BYPASSING_HERE,
    DECODERS,
    NAMES,
    attentions,
    dense,
    inputs,
    pair,
    real_rows,
)
from .helpers import gap

TOLERANCE = 5e-6  # what the integration promises in float32


def run(model, given, **options):
    with torch.no_grad():
        return model(**given, output_attentions=True, **options)


def compare(name, eager, lazy, mask, tolerance=TOLERANCE):
    """The largest difference of outputs and weights is within the tolerance."""
    expected, found = dict(attentions(eager)), dict(attentions(lazy))
    assert expected.keys() == found.keys()
    assert expected
    if ARCHITECTURES[name].decoder:
        mask = None  # queries of the decoder have none; those of the encoder read real keys
    for key, weights in found.items():
        assert weights.shape == expected[key].shape, key
        pairs = (real_rows(dense(w), mask, 2) for w in (expected[key], weights))
        assert gap(*pairs) <= tolerance, key
    for key in ("logits", "last_hidden_state", "logits_per_image", "pooler_output"):
        if eager.get(key) is not None:
            assert gap(*(real_rows(o[key], mask, 1) for o in (eager, lazy))) <= tolerance, key


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_weights_equal_those_of_eager_attention(name):
    eager, model = pair(name)
    given = inputs(name)
    lazy = run(model, given)
    compare(name, run(eager, given), lazy, given.get("attention_mask"))
    assert all(isinstance(w, attlas.AttentionWeights) for _, w in attentions(lazy))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_materialised_in_a_forward(name, monkeypatch):
    _, model = pair(name)
    monkeypatch.setattr(attlas.AttentionWeights, "evaluate", None)
    monkeypatch.setattr(attlas.AttentionWeights, "__getitem__", None)
    run(model, inputs(name))


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_attentions_does_not_change_the_output(name):
    _, model = pair(name)
    given = inputs(name)
    with torch.no_grad():
        plain = model(**given)
    asked = run(model, given)
    assert all(torch.equal(plain[k], asked[k]) for k in plain if isinstance(plain[k], torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_near_to_float32_as_eager_attention(name):
    exact, _ = pair(name)
    eager, model = pair(name, torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in eager.state_dict().items()})
    given = inputs(name)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    high = {k: v.float() if v.is_floating_point() else v for k, v in low.items()}
    expected, plain, found = run(exact, high), run(eager, low), run(model, low)
    mask = None if ARCHITECTURES[name].decoder else given.get("attention_mask")
    for key, weights in attentions(expected):
        want, theirs, ours = (
            real_rows(dense(w).float(), mask, 2)
            for w in (weights, dict(attentions(plain))[key], dict(attentions(found))[key])
        )
        assert dict(attentions(found))[key].dtype == torch.bfloat16
        assert gap(ours, want) <= 2 * gap(theirs, want) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_eager_attention(name):
    """Of a loss on outputs and on weights, with and without checkpoints."""
    eager, model = pair(name)
    given = inputs(name)
    given.pop("attention_mask", None)  # rows of padding differ

    def gradients(model, checkpoint):
        if checkpoint and model.supports_gradient_checkpointing:
            with warnings.catch_warnings():  # a new name in later versions
                warnings.simplefilter("ignore", FutureWarning)
                kind = {"use_reentrant": False}
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
        model.zero_grad()
        for part in model.train(checkpoint).modules():  # checkpoints are for training
            for where in ("p", "dropout", "attention_dropout", "layerdrop", "activation_dropout"):
                if isinstance(getattr(part, where, None), float):
                    setattr(part, where, 0.0)
        options = {} if "pixel_values" in given else {"use_cache": False}
        outputs = model(**given, output_attentions=True, **options)
        loss = sum((w[..., 0] ** 2).sum() for _, w in attentions(outputs))
        key = next(k for k in ("logits", "last_hidden_state", "logits_per_image") if k in outputs)
        (loss + outputs[key].square().mean()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(eager, False)
    largest = max(float(g.abs().max()) for g in expected.values())
    for checkpoint in (False, True):
        found = gradients(model, checkpoint)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            assert gap(grad, expected[key]) <= 1e-5 * largest, (key, checkpoint)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_tokens_and_the_weights_of_eager_attention(name, options):
    eager, model = pair(name)
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    found = []
    for each in (eager, model):
        found.append(
            each.generate(
                **given,
                **options,
                max_new_tokens=9,
                min_new_tokens=9,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    compare(name, *found, given.get("attention_mask"))


def test_a_rolling_cache_does_not_reach_weights_that_were_given():
    """The sliding layers of a static cache write over the keys of earlier steps."""
    eager, model = pair("mistral")
    ids = torch.randint(5, 60, (1, 8))
    for mode in (torch.no_grad, torch.inference_mode):
        caches = [hf.StaticCache(config=model.config, max_cache_len=20) for model in (eager, model)]
        kept = []
        with mode():
            for first in range(0, 8, 4):
                part = ids[:, first : first + 4]
                pairs = [
                    m(part, past_key_values=c, output_attentions=True).attentions
                    for m, c in zip((eager, model), caches, strict=True)
                ]
                kept += zip(*pairs, strict=True)
        assert len(kept) == 4
        assert all(isinstance(ours, attlas.AttentionWeights) for _, ours in kept)
        assert max(gap(dense(ours), theirs) for theirs, ours in kept) <= TOLERANCE


def test_packed_sequences():
    eager, model = pair("llama")
    given = {
        "input_ids": torch.randint(5, 60, (1, 12)),
        "position_ids": torch.tensor([[*range(5), *range(4), *range(3)]]),
        "use_cache": False,
    }
    compare("llama", run(eager, given), run(model, given), None)
    assert float(run(model, given).attentions[0][0, :, 5:, :5].max()) == 0


@pytest.mark.parametrize("floating", [False, True])
def test_a_mask_of_pairs_that_a_user_gives(floating):
    eager, model = pair("llama")
    allowed = torch.rand(2, 1, 12, 12).lt(0.5).tril() | torch.eye(12, dtype=torch.bool)
    added = torch.zeros(2, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    given = {"input_ids": torch.randint(5, 60, (2, 12))}
    compare(
        "llama",
        run(eager, {**given, "attention_mask": added}),
        run(model, {**given, "attention_mask": added if floating else allowed}),
        None,
    )


def test_holes_in_the_padding():
    for name in ("bert", "llama"):
        eager, model = pair(name)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, 4] = mask[1, 2:4] = mask[1, 9] = 0
        given = {"input_ids": torch.randint(5, 60, (2, 12)), "attention_mask": mask}
        compare(name, run(eager, given), run(model, given), mask)


def test_one_line_to_adopt(tmp_path):
    """A user's script, in which only attn_implementation changes."""
    eager, _ = pair("bert")
    eager.save_pretrained(tmp_path)
    given = inputs("bert")
    results = []
    for name in ("eager", "attlas"):
        model = hf.AutoModel.from_pretrained(tmp_path, attn_implementation=name)
        outputs = model(**given, output_attentions=True)
        results.append(outputs.attentions[1][0, 3].mean(0))
    assert gap(*results) <= TOLERANCE
    model = hf.AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    model.set_attn_implementation("attlas")
    assert (
        gap(model(**given, output_attentions=True).attentions[1][0, 3].mean(0), results[0]) < 1e-6
    )


def test_what_libraries_do_with_attentions():
    eager, model = pair("bert")
    given = inputs("bert")
    theirs, ours = run(eager, given), run(model, given)
    mask = given["attention_mask"]
    for use in (
        lambda a: torch.stack(a).mean(2),
        lambda a: torch.cat([layer.mean(1, keepdim=True) for layer in a], dim=1),
        lambda a: torch.stack([torch.from_numpy(layer.detach().cpu().numpy()) for layer in a]),
        lambda a: torch.stack([layer[0, 5 % 4] for layer in a]),
        lambda a: a[-1][:, :, 0, 1:],
        lambda a: a[0].permute(0, 2, 1, 3).transpose(1, 2),
        lambda a: 0.5 * a[0] + 0.5 * torch.eye(12),
        lambda a: a[0].sum(2),
        lambda a: torch.einsum("bhqk->bhk", a[0] * 1),
    ):
        expected, found = use(theirs.attentions), use(ours.attentions)
        if expected.shape[-2:] == (12, 12):
            expected, found = (real_rows(t, None, 0)[..., :8, :] for t in (expected, found))
        else:  # sums over queries hold those of padding
            expected, found = expected[0], found[0]
        assert gap(expected, found) <= TOLERANCE * 12
    assert mask[1, -1] == 0
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert gap(dense(again.attentions[0]), dense(ours.attentions[0])) == 0
    assert len(ours.to_tuple()) == len(theirs.to_tuple())
    assert len(run(model, given, return_dict=False)) == len(theirs.to_tuple())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dropout_is_eager_attentions_but_for_which_weights_are_dropped(name, monkeypatch):
    eager, model = pair(name)
    given = inputs(name)
    given.pop("attention_mask", None)
    for each in (eager, model):
        for module in each.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.4 if name == "bert" else 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.4
    # Only that of attention has four dimensions; the others would draw other numbers.
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda t, *_, **__: t)
    found = run(model, given)
    keeps = iter([weights.dropped.keep() for weights in found.attentions])
    assert all(0.4 < w.dropped.keep().float().mean() < 0.8 for w in found.attentions)

    def dropout(tensor, p=0.5, training=True, inplace=False):
        return tensor * next(keeps) / (1 - p) if tensor.ndim == 4 and p else tensor

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    want = run(eager, given)
    assert next(keeps, None) is None
    assert gap(found[0], want[0]) <= TOLERANCE
    for ours, theirs in zip(found.attentions, want.attentions, strict=True):
        assert gap(ours.dropped.to_dense(), theirs) <= TOLERANCE


# --- refusals ---------------------------------------------------------------------------

BYPASSING = {
    "bloom": lambda: hf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4),
    "mpt": lambda: hf.MptConfig(vocab_size=60, d_model=32, n_layers=1, n_heads=4, max_seq_len=32),
    "codegen": lambda: hf.CodeGenConfig(vocab_size=60, n_embd=32, n_layer=1, n_head=4),
    "longformer": lambda: hf.LongformerConfig(hidden_size=32, num_attention_heads=4),
    "mpnet": lambda: hf.MPNetConfig(hidden_size=32, num_attention_heads=4),
    "megatron_bert": lambda: hf.MegatronBertConfig(hidden_size=32, num_attention_heads=4),
    "convbert": lambda: hf.ConvBertConfig(hidden_size=32, num_attention_heads=4),
    "xglm": lambda: hf.XGLMConfig(d_model=32, attention_heads=4),
    "rembert": lambda: hf.RemBertConfig(hidden_size=32, num_attention_heads=4),
    "roformer": lambda: hf.RoFormerConfig(hidden_size=32, num_attention_heads=4),
    "imagegpt": lambda: hf.ImageGPTConfig(n_embd=32, n_head=4),
    "gptj": lambda: hf.GPTJConfig(n_embd=32, n_head=4, rotary_dim=4),
    "falcon": lambda: hf.FalconConfig(hidden_size=32, num_attention_heads=4),
    "deberta-v2": lambda: hf.DebertaV2Config(hidden_size=32, num_attention_heads=4),
    "xlnet": lambda: hf.XLNetConfig(d_model=32, n_head=4),
}
BYPASSING |= {name: ARCHITECTURES[name].config for name in sorted(BYPASSING_HERE)}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of old versions
@pytest.mark.parametrize("name", BYPASSING)
def test_a_model_that_bypasses_the_interface_is_refused_when_it_is_made(name):
    config = BYPASSING[name]()
    message = (
        r"attn_implementation must be 'eager' for \w+Model, got 'attlas'; its attention does not "
        "use the attention interface of transformers"
    )
    with pytest.raises(NotImplementedError, match=message):
        hf.AutoModel.from_config(config, attn_implementation="attlas")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of old versions
@pytest.mark.parametrize("name", BYPASSING)
def test_a_model_that_bypasses_the_interface_is_refused_when_it_is_set(name):
    model = hf.AutoModel.from_config(BYPASSING[name](), attn_implementation="eager")
    with pytest.raises(NotImplementedError, match=f"be 'eager' for {type(model).__name__}, got"):
        model.set_attn_implementation("attlas")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation({"": "eager"})


def test_a_model_that_bypasses_the_interface_is_refused_when_it_is_loaded(tmp_path):
    hf.AutoModel.from_config(BYPASSING["mpnet"](), attn_implementation="eager").save_pretrained(
        tmp_path
    )
    with pytest.raises(NotImplementedError, match="must be 'eager' for MPNetModel, got 'attlas'"):
        hf.AutoModel.from_pretrained(tmp_path, attn_implementation="attlas")


def test_a_part_that_bypasses_the_interface_is_refused_by_its_name():
    configs = pair("bert")[0].config, BYPASSING["xglm"]()
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    model = hf.EncoderDecoderModel._from_config(config, attn_implementation="eager")
    with pytest.raises(NotImplementedError, match="must be 'eager' for XGLMForCausalLM, got"):
        model.set_attn_implementation("attlas")
    with pytest.raises(NotImplementedError, match="must be 'eager' for XGLMForCausalLM, got"):
        model.set_attn_implementation({"decoder": "attlas"})
    assert model.encoder.config._attn_implementation == "eager"
    model.set_attn_implementation({"encoder": "attlas"})
    assert model.encoder.config._attn_implementation == "attlas"
    assert model.decoder.config._attn_implementation == "eager"


def test_attention_of_another_kind_is_refused():
    query = torch.randn(1, 2, 3, 4)
    function = hf.AttentionInterface()["attlas"]
    with pytest.raises(NotImplementedError, match="Linear must call dense attention, got indices="):
        function(torch.nn.Linear(1, 1), query, query, query, None, indices=torch.zeros(1))
    message = (
        r"Linear must call attention with one sink for each head, got sinks of shape \[1, 2, 3"
    )
    with pytest.raises(NotImplementedError, match=message):
        function(torch.nn.Linear(1, 1), query, query, query, None, sinks=torch.zeros(1, 2, 3, 1))


def test_registering_again_changes_nothing():
    before = hf.PreTrainedModel.get_correct_attn_implementation
    attlas.huggingface.register()
    assert hf.PreTrainedModel.get_correct_attn_implementation is before
