"""`attlas.nn.capture`: weights are right, outputs have torch's bits, nothing stays behind."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from tests.helpers import Watch, gap, plain, same
from torch import nn
from torch.nn import functional as F

import attlas
from attlas.nn import capture

N, L, E, H = 2, 6, 16, 4
CLOSE = 1e-6  # float32, weights of at most 1, a few sums of E products


class Attention(nn.Module):
    """Attention as people write it."""

    def __init__(self, kv_heads: int = H, **options) -> None:
        super().__init__()
        self.query, self.kv = nn.Linear(E, E), nn.Linear(E, 2 * E * kv_heads // H)
        self.kv_heads, self.options = kv_heads, options

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key, value = self.kv(x).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (n, -1)).transpose(1, 2)
            for t, n in zip(
                (self.query(x), key, value), (H, self.kv_heads, self.kv_heads), strict=True
            )
        )
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = F.scaled_dot_product_attention(*self.heads(x), **self.options)
        return output.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two of them, the first called twice, and a call in the model itself."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(**options), Attention(**options)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.blocks
        x = second(first(x) + first(2 * x))
        return x + F.scaled_dot_product_attention(x, x, x)


def encoder(**options) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.2, **options}
    layer = nn.TransformerEncoderLayer(E, H, 32, **options)
    nested = options["batch_first"] and not options.get("norm_first", False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def weights_of(model: nn.TransformerEncoder, x: torch.Tensor, **masks) -> list[torch.Tensor]:
    """What each layer attends with, by torch's slow path with dense weights."""
    found = []
    for layer in model.layers:
        inner = layer.norm1(x) if layer.norm_first else x
        options = {"need_weights": True, "average_attn_weights": False, **masks}
        attend = F.multi_head_attention_forward
        attn = layer.self_attn
        parts = (attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0)
        inner = inner.transpose(0, 1) if attn.batch_first else inner
        out = attn.out_proj
        _, weights = attend(
            *(inner, inner, inner, E, H, *parts, out.weight, out.bias), training=False, **options
        )
        found.append(weights)
        names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
        x = layer(x, **{names[name]: mask for name, mask in masks.items()})
    return found


PADDING = torch.arange(L) >= torch.tensor([[L], [4]])
CAUSAL = torch.ones(L, L).triu(1).bool()
MASKS = {"none": {}, "causal": {"mask": CAUSAL}, "padding": {"src_key_padding_mask": PADDING}}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_in_evaluation(grad, batch_first, norm_first, mask):
    model = encoder(batch_first=batch_first, norm_first=norm_first).eval()
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    with torch.set_grad_enabled(grad):
        output = model(x, **MASKS[mask])
        with capture(model) as captured:
            found = model(x, **MASKS[mask])
    assert same(found, output)
    assert list(captured) == ["layers.0.self_attn", "layers.1.self_attn"]
    names = {"mask": "attn_mask", "src_key_padding_mask": "key_padding_mask"}
    masks = {names[name]: value for name, value in MASKS[mask].items()}
    with torch.no_grad():
        want = weights_of(model, x, **masks)
    for calls, dense in zip(captured.values(), want, strict=True):
        assert len(calls) == 1
        assert calls[0].requires_grad == grad
        if mask == "padding" and not grad and batch_first and not norm_first:
            assert not calls[0].to_dense()[PADDING[:, None].expand(N, H, L)].any()
            dense = dense.masked_fill(PADDING[:, None, :, None], 0.0)  # a nested tensor
        assert gap(calls[0].to_dense(), dense) < 5 * CLOSE


