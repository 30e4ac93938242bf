"""Small models of transformers with random weights, one of each kind of attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

import attlas

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
TWO_SIDED = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {**PLAIN, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
GEMMA = {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8}


class Architecture(NamedTuple):
    """How to make a model and its inputs."""

    model: str
    config: Callable[[], hf.PreTrainedConfig]
    inputs: str = "right"  # the side of padding of a text; "audio", "image" or "both"
    decoder: bool = False


ARCHITECTURES = {
    "bert": Architecture("BertModel", lambda: hf.BertConfig(**SMALL)),
    "distilbert": Architecture(
        "DistilBertModel",
        lambda: hf.DistilBertConfig(vocab_size=60, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    ),
    "roberta": Architecture("RobertaModel", lambda: hf.RobertaConfig(**SMALL)),
    "albert": Architecture("AlbertModel", lambda: hf.AlbertConfig(**SMALL, embedding_size=16)),
    "modernbert": Architecture(
        "ModernBertModel",
        lambda: hf.ModernBertConfig(
            **SMALL,
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        "left",
    ),
    "llama": Architecture("LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED), "left"),
    "mistral": Architecture(
        "MistralForCausalLM", lambda: hf.MistralConfig(**GROUPED, sliding_window=6), "left"
    ),
    "qwen3": Architecture("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**GROUPED), "left"),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
        "left",
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        lambda: hf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
        "left",
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        lambda: hf.GptOssConfig(
            **GROUPED,
            sliding_window=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "left",
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=1,
            eos_token_id=None,
        ),
        decoder=True,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(**TWO_SIDED, max_position_embeddings=64),
        decoder=True,
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(
            **TWO_SIDED,
            max_source_positions=20,
            max_target_positions=32,
            num_mel_bins=8,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "audio",
        decoder=True,
    ),
    "vit": Architecture("ViTModel", lambda: hf.ViTConfig(**PICTURE), "image"),
    "clip": Architecture(
        "CLIPModel",
        lambda: hf.CLIPConfig(
            text_config={**SMALL, "projection_dim": 16, "eos_token_id": 2},
            vision_config={**PICTURE, "projection_dim": 16},
            projection_dim=16,
        ),
        "both",
    ),
    "esm": Architecture(
        "EsmModel",
        lambda: hf.EsmConfig(**SMALL, mask_token_id=2, position_embedding_type="rotary"),
    ),
}
MODELS = Path(hf.__file__).parent / "models"
# Those that have not always used the attention interface, where they do not.
BYPASSING_HERE = {
    name
    for name in ("modernbert", "t5")
    if "ALL_ATTENTION_FUNCTIONS" not in (MODELS / name / f"modeling_{name}.py").read_text()
}
# CLIP gives attentions since 5.2, eager ones too.
ABSENT = BYPASSING_HERE | ({"clip"} if hf.__version__.startswith(("5.0.", "5.1.")) else set())
NAMES = [name for name in ARCHITECTURES if name not in ABSENT]
DECODERS = [
    name for name in NAMES if ARCHITECTURES[name].decoder or ARCHITECTURES[name].inputs == "left"
]


@cache
def _eager(name: str) -> hf.PreTrainedModel:
    """The model with eager attention; its weights are larger than those of a fresh model."""
    torch.manual_seed(1)
    wanted = ARCHITECTURES[name]
    model = getattr(hf, wanted.model)._from_config(wanted.config(), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same model with eager attention and with attlas."""
    eager = _eager(name)
    config = copy.deepcopy(eager.config)
    model = type(eager)._from_config(config, attn_implementation="attlas")
    model.load_state_dict(eager.state_dict())
    return copy.deepcopy(eager).to(dtype), model.eval().to(dtype)


def inputs(name: str, batch: int = 2, length: int = 12, dtype: Any = torch.float32) -> dict:
    """Its inputs; texts are padded on the side that suits the model."""
    wanted, found = ARCHITECTURES[name], {}
    if wanted.inputs in ("right", "left", "both"):
        found["input_ids"] = torch.randint(5, 60, (batch, length))
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, slice(0, 4) if wanted.inputs == "left" else slice(-4, None)] = 0
        found["attention_mask"] = mask
    if wanted.inputs in ("image", "both"):
        found["pixel_values"] = torch.randn(batch, 3, 16, 16, dtype=dtype)
    if wanted.inputs == "audio":
        found["input_features"] = torch.randn(batch, 8, 40, dtype=dtype)
    if wanted.decoder:
        found["decoder_input_ids"] = torch.randint(5, 60, (batch, 7))
    return found


def attentions(outputs: Any) -> Iterator[tuple[str, Any]]:
    """Every attention of the outputs, by name; those of inner models too."""
    for key, value in outputs.items():
        if key.endswith("attentions") and value is not None:
            for i, layer in enumerate(value):
                steps = layer if isinstance(layer, tuple) else (layer,)
                for j, weights in enumerate(steps):
                    yield f"{key}.{i}.{j}", weights
        elif isinstance(value, hf.utils.ModelOutput):
            for where, weights in attentions(value):
                yield f"{key}.{where}", weights


def dense(weights: Any) -> Tensor:
    """The weights as a tensor."""
    return weights.to_dense() if isinstance(weights, attlas.AttentionWeights) else weights


def real_rows(tensor: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """The tensor with 0 at queries that are padding: eager attention lets them read padding."""
    if mask is None or tensor.ndim <= dim or tensor.shape[dim] != mask.shape[1]:
        return tensor
    if tensor.shape[0] != len(mask):
        mask = mask.repeat_interleave(tensor.shape[0] // len(mask), dim=0)
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = mask.shape
    return tensor.masked_fill(mask.view(shape) == 0, 0.0)
