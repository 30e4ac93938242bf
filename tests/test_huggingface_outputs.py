"""What callers ask of attentions, however they ask: what transformers' common tests check."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as hf

import attlas
import attlas.huggingface

from .architectures import ARCHITECTURES, DECODERS, NAMES, attentions, dense, inputs, pair
from .helpers import gap, same

TOLERANCE = 5e-6  # what the integration promises in float32


def form(value: Any) -> Any:
    """The names, lengths and shapes of outputs; lazy weights count as tensors."""
    if isinstance(value, torch.Tensor | attlas.AttentionWeights):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, hf.utils.ModelOutput):
        return {key: form(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [form(inner) for inner in value]
    return type(value)


def asking(name: str) -> hf.PreTrainedModel:
    """The model with output_attentions in its config, which comes before the implementation."""
    eager, model = pair(name)
    parts = [getattr(eager.config, part) for part in eager.config.sub_configs]
    for config in filter(None, [eager.config, *parts]):
        config.output_attentions = True
    asked = type(eager)._from_config(eager.config, attn_implementation="attlas").eval()
    asked.load_state_dict(model.state_dict())
    return asked


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_form_of_those_of_eager_attention(name, hidden, return_dict):
    """As many attentions as there are layers, [B, heads, L, S] each, at their place."""
    given = inputs(name) | {"output_attentions": True, "output_hidden_states": hidden}
    eager, lazy = (model(**given, return_dict=return_dict) for model in pair(name))
    assert form(lazy) == form(eager)
    if return_dict:
        found = dict(attentions(lazy))
        kinds = {key.rsplit(".", 2)[0] for key in found}
        assert len(found) == 2 * len(kinds)  # of two layers
        assert len(kinds) == (3 if ARCHITECTURES[name].decoder else 2 if name == "clip" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_change_nothing_of_the_attentions(name):
    _, model = pair(name)
    given = inputs(name) | {"output_attentions": True}
    with torch.no_grad():
        plain, more = model(**given), model(**given, output_hidden_states=True)
    expected, found = dict(attentions(plain)), dict(attentions(more))
    assert all(same(dense(found[key]), dense(expected[key])) for key in expected)


# --- asked for in the config ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_config_asks_as_the_argument_does(name):
    _, model = pair(name)
    given = inputs(name)
    with torch.no_grad():
        expected = dict(attentions(model(**given, output_attentions=True)))
        assert not dict(attentions(model(**given)))
        model = asking(name)
        found = dict(attentions(model(**given)))
        assert found.keys() == expected.keys()
        assert all(isinstance(weights, attlas.AttentionWeights) for weights in found.values())
        assert all(same(dense(found[key]), dense(expected[key])) for key in expected)
        assert not dict(attentions(model(**given, output_attentions=False)))


def test_output_attentions_comes_before_the_implementation(tmp_path):
    """transformers accepts it for eager attention, and any implementation after it."""
    pair("bert")[0].save_pretrained(tmp_path)
    first = hf.AutoModel.from_pretrained(tmp_path, output_attentions=True)
    first.set_attn_implementation("attlas")
    config = hf.AutoConfig.from_pretrained(tmp_path, output_attentions=True)
    second = hf.AutoModel.from_pretrained(tmp_path, config=config, attn_implementation="attlas")
    third = hf.AutoModel.from_config(config, attn_implementation="attlas")
    for model in (first, second, third):
        found = model.eval()(**inputs("bert")).attentions
        assert [type(weights) for weights in found] == [attlas.AttentionWeights] * 2


def test_output_attentions_together_with_the_implementation_is_refused_by_transformers(tmp_path):
    pair("bert")[0].save_pretrained(tmp_path)
    both = {"attn_implementation": "attlas", "output_attentions": True}
    for make in (hf.AutoModel.from_pretrained, hf.AutoConfig.from_pretrained):
        with pytest.raises(Exception, match="`output_attentions` attribute is not supported"):
            make(tmp_path, **both)
    config = pair("bert")[1].config
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        config.output_attentions = True


def test_the_implementation_is_not_saved_with_the_model(tmp_path):
    _, model = pair("llama")
    model.save_pretrained(tmp_path)
    assert "attlas" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert "attlas" not in (tmp_path / "generation_config.json").read_text()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    lazy = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attlas").eval()
    given = inputs("llama") | {"output_attentions": True}
    with torch.no_grad():
        for before, after in zip(*(m(**given).attentions for m in (model, lazy)), strict=True):
            assert same(dense(before), dense(after))


# --- gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_retain_gradients_beside_attentions(name):
    given = inputs(name) | {"output_attentions": True, "output_hidden_states": True}
    given.pop("attention_mask", None)  # rows of padding differ
    found = []
    for model in pair(name):
        outputs = model(**given)
        parts = [part for part in outputs.values() if isinstance(part, hf.utils.ModelOutput)]
        kept = [
            value[0]
            for output in [outputs, *parts]
            for key, value in output.items()
            if key.endswith("hidden_states") and isinstance(value, tuple)
        ]
        for hidden in kept:
            hidden.retain_grad()
        key = next(k for k in ("logits", "last_hidden_state", "logits_per_image") if k in outputs)
        outputs[key].flatten()[0].backward()
        found.append([hidden.grad for hidden in kept])
    assert found[0]
    for theirs, ours in zip(*found, strict=True):
        assert gap(ours, theirs) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_the_output_is_not_made_of_the_attentions():
    """A gradient of the weights themselves would be that of a matrix which never was."""
    _, model = pair("bert")
    weights = model(**inputs("bert"), output_attentions=True).attentions[0]
    with pytest.raises(AttributeError, match=r"got .retain_grad; the output is not computed from"):
        weights.retain_grad()
    weights.to_dense().square().sum().backward()  # but what is read has one
    assert float(model.encoder.layer[0].attention.self.query.weight.grad.abs().max()) > 0


# --- generation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_attentions_in_the_form_of_eager_attention(name, options):
    """A tuple of steps of tuples of layers, with texts of two lengths in the batch."""
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    found = []
    for model in pair(name):
        torch.manual_seed(5)
        found.append(
            model.generate(
                **given,
                **({"do_sample": False} | options),
                max_new_tokens=4,
                min_new_tokens=4,
                output_attentions=True,
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        )
    eager, lazy = found
    assert lazy.sequences.equal(eager.sequences)
    assert list(eager) == list(lazy)
    for key in (key for key in eager if key.endswith(("attentions", "hidden_states"))):
        assert form(lazy[key]) == form(eager[key])
    theirs, ours = dict(attentions(eager)), dict(attentions(lazy))
    for key, weights in ours.items():
        assert gap(dense(weights)[:, :, -1], theirs[key][:, :, -1]) <= TOLERANCE


# --- graphs -----------------------------------------------------------------------------

TRACED = ["bert", "mistral", "bart"]


@pytest.mark.parametrize("name", TRACED)
def test_a_compiled_model_gives_lazy_weights_without_a_break_of_its_graph(name):
    _, model = pair(name)
    given = inputs(name) | ({} if name == "bert" else {"use_cache": False})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, found = (m(**given, output_attentions=True) for m in (model, compiled))
    assert gap(found[0], expected[0]) <= TOLERANCE
    for (_, want), (_, weights) in zip(attentions(expected), attentions(found), strict=True):
        assert isinstance(weights, attlas.AttentionWeights)
        assert gap(dense(weights), dense(want)) <= TOLERANCE


class Logits(torch.nn.Module):
    """A model as a function of tensors, to be exported."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask)[0]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_export(name):
    _, model = pair(name)
    model.config.use_cache = False
    given = inputs(name)
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        exported = torch.export.export(Logits(model), (ids, mask)).module()
        for other in (mask, mask.flip(0)):  # padding is no constant of the graph
            assert gap(exported(ids, other), Logits(model)(ids, other)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")  # of torch.jit, and of what it looks at in a model
def test_torch_jit_is_refused():
    _, model = pair("bert")
    given = tuple(inputs("bert").values())
    message = r"implementation must be 'eager' or 'sdpa' for torch.jit.trace, got 'attlas', which"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        torch.jit.trace(Logits(model), given)


# --- memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_own_memory_alone(name):
    """Not that of values, which some models compute in one tensor with queries and keys."""
    _, model = pair(name)
    with torch.no_grad():
        outputs = model(**inputs(name), output_attentions=True)
    for _, weights in attentions(outputs):
        for tensor in (weights.query, weights.key):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