def operators(model: nn.Module, *args, **kwargs) -> list[str]:
    with Watch() as watch, torch.no_grad():
        model(*args, **kwargs)
    return watch.names


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_is_kept():
    class Around(nn.Module):
        """A module in which the mode is on, around torch's."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, **masks):
            x = F.scaled_dot_product_attention(x, x, x)
            return self.inner(x, **masks)

    x = torch.randn(N, L, E)
    model = Around(encoder()).eval()
    fast = "_transformer_encoder_layer_fwd"
    for masks in MASKS.values():
        assert operators(model, x, **masks).count(fast) == 2
        with capture(model) as captured:
            assert operators(model, x, **masks).count(fast) == 2
        assert list(captured) == ["", "inner.layers.0.self_attn", "inner.layers.1.self_attn"]

    attention = nn.MultiheadAttention(E, H, batch_first=True).eval()
    with capture(attention) as captured, Watch() as watch, torch.no_grad():
        attention(x, x, x)
    assert "_native_multi_head_attention" in watch.names
    assert list(captured) == [""]


def test_the_hint_alone_masks_nothing_where_torch_does_not_read_it():
    layer, x = encoder().layers[0].eval(), torch.randn(N, L, E)
    with capture(layer) as captured, torch.no_grad():
        assert same(layer(x, is_causal=True), layer(x))
    hinted, plainly = captured["self_attn"]
    assert same(hinted.to_dense(), plainly.to_dense())
    with capture(layer) as captured:
        assert gap(layer(x, CAUSAL, is_causal=True), layer(x, CAUSAL)) < 10 * CLOSE
    assert not captured["self_attn"][0].to_dense()[..., CAUSAL].any()


def test_training_with_dropout_draws_the_same_numbers():
    model, x = encoder(), torch.randn(N, L, E)
    torch.manual_seed(1)
    output = model(x)
    with capture(model) as captured:
        torch.manual_seed(1)
        assert same(model(x), output)
    first = captured["layers.0.self_attn"][0]
    with torch.no_grad():
        want = weights_of(model.eval(), x)[0]
    assert gap(first.to_dense(), want) < CLOSE  # before dropout


def test_gradients_reach_the_model_through_captured_weights():
    model, x = encoder().eval(), torch.randn(N, L, E)
    with capture(model) as captured:
        model(x)
    with torch.no_grad():  # read first where no gradients are wanted
        captured["layers.1.self_attn"][0].entropy()
    captured["layers.1.self_attn"][0].entropy().sum().backward()
    found = model.layers[0].linear1.weight.grad.clone()
    model.zero_grad()
    dense = weights_of(model, x)[1]
    (-torch.special.xlogy(dense, dense).sum()).backward()
    want = model.layers[0].linear1.weight.grad
    assert want.abs().max() > 1e-3
    assert gap(found, want) < 1e-4 * float(want.abs().max())
    assert (
        model.layers[1].linear1.weight.grad is None or not model.layers[1].linear1.weight.grad.any()
    )


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "grouped heads": {"kv_heads": 2, "enable_gqa": True},
    "one key head": {"kv_heads": 1, "enable_gqa": True, "is_causal": True},
    "mask": {"attn_mask": ~CAUSAL},
    "mask of heads": {"attn_mask": torch.rand(H, L, L) > 0.4},
    "mask of keys": {"attn_mask": ~PADDING[:, None, None]},
    "bias": {"attn_mask": torch.linspace(-2, 2, H * L * L).view(H, L, L)},
    "bias with empty rows": {"attn_mask": torch.zeros(L, L).masked_fill(CAUSAL.mT, -math.inf)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_model_that_calls_the_function(options):
    model, x = Model(**options), torch.randn(N, L, E)
    output = model(x)
    with capture(model) as captured:
        assert same(model(x), output)
    assert {name: len(calls) for name, calls in captured.items()} == {
        "blocks.0": 2,
        "blocks.1": 1,
        "": 1,
    }
    assert captured[""][0].shape == (N, L, L)  # there are no heads
    given = {k: v for k, v in options.items() if k in ("is_causal", "scale", "enable_gqa")}
    mask = options.get("attn_mask")
    if mask is not None:
        given["bias" if mask.is_floating_point() else "mask"] = mask
    for call, weights in enumerate(captured["blocks.0"]):
        want = plain(*model.blocks[0].heads((1 + call) * x), **given)[1]
        assert gap(weights.to_dense(), want) < CLOSE
    for heads in ([2], [3, 0]):
        with capture(model, heads=heads, layers="blocks.*") as some:
            model(x)
        assert gap(some["blocks.0"][-1].to_dense(), want[:, heads]) < CLOSE


@pytest.mark.parametrize("shape", [(L, E), (3, L, E), (2, 3, L, E), (2, 2, 3, L, E)])
def test_any_number_of_dimensions(shape):
    class Function(nn.Module):
        def forward(self, q, k, mask):
            return F.scaled_dot_product_attention(q, k, k, mask)

    q, model = torch.randn(shape), Function()
    key = torch.randn(*shape[:-2], L + 1, E)
    for mask in (None, torch.rand(*shape[:-1], L + 1) > 0.3, torch.rand(L, L + 1) > 0.3):
        scores = q @ key.mT / math.sqrt(E)
        if mask is not None:
            mask[..., 0] = True
            scores = scores.masked_fill(~mask, -math.inf)
        with capture(model) as captured:
            model(q, key, mask)
        weights = captured[""][0].to_dense()
        assert weights.ndim == min(max(len(shape), 3), 4)
        assert gap(weights.view(scores.shape), scores.softmax(-1)) < CLOSE


def test_grouped_heads_without_a_batch():
    class Function(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    q, k = torch.randn(4, L, E), torch.randn(2, L, E)
    model = Function()
    with capture(model) as captured:
        model(q, k)
    want = (q @ k.repeat_interleave(2, 0).mT / math.sqrt(E)).softmax(-1)
    assert gap(captured[""][0].to_dense()[0], want) < CLOSE


def test_ours_and_the_functional_form_of_multi_head_attention():
    class Mine(nn.MultiheadAttention):
        def forward(self, x):
            x = x.transpose(0, 1)
            parts = (self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, True, 0.0)
            out = (self.out_proj.weight, self.out_proj.bias)
            return F.multi_head_attention_forward(
                x, x, x, E, H, *parts, *out, attn_mask=CAUSAL, average_attn_weights=False
            )

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.mine = Mine(E, H, add_bias_kv=True)
            self.ours = attlas.nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x):
            return self.mine(x), self.ours(x, x, x, is_causal=True, return_weights="lazy")

    model, x = Both(), torch.randn(N, L, E)
    with capture(model) as captured:
        mine, ours = model(x)
    assert same(mine[0], model(x)[0][0])
    assert same(ours[0], model(x)[1][0])
    assert list(captured) == ["mine", "ours"]
    assert captured["mine"][0].shape == (N, H, L, L + 2)
    assert gap(captured["mine"][0].to_dense(), mine[1]) < CLOSE
    assert gap(captured["ours"][0].to_dense(), ours[1].to_dense()) < CLOSE


CHOICES = {
    "a name": ("layers.1.self_attn", ["layers.1.self_attn"]),
    "what is inside": ("layers.1", ["layers.1.self_attn"]),
    "a pattern": ("*.self_attn", ["layers.0.self_attn", "layers.1.self_attn"]),
    "a number": (1, ["layers.1.self_attn"]),
    "several": ([0, "layers.1"], ["layers.0.self_attn", "layers.1.self_attn"]),
    "none": ([], []),
    "too large a number": ([2], []),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_layers(choice):
    layers, names = CHOICES[choice]
    model = encoder()
    for mode in (model.train(), model.eval()):
        with capture(mode, layers) as captured, torch.no_grad():
            mode(torch.randn(N, L, E))
        assert list(captured) == names


def test_a_forward_that_the_user_replaced():
    layer, x = nn.MultiheadAttention(E, H, batch_first=True).eval(), torch.randn(N, L, E)
    run = layer.forward
    layer.forward = lambda x: run(x, x, 2 * x, attn_mask=CAUSAL)  # takes other arguments
    with capture(layer) as captured:
        layer(x)
    assert not captured[""][0].to_dense()[..., CAUSAL].any()


def test_other_models_of_torch():
    model = nn.Transformer(E, H, 1, 2, 32, batch_first=True).eval()
    x, y = torch.randn(N, L, E), torch.randn(N, 3, E)
    with torch.no_grad():
        output = model(x, y)
        with capture(model) as captured:
            assert same(model(x, y), output)
    shapes = {name: list(calls[0].shape) for name, calls in captured.items()}
    assert shapes == {
        "encoder.layers.0.self_attn": [N, H, L, L],
        "decoder.layers.0.self_attn": [N, H, 3, 3],
        "decoder.layers.0.multihead_attn": [N, H, 3, L],
        "decoder.layers.1.self_attn": [N, H, 3, 3],
        "decoder.layers.1.multihead_attn": [N, H, 3, L],
    }


def test_nested_captures_and_functions_outside():
    model, x = Model(), torch.randn(N, L, E)
    with capture(model) as outer:
        model(x)
        with capture(model.blocks[1]) as inner:
            model(x)
        F.scaled_dot_product_attention(x, x, x)  # of no module
        model.blocks[1](x)
    assert {name: len(calls) for name, calls in outer.items()} == {
        "blocks.0": 4,
        "blocks.1": 3,
        "": 2,
    }
    assert {name: len(calls) for name, calls in inner.items()} == {"": 1}
    assert gap(inner[""][0].to_dense(), outer["blocks.1"][1].to_dense()) == 0


def forwards(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if "forward" in vars(part)]


def modes() -> int:
    return len(torch.overrides._get_current_function_mode_stack())


def test_everything_is_restored_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.model = encoder(), Model()

        def forward(self, x):
            self.model(self.encoder(x))
            raise KeyboardInterrupt

    model, x = Fails().eval(), torch.randn(N, L, E)
    own = model.model.blocks[0].forward
    model.model.blocks[0].forward = own  # an attribute that is not ours to remove
    with capture(model):
        assert len(forwards(model)) > 3
    with pytest.raises(KeyboardInterrupt), capture(model) as captured:
        model(x)
    assert forwards(model) == ["model.blocks.0"]
    assert model.model.blocks[0].forward is own
    assert modes() == 0
    assert len(captured) == 5
    assert captured["model.blocks.1"][0].shape == (N, H, L, L)  # what was kept can be read
    model.model(x)
    assert len(captured["model.blocks.1"]) == 1


def test_captures_that_end_in_another_order():
    model, x = Model(), torch.randn(N, L, E)
    first, second = capture(model), capture(model)
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(x)
    second.__exit__(None, None, None)
    assert (len(one), len(two)) == (0, 3)
    assert not forwards(model)


def test_threads_have_their_own():
    model, x = Model(), torch.randn(N, L, E)
    turn, seen = threading.Barrier(2, timeout=30), {}

    def work(size):
        with capture(model) as captured:
            turn.wait()
            for _ in range(size):
                model(x)
            turn.wait()
        seen[size] = len(captured["blocks.1"])

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1: 1, 3: 3}
    assert not forwards(model)


def test_a_mode_of_the_users_is_left_on():
    class Inner(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            with Inner():
                return self.encoder(x)

    model, x = Around().eval(), torch.randn(N, L, E)
    with torch.no_grad():
        output = model(x)
        with capture(model) as captured:
            assert same(model(x), output)
        assert list(captured) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
        assert [len(calls) for calls in captured.values()] == [1, 1]


@pytest.mark.parametrize("inference", [False, True])
def test_a_cache_that_is_written_to_again(inference):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = torch.zeros(1, 2, L, E)

        def forward(self, x):
            self.cache[...] = x
            return F.scaled_dot_product_attention(x, self.cache, self.cache)

    first, second = torch.randn(2, 1, 2, L, E)
    with torch.inference_mode(inference):
        model = Cached()
        with capture(model) as captured:
            model(first)
            model(second)
    for weights, x in zip(captured[""], (first, second), strict=True):
        assert gap(weights.to_dense(), plain(x, x, x)[1]) < CLOSE


def test_nothing_is_computed_before_it_is_asked_for():
    size = 512

    class Function(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    model, q = Function(), torch.randn(1, 2, size, 8)
    with Watch() as plainly:
        model(q)
    with capture(model) as captured, Watch() as watch:
        model(q)
        text = repr(captured) + repr(captured[""])
    assert watch.products == plainly.products
    assert watch.largest == plainly.largest
    assert text == (
        "Captured(1 module)\n  '': Calls([1, 2, 512, 512]; lazy)Calls([1, 2, 512, 512]; lazy)"
    )
    with Watch() as watch:
        assert captured[""][0] is captured[""][0]
        captured[""][0].entropy()
    assert 0 < watch.largest < size * size
    model, x = encoder().eval(), torch.randn(1, size, E)
    with Watch() as watch, capture(model) as captured, torch.no_grad():
        model(x)
        watch.largest = 0  # torch's fast path makes the matrix itself
        captured["layers.0.self_attn"][0].received()
    assert 0 < watch.largest < size * size
    with capture(model) as captured, torch.no_grad():
        for _ in range(5):
            model(x[:, :3])
    assert repr(captured["layers.1.self_attn"]) == (
        "Calls([1, 4, 3, 3], [1, 4, 3, 3], [1, 4, 3, 3], ... 2 more; lazy)"
    )
    assert [w.shape[2] for w in captured["layers.1.self_attn"][1:3]] == [3, 3]


BAD = {
    "module must be a torch.nn.Module, got function": (len, {}),
    "layers must be names of modules, or fit some, got 'layer.0'": (None, {"layers": "layer.0"}),
    "layers must be at least 0, got -1": (None, {"layers": [-1]}),
    "layers must be names, patterns or numbers of modules, got float": (None, {"layers": [1.0]}),
    "heads must be at least 0, got -1": (None, {"heads": -1}),
    "heads must be ints, got str": (None, {"heads": ["a"]}),
    "heads must be below the 4 of the layer, got [0, 4]": (None, {"heads": [0, 4]}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    module, options = BAD[message]
    module = encoder() if module is None else F.relu
    with (
        pytest.raises((TypeError, ValueError)) as error,
        capture(module, **options),
    ):
        module(torch.randn(N, L, E))
    assert str(error.value).startswith(f"{message}; ")
    assert module is F.relu or not forwards(module)


def test_what_it_cannot_do():
    compiled = torch.compile(encoder(), backend="eager")
    with pytest.raises(NotImplementedError, match="module must be in eager mode, got Optimized"):
        capture(compiled).__enter__()
    model = encoder()
    model.compile(backend="eager")
    with pytest.raises(NotImplementedError, match="module must be in eager mode, got Transformer"):
        capture(model).__enter__()

    class Function(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    model, x = Model(), torch.randn(N, L, E)
    compiled = torch.compile(model, backend="eager")
    output = compiled(x)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="module must be in eager"), capture(model):
            compiled(x)
        assert same(compiled(x), output)

    class Part(Model):
        forward = torch.compile(Model.forward, backend="eager")

    model = Part()
    with pytest.raises(NotImplementedError, match="module must be in eager"), capture(model):
        model(x)
    assert not forwards(model)
    torch._dynamo.reset()

    parts = [torch.randn(n, 2, E) for n in (3, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    model = Function()
    with pytest.raises(NotImplementedError, match="query must be a dense tensor"), capture(model):
        model(x)

    class Static(nn.Module):
        def forward(self, x):
            k = torch.zeros(N * H, L, E // H)
            parts = (torch.zeros(3 * E, E), None, None, None, False, 0.0, torch.zeros(E, E), None)
            return F.multi_head_attention_forward(x, x, x, E, H, *parts, static_k=k, static_v=k)

    model = Static()
    with pytest.raises(NotImplementedError, match="static_k and static_v must be"), capture(model):
        model(torch.randn(L, N, E))
