"""All models of transformers, by their source; and those that compute with their mask, run.

What attention is in a model is said by `eager_attention_forward` of its module. A version of
transformers in which one does something that was not judged fails here.
"""

from __future__ import annotations

import ast
import re

import pytest
import torch
import transformers as hf

from attlas.huggingface.models import TAKEN, unknown_arguments

from .architectures import GROUPED, MODELS, PICTURE, SMALL, TWO_SIDED, attentions, dense
from .helpers import gap

TOLERANCE = 5e-6  # what the integration promises in float32

# What eager attention may read of its module: all is passed to attlas by another name, or is
# read by `attention_forward`.
READ = {"num_key_value_groups", "training", "head_dim", "sinks", "attn_dropout", "layer_idx"}
READ |= {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}  # GPT-2 before 5.4
READ |= {"is_cross_attention", "bias"}  # of the same, which is causal whatever the mask says
# What it may do: what attlas does, and what changes dtype or layout.
DONE = {
    *("matmul", "softmax", "dropout", "transpose", "contiguous", "to", "type", "size", "float"),
    *("repeat_kv", "getattr", "hasattr", "tanh", "cat", "reshape", "expand", "max", "full"),
    *("finfo", "where", "attn_dropout", "maybe_autocast", "eager_attention_forward"),
    *("logsumexp", "sigmoid", "view", "unsqueeze"),  # Granite SWA: sinks after the weights
}
# What attention is called with. What is not in `attention_forward` is unused by eager attention
# too, or raises.
PASSED = {
    *("query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "softcap"),
    *("position_bias", "s_aux", "sinks", "sliding_window", "position_ids", "output_attentions"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"),
    *("indices", "block_indices", "target_dtype", "use_cache", "layer_idx", "cache_position"),
    *("head_mask", "position_embeddings", "seq_idx"),
}
SOURCES = {
    path.stem: text
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    if "ALL_ATTENTION_FUNCTIONS" in (text := path.read_text(encoding="utf-8"))
}
EAGER = re.compile(r"^def \w*eager_attention_forward\(.*?(?=^\S(?<!\)))", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"^( +)\S.*= attention_interface\(\n((?:\1    .*\n)+)", re.MULTILINE)


def functions():
    for name, source in SOURCES.items():
        for text in EAGER.findall(source):
            yield name, ast.parse(text).body[0]


def test_eager_attention_does_what_was_judged():
    seen = 0
    for name, function in functions():
        seen += 1
        arguments = {argument.arg for argument in function.args.args}
        assert arguments <= TAKEN, (name, arguments - TAKEN)
        nodes = list(ast.walk(ast.Module(function.body, [])))
        read = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "module"
        }
        assert read <= READ, (name, read - READ)
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", None))
            for node in nodes
            if isinstance(node, ast.Call)
        }
        assert called <= DONE, (name, called - DONE)
    assert seen > 100


def test_attention_is_called_with_what_was_judged():
    seen = 0
    for name, source in SOURCES.items():
        for _, call in CALL.findall(source):
            seen += 1
            passed = set(re.findall(r"^\s+(\w+)=(?!=)", call, re.MULTILINE))
            assert passed <= PASSED, (name, passed - PASSED)
    assert seen > 100


def test_an_argument_that_is_not_known_is_refused(monkeypatch):
    module = hf.models.bert.modeling_bert

    def eager_attention_forward(module, query, key, value, attention_mask, slopes, **kwargs):
        raise AssertionError

    monkeypatch.setattr(module, "eager_attention_forward", eager_attention_forward)
    assert unknown_arguments(hf.BertModel) == ["slopes"]
    config = hf.BertConfig(**SMALL)
    message = "be 'eager' for BertModel, got 'attlas'; its attention takes slopes, which attlas"
    with pytest.raises(NotImplementedError, match=message):
        hf.BertModel._from_config(config, attn_implementation="attlas")


