"""What people read attention for, against plain PyTorch on eager attention."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from examples import whisper_base
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attlas
from attlas.huggingface import (
    best_matches,
    entropy_profile,
    heavy_hitters,
    token_timestamps,
    window_scores,
)

from .architectures import TWO_SIDED, dense, inputs, pair
from .helpers import gap

TOLERANCE = 5e-6


def both(name: str, **given):
    eager, model = pair(name)
    with torch.no_grad():
        outputs = [m(**given, output_attentions=True).attentions for m in (eager, model)]
    return outputs


def test_rollout_is_the_product_of_the_layers():
    theirs, ours = both("bert", input_ids=torch.randint(5, 60, (2, 12)))
    product = torch.eye(12).expand(2, 12, 12)
    for weights in theirs:
        product = (0.5 * torch.eye(12) + 0.5 * weights.mean(1)) @ product
    assert gap(attlas.rollout(ours, start=range(12)), product) <= TOLERANCE


def test_the_entropy_profile():
    given = inputs("bert")
    eager, model = pair("bert")
    with torch.no_grad():
        layers = eager(**given, output_attentions=True).attentions
    real = given["attention_mask"].float()
    rows = [-torch.special.xlogy(w, w).sum(-1) for w in layers]
    expected = torch.stack([(r * real[:, None]).sum((0, 2)) / real.sum() for r in rows])
    assert gap(entropy_profile(model, given), expected) <= TOLERANCE
    eager.set_attn_implementation("sdpa")
    assert gap(entropy_profile(eager, given), expected) <= TOLERANCE


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_heavy_hitters(kv_heads):
    theirs, ours = both("llama", input_ids=torch.randint(5, 60, (1, 30)))
    seen = torch.arange(30, 0, -1)
    expected = theirs[0].sum(2) / seen
    expected = expected.unflatten(1, (2, 2)).mean(2)
    assert gap(heavy_hitters(ours[0], kv_heads), expected) <= TOLERANCE


def test_window_scores():
    theirs, ours = both("llama", input_ids=torch.randint(5, 60, (1, 30)))
    expected = F.avg_pool1d(theirs[1][:, :, -8:, :-8].mean(2), 5, 1, 2)
    expected = expected.unflatten(1, (2, 2)).mean(2)
    found = window_scores(ours[1], 8)
    assert found.shape == (1, 2, 30)
    assert gap(found[..., :-8], expected) <= TOLERANCE
    assert float(found[..., -8:].min()) == float(found.max())
    kept = set(found[0, 0].topk(15).indices.tolist())
    assert kept >= set(range(22, 30))


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", ["ObservedAttentionPress", "SnapKVPress"])
def test_scores_keep_the_keys_that_kvpress_keeps(name, ratio):
    kvpress = pytest.importorskip("kvpress", reason="needs kvpress, and a transformers for it")
    options = {"window_size": 8} if name == "SnapKVPress" else {}

    class Press(kvpress.ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            assert isinstance(attentions, attlas.AttentionWeights)
            heads = keys.shape[1]
            return (
                window_scores(attentions, 8, kv_heads=heads)
                if options
                else heavy_hitters(attentions, heads)
            )

    ids = torch.randint(5, 60, (1, 60))
    presses = getattr(kvpress, name)(ratio, **options), Press(ratio)
    kept = []
    for model, press in zip(pair("llama"), presses, strict=True):
        whole, cache = transformers.DynamicCache(), transformers.DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=whole)
            with press(model):
                model(ids, past_key_values=cache)
        for every, some in zip(whole.layers, cache.layers, strict=True):
            distance = torch.cdist(some.keys, every.keys)
            kept.append(distance.argmin(-1).sort(-1).values)
    assert kept[0].shape[-1] == kept[2].shape[-1] < 60
    assert kept[0].equal(kept[2])
    assert kept[1].equal(kept[3])


def test_best_matches():
    theirs, ours = both("albert", input_ids=torch.randint(5, 60, (2, 20)))
    queries, keys = [12, 15, 17], [1, 4, 5, 8, 9]
    for head in range(4):
        map_ = theirs[1][:, head]
        scores = map_[:, queries][:, :, keys] + map_[:, keys][:, :, queries].mT
        expected = torch.tensor(keys)[scores.argmax(-1)]
        assert best_matches(ours[1], head, queries, keys).equal(expected)
    assert isinstance(ours[1], attlas.AttentionWeights)
    assert gap(dense(ours[1]), theirs[1]) <= TOLERANCE


def whisper():
    models = pair("whisper")
    for model in models:
        config = model.generation_config
        config.alignment_heads = [[0, 1], [1, 2], [1, 0]]
        config.no_timestamps_token_id, config.is_multilingual = 50, False
    return models


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # theirs
@pytest.mark.parametrize("frames", [[40, 40], [30, 30], [40, 24]])
def test_token_timestamps_are_those_of_transformers(frames):
    eager, model = whisper()
    features = torch.randn(2, 8, 40)
    mask = (torch.arange(40) < torch.tensor(frames)[:, None]).long()
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    theirs = eager.generate(
        features,
        **options,
        return_token_timestamps=True,
        return_dict_in_generate=True,
        attention_mask=mask,
    )
    tokens, seconds = token_timestamps(model, features, mask, **options)
    assert tokens.equal(theirs["sequences"])
    assert gap(seconds, theirs["token_timestamps"]) <= 0.02  # one position
    assert float(seconds.max()) > 0.1
    assert model.config._attn_implementation == "attlas"


class Alive(TorchDispatchMode):
    """The most bytes at once of the tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage()._cdata: t.untyped_storage() for t in leaves if torch.is_tensor(t)}
            for leaves in (tree_leaves((args, kwargs)), tree_leaves(result))
        )
        for number in made.keys() - given.keys() - self.sizes.keys():
            self.sizes[number] = made[number].nbytes()
            weakref.finalize(made[number], self.sizes.pop, number)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def test_token_timestamps_take_the_memory_of_generation():
    """Not a copy of the cache, nor the rows of all alignment heads."""
    layers, positions, width, tokens = 4, 400, 64, 40
    config = transformers.WhisperConfig(
        **{**TWO_SIDED, "decoder_layers": layers, "d_model": width},
        max_source_positions=positions,
        num_mel_bins=8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.alignment_heads = [[layer, head] for layer in (2, 3) for head in range(4)]
    settings.no_timestamps_token_id, settings.is_multilingual = 50, False
    features = torch.randn(1, 8, 2 * positions)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with Alive() as plain:
        model.generate(features, **options)
    with Alive() as ours:
        token_timestamps(model, features, **options)
    assert plain.most >= layers * 2 * positions * width * 4  # keys and values of the encoder
    assert ours.most <= 1.2 * plain.most


def test_token_timestamps_of_one_token():
    _, model = whisper()
    _, seconds = token_timestamps(model, torch.randn(1, 8, 40), max_new_tokens=1, min_new_tokens=1)
    assert float(seconds.abs().max()) == 0


def test_messages():
    _, model = whisper()
    with pytest.raises(ValueError, match="num_beams must be 1, got 2; sample or be greedy"):
        token_timestamps(model, torch.randn(1, 8, 40), num_beams=2)
    with pytest.raises(ValueError, match="options must not have return_segments, got True; leave"):
        token_timestamps(model, torch.randn(1, 8, 40), return_segments=True)
    model.generation_config.alignment_heads = None
    with pytest.raises(ValueError, match="model must have alignment_heads in its generation conf"):
        token_timestamps(model, torch.randn(1, 8, 40))


@pytest.mark.slow
@pytest.mark.skipif(not whisper_base.INSTALLED, reason="needs requirements/whisper.txt")
def test_token_timestamps_of_whisper_base():
    """Of a tone that comes and goes; the model hears something in it, which is enough here."""
    time = torch.arange(16000 * 6) / 16000
    tone = torch.sin(1257 * time + 30 * torch.sin(19 * time)) * (torch.sin(12.6 * time) > 0) * 0.3
    extract = transformers.WhisperFeatureExtractor()
    given = extract(
        tone.numpy(), sampling_rate=16000, return_tensors="pt", return_attention_mask=True
    )
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 20, "min_new_tokens": 20}
    theirs = whisper_base.load("eager").generate(
        given.input_features,
        attention_mask=given.attention_mask,
        return_token_timestamps=True,
        return_dict_in_generate=True,
        **options,
    )
    model = whisper_base.load("sdpa")
    tokens, seconds = token_timestamps(model, given.input_features, given.attention_mask, **options)
    assert model.config._attn_implementation == "sdpa"
    assert tokens.equal(theirs["sequences"])
    assert gap(seconds, theirs["token_timestamps"]) <= 0.02  # one position
    assert float(seconds.max()) > 1