def pair(kind, config):
    """The model with eager attention and with attlas, of weights larger than fresh ones."""
    torch.manual_seed(1)
    eager = kind._from_config(config(), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(parameter.nan_to_num() + torch.randn_like(parameter) * 0.1)
    model = kind._from_config(config(), attn_implementation="attlas").eval()
    model.load_state_dict(eager.state_dict())
    return eager, model


def text(mask):
    torch.manual_seed(2)
    return {"input_ids": torch.randint(5, 60, (2, 12)), "attention_mask": mask}


MODELS_THAT_COMPUTE = {
    "adds the mask to its own scores": (
        "BigBirdPegasusModel",
        lambda: hf.BigBirdPegasusConfig(**TWO_SIDED, attention_type="original_full"),
    ),
    "asks the mask for zeros": (
        "DogeModel",
        lambda: hf.DogeConfig(**GROUPED, keep_window_size=5),
    ),
    "joins the mask to another": (
        "DeepseekV4Model",
        lambda: hf.DeepseekV4Config(
            **{**GROUPED, "num_key_value_heads": 1},
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            q_lora_rank=16,
            o_lora_rank=16,
            o_groups=2,
            qk_rope_head_dim=4,
            index_head_dim=8,
            index_n_heads=2,
            index_topk=2,
            sliding_window=6,
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        ),
    ),
    "joins two masks": (
        "T5Gemma2Model",
        lambda: hf.T5Gemma2Config(
            encoder={"text_config": GROUPED, "vision_config": PICTURE}, decoder=GROUPED
        ),
    ),
    "scales as GPT-2 may": (
        "GPT2Model",
        lambda: hf.GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=None,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
        ),
    ),
}


@pytest.mark.parametrize("masked", [False, True])
def test_decision_transformer_is_causal(masked):
    """Before 5.4 it was by its eager attention alone."""
    module = hf.models.decision_transformer.modeling_decision_transformer
    small = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    eager, model = pair(
        module.DecisionTransformerGPT2Model,
        lambda: hf.DecisionTransformerConfig(vocab_size=60, **small),
    )
    given = {"inputs_embeds": torch.randn(2, 12, 32)}
    if masked:
        given["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        given["attention_mask"][1, 9:] = 0
    with torch.no_grad():
        want, found = (m(**given, output_attentions=True) for m in (eager, model))
    assert gap(want[0], found[0]) <= TOLERANCE * float(want[0].abs().max())
    assert gap(want.attentions[1], found.attentions[1].to_dense()) <= TOLERANCE


@pytest.mark.parametrize("padding", ["right", "holes"])
@pytest.mark.parametrize("what", MODELS_THAT_COMPUTE)
def test_a_model_with_a_way_of_its_own_equals_eager_attention(what, padding):
    name, config = MODELS_THAT_COMPUTE[what]
    if not hasattr(hf, name):
        pytest.skip(f"this transformers has no {name}")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(9, None) if padding == "right" else slice(4, 6)] = 0
    given = text(mask)
    if name in ("BigBirdPegasusModel", "T5Gemma2Model"):
        given["decoder_input_ids"] = given["input_ids"][:, :7]
    eager, model = pair(getattr(hf, name), config)
    with torch.no_grad():
        want, found = (m(**given, output_attentions=True) for m in (eager, model))
    assert gap(want[0], found[0]) <= TOLERANCE * float(want[0].abs().max())
    theirs, ours = dict(attentions(want)), dict(attentions(found))
    assert theirs
    assert theirs.keys() == ours.keys()
    for key, weights in theirs.items():
        assert gap(weights, dense(ours[key])) <= TOLERANCE, key


@pytest.mark.parametrize("what", ["adds the mask to its own scores", "joins the mask to another"])
def test_a_compiled_model_has_the_mask_of_eager_attention_too(what):
    name, config = MODELS_THAT_COMPUTE[what]
    if not hasattr(hf, name):
        pytest.skip(f"this transformers has no {name}")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    given = text(mask)
    if name == "BigBirdPegasusModel":
        given["decoder_input_ids"] = given["input_ids"][:, :7]
    _, model = pair(getattr(hf, name), config)
    with torch.no_grad():
        want, found = (m(**given)[0] for m in (model, torch.compile(model, backend="eager")))
    assert gap(want, found) <= TOLERANCE * float(want.abs().max())


def test_a_model_of_pictures_that_calls_itself_causal_reads_all_of_them():
    eager, model = pair(
        hf.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel,
        lambda: hf.models.phi4_multimodal.Phi4MultimodalVisionConfig(**PICTURE, crop_size=16),
    )
    pictures = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want, found = (m(pictures) for m in (eager, model))
    assert gap(want[0], found[0]) <= TOLERANCE * float(want[0].abs().max())


def test_a_model_that_chooses_a_class_of_attention_is_refused_when_it_is_made():
    config = {**SMALL, "vision_config": {**PICTURE, "num_channels": 3}}
    message = "be 'eager' for GitModel, got 'attlas'; it has no class of attention for others"
    with pytest.raises(NotImplementedError, match=message):
        hf.GitModel._from_config(hf.GitConfig(**config), attn_implementation="attlas")
    model = hf.GitModel._from_config(hf.GitConfig(**config), attn_implementation="eager")
    model.set_attn_implementation({"vision_config": "attlas"})
    assert model.config.vision_config._attn_implementation == "attlas"
