"""PyTorch's transforms over attention and its readouts: each against the same of the reference."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import pytest
import torch
from tests.helpers import KERNELS, gap, qkv
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import attlas
from attlas import encoding, masks, operators
from attlas.dropout import Dropout

func = torch.func
CLOSE = 1e-9  # float64, a few hundred sums

OPTIONS = {
    "nothing masked": {},
    "causal": {"is_causal": True},
    "padding": {"mask": masks.padding(torch.tensor([5, 2]))},
    "dense mask": {"mask": torch.ones(5, 5).tril(1).bool()},
    "documents": {"mask": masks.documents(torch.tensor([0, 0, 1, 1, 1])) | masks.prefix(1)},
    "inverted": {"mask": ~masks.sliding_window(0, 0)},
    "bias and window": {
        "bias": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5),
        "window_size": (2, 1),
        "causal_alignment": "lower_right",
    },
    "softcap and sinks": {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0], dtype=torch.float64)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_kernel = pytest.mark.parametrize("impl", KERNELS)


def loss(query, key, value, **options):
    """A number to which the output and readouts of every kind contribute."""
    output, weights = attlas.attention(query, key, value, **options)
    parts = [output, weights.entropy(), weights.received(), weights.topk(2).values]
    parts += [weights.mean_distance(), weights.pool(2), weights[..., 0, :]]
    parts += [torch.matmul(weights, value), torch.matmul(weights.T, output)]
    return torch.stack([part.square().sum() for part in parts]).sum()


def by_reference(transform, *inputs, **options):
    return transform(lambda *t: loss(*t, impl="reference", **options))(*inputs)


@every_kernel
@every_option
def test_torch_func_grad(impl, options):
    inputs = qkv()
    three = {"argnums": (0, 1, 2)}
    found = func.grad(lambda *t: loss(*t, impl=impl, **options), **three)(*inputs)
    want = by_reference(lambda fn: func.grad(fn, **three), *inputs, **options)
    assert all(gap(a, b) < CLOSE for a, b in zip(found, want, strict=True))


@every_kernel
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's
def test_jvp_and_second_derivatives(impl):
    query, key, value = qkv(batch=1, queries=3, size=2)

    def one(impl):
        return lambda q: loss(q, key, value, impl=impl, is_causal=True)

    def twice(impl):
        return func.grad(lambda q: func.grad(one(impl))(q).square().sum())(query)

    tangent = torch.randn_like(query)
    pushed = [func.jvp(one(i), (query,), (tangent,))[1] for i in (impl, "reference")]
    assert gap(*pushed) < CLOSE
    assert gap(func.hessian(one(impl))(query), func.hessian(one("reference"))(query)) < CLOSE
    assert gap(twice(impl), twice("reference")) < CLOSE


@every_kernel
@pytest.mark.parametrize("transform", [lambda fn: fn, func.grad], ids=["values", "gradients"])
def test_vmap(impl, transform):
    inputs = [tensor.unsqueeze(1) for tensor in qkv(batch=3)]
    masked = {"mask": masks.causal() & masks.from_function(lambda b, h, q, k: (q - k) % 3 != 1)}
    found = torch.vmap(transform(lambda *t: loss(*t, impl=impl, **masked)))(*inputs)
    for i in range(3):
        alone = [tensor[i] for tensor in inputs]
        assert gap(found[i], by_reference(transform, *alone, **masked)) < CLOSE


def test_vmap_over_nothing():
    inputs = [tensor.unsqueeze(1)[:0] for tensor in qkv(batch=3)]

    def fn(*tensors):
        output, weights = attlas.attention(*tensors)
        return output, weights.topk(2).values

    output, values = torch.vmap(fn)(*inputs)
    assert output.shape == (0, 1, 2, 5, 4)
    assert values.shape == (0, 1, 2, 5, 2)


def test_vmap_over_a_mask():
    query, key, value = qkv(batch=1)
    rules = torch.rand(4, 1, 1, 5, 5) > 0.4

    def one(mask):
        return attlas.attention(query, key, value, mask).output

    want = torch.stack([one(mask) for mask in rules])
    assert gap(torch.vmap(one)(rules), want) == 0


@every_kernel
def test_batched_gradients(impl):
    """`is_grads_batched` raised that a tensor has no storage, or that torch has no rule."""
    query, key, value = qkv(batch=1, queries=3, size=2, grad=True)

    def results(query, impl=impl):
        output, weights = attlas.attention(query, key, value, is_causal=True, impl=impl)
        return output, weights.entropy(), weights.topk(2).values, weights.received()

    found = torch.autograd.functional.jacobian(results, query, vectorize=True)
    want = torch.autograd.functional.jacobian(lambda q: results(q, "reference"), query)
    assert all(gap(a, b) < CLOSE for a, b in zip(found, want, strict=True))

    def total(query, impl=impl):
        return loss(query, key, value, impl=impl)

    found = torch.autograd.functional.hessian(total, query, vectorize=True)
    want = torch.autograd.functional.hessian(lambda q: total(q, "reference"), query)
    assert gap(found, want) < CLOSE
    assert torch.autograd.gradcheck(
        lambda *t: attlas.attention(*t, impl=impl).output,
        (query, key, value),
        check_batched_grad=True,
    )
    with pytest.raises(NotImplementedError, match=r"create_graph must be False .*func.jacrev"):
        torch.autograd.functional.jacobian(results, query, vectorize=True, create_graph=True)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda fn, **options: torch.compile(fn, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


@every_option
def test_torch_compile_without_a_graph_break(compiled, options):
    inputs, again = qkv(grad=True), None
    again = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = compiled(lambda *t: loss(*t, **options))(*inputs)
    want = loss(*again, impl="reference", **options)
    assert gap(value, want) < CLOSE
    for a, b in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(want, again), strict=True
    ):
        assert gap(a, b) < CLOSE


def test_a_compiled_function_returns_lazy_weights(compiled):
    inputs = qkv()
    output, weights = compiled(lambda *t: attlas.attention(*t, is_causal=True))(*inputs)
    want = attlas.attention(*inputs, is_causal=True)
    assert isinstance(weights, attlas.AttentionWeights)
    assert gap(output, want.output) == 0
    assert gap(weights.entropy(), want.weights.entropy()) == 0


def test_torch_compile_with_dynamic_shapes(compiled):
    fn = compiled(lambda *t: loss(*t, is_causal=True), dynamic=True)
    for length in (5, 6, 9):
        inputs = qkv(queries=length)
        assert gap(fn(*inputs), loss(*inputs, is_causal=True)) < CLOSE


def test_the_teaching_function_compiles_and_still_checks_its_mask(compiled):
    inputs = qkv()
    fn = compiled(attlas.scaled_dot_product_attention)
    mask = torch.ones(5, 5).tril()
    for a, b in zip(
        fn(*inputs, mask), attlas.scaled_dot_product_attention(*inputs, mask), strict=True
    ):
        assert gap(a, b) < CLOSE
    with pytest.raises(RuntimeError, match="mask must hold only 1"):
        fn(*inputs, mask * 2)


def test_what_only_python_can_hold_is_refused_by_name_while_compiling(compiled):
    mask = masks.from_function(lambda b, h, q, k: q >= k)
    with pytest.raises(Exception, match="mask must be made of tensors and numbers, got Function"):
        compiled(lambda *t: attlas.attention(*t, mask).output)(*qkv())

    q = qkv()[0]
    for readout in (lambda w: w.guided(lambda b, h, q, k: q - k), lambda w: w.map_rows(torch.sum)):
        with pytest.raises(Exception, match="statistic must be made of tensors and numbers, got"):
            compiled(lambda q, of=readout: of(attlas.attention(q, q, q).weights))(q)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch asks it
@pytest.mark.parametrize("grad", [False, True])
def test_what_only_python_can_hold_is_called_by_python_where_the_graph_may_break(grad):
    """`map_rows` gave (), silently: the empty result of the tensors that trace it."""
    torch._dynamo.reset()
    query = qkv(grad=grad)[0]

    def fn(query):
        mask = masks.from_function(lambda b, h, q, k: q >= k)
        weights = attlas.attention(query, query, query, mask).weights
        parts = [weights.guided(lambda b, h, q, k: q - k), weights.topk(2, -1, largest=False)[0]]
        mean = weights.head_mean().map_rows(lambda rows: rows.square().sum(-1))
        return sum(part.sum() for part in (*parts, mean))

    found, want = torch.compile(fn, backend="aot_eager")(query), fn(query)
    assert gap(found, want) < CLOSE
    if grad:
        assert gap(*(torch.autograd.grad(value, query)[0] for value in (found, want))) < CLOSE


def test_rows_cannot_be_mapped_by_fake_tensors():
    with FakeTensorMode():
        x = torch.randn(1, 2, 4, 8)
        weights = attlas.attention(x, x, x).weights
        assert weights.guided(lambda b, h, q, k: q - k).shape == (1, 2, 4)
        with pytest.raises(NotImplementedError, match="statistic must know the shapes of its"):
            weights.map_rows(lambda rows: rows.sum(-1))


def weights_only(query, key, value):
    """A number to which other readouts contribute, and value does not."""
    lengths = torch.full((2,), key.shape[2] - 1)
    first = attlas.attention(query, key, value, masks.padding(lengths), sinks=SINKS).weights
    second = attlas.attention(key, query, value, bias=query[..., :1], softcap=3.0).weights
    mean, target = first.head_mean(), torch.arange(query.shape[2]) - 1
    parts = [second.kl_divergence(first.detach()), first.cross_entropy(second.detach())]
    parts += [first.cross_entropy(target), second.cross_entropy(value.softmax(-2)[..., :1].mT)]
    parts += [mean.entropy(), mean.topk(2).values, mean.received("max"), mean[..., 0, :]]
    parts += [torch.matmul(mean, key[:, 0]), torch.matmul(mean.T, key[:, 0]), mean.pool(2)]
    parts += [mean.kl_divergence(second.head_mean()), mean.to_dense(), first.mass([0, 1])]
    parts += [first.mass(slice(1, None))]
    parts += [attlas.rollout([first, second], start=0), second.windowed_mass(1, 0)]
    parts += [first.quantile(0.6), mean.quantile(0.6), first[..., torch.tensor([0, 2]), :]]
    parts = [part.double().masked_fill(part == torch.inf, 9.0) for part in parts]
    return torch.stack([part.square().sum() for part in parts]).sum()


SINKS = torch.tensor([0.5, -1.0], dtype=torch.float64)


def few(query, key, value):
    """As `weights_only`, of what a loss is made of most: the default backend takes its time."""
    output, weights = attlas.attention(query, key, value, is_causal=True)
    other = attlas.attention(key, query, value, is_causal=True).weights
    parts = [output, weights.entropy(), weights.received(), weights.kl_divergence(other)]
    parts += [weights.head_mean().entropy()]
    return torch.stack([part.square().sum() for part in parts]).sum()


def compiles_to_the_same(fn, compiled, lengths):
    """Asserts that values and gradients of a function, compiled, are those without."""
    for length in lengths:
        inputs = qkv(queries=length, grad=True)
        results = [
            (value, *torch.autograd.grad(value, inputs))
            for value in (compiled(*inputs), fn(*inputs))
        ]
        assert all(gap(a, b) < CLOSE for a, b in zip(*results, strict=True))


def test_every_readout_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    options = {"fullgraph": True, "dynamic": True, "backend": backend}
    compiled = torch.compile(weights_only, **options)
    compiles_to_the_same(weights_only, compiled, [5])
    count = backend.frame_count
    compiles_to_the_same(weights_only, compiled, [6, 9])
    assert backend.frame_count == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # torch's
def test_the_default_backend_of_torch_compile(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # compiled here, not found
    compiles_to_the_same(few, torch.compile(few, fullgraph=True, dynamic=True), [5, 6])


def test_a_readout_alone_has_no_gradient_for_value(compiled):
    """A real result that was smaller than its fake made the compiled backward fail."""
    for impl in ("blocked", "auto"):
        inputs = qkv(grad=True)

        def entropy(*tensors, impl=impl):
            return attlas.attention(*tensors, is_causal=True, impl=impl).weights.entropy().sum()

        for fn in (entropy, compiled(entropy)):
            found = torch.autograd.grad(fn(*inputs), inputs, allow_unused=True)
            assert found[2] is None or found[2].eq(0).all()
            assert found[0].ne(0).any()
        found = torch.autograd.grad(entropy(*inputs), inputs, allow_unused=True)
        assert found[2] is None


BROKEN = {
    "other must hold weights of at least 0": lambda w, t: w.kl_divergence(t - 9),
    "index must lie within dimension 2": lambda w, t: w[..., t[0, 0, 0, :2].long() + 9, :],
    "lengths must be at least 0": lambda w, t: masks.padding(t[:2, 0, 0, 0].long() - 9).lengths,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_compiled_graph_checks_the_values_that_it_gets(compiled, message):
    q = qkv()[0]

    def run(q):
        weights = attlas.attention(q, q, q).weights
        return BROKEN[message](weights, weights.to_dense())

    with pytest.raises(RuntimeError, match=message):
        compiled(run)(q)


def test_the_sides_of_a_product_are_never_swapped(compiled):
    """torch.compile calls `Tensor.matmul(x, weights)` for `weights @ x`."""
    for product in (lambda weights, x: weights @ x, lambda weights, x: x @ weights):
        with pytest.raises(Exception, match=r"write torch.matmul\(weights, x\)"):
            compiled(lambda *t, product=product: product(attlas.attention(*t).weights, t[0]))(
                *qkv()
            )


def test_torch_export():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            output, weights = attlas.attention(query, key, value, is_causal=True)
            return output, weights.entropy(), weights.received()

    inputs = qkv()
    exported = torch.export.export(Model(), inputs).module()
    assert all(gap(a, b) == 0 for a, b in zip(exported(*inputs), Model()(*inputs), strict=True))


def test_exported_programs_are_saved_and_take_any_length():
    """A statistic without numbers could not be saved, nor a row read where L is symbolic."""

    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            weights = attlas.attention(query, key, value).weights
            other = attlas.attention(key, query, value, softcap=3.0).weights
            readouts = [weights.entropy(), weights.topk(2).values, weights.quantile(0.5)]
            readouts += [weights.kl_divergence(other)]
            return *readouts, weights[:, 0], weights[:, :, 0], weights[..., -1]

    length, file = torch.export.Dim("length", min=3, max=99), io.BytesIO()
    shapes = [{2: length}] * 3
    torch.export.save(torch.export.export(Model(), qkv(), dynamic_shapes=shapes), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for queries in (5, 8):
        inputs = qkv(queries=queries)
        found, expected = exported(*inputs), Model()(*inputs)
        assert all(gap(a, b) == 0 for a, b in zip(found[:4], expected, strict=False))
        eps = torch.finfo(torch.float64).eps  # an index is PyTorch's own products in a graph
        assert all(gap(a, b) <= 8 * eps for a, b in zip(found[4:], expected[4:], strict=True))


def test_checkpointing_recomputes_the_same():
    inputs, again = qkv(grad=True), [tensor.detach().requires_grad_() for tensor in qkv()]
    again = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False).backward()
    loss(*again).backward()
    assert all(gap(a.grad, b.grad) == 0 for a, b in zip(inputs, again, strict=True))


@every_kernel
def test_forgotten_masks_and_statistics_live_as_long_as_the_graph(impl):
    """The operators name Python objects by number: a graph must keep them alive."""
    query, key, value = qkv(grad=True)

    def made():
        mask = masks.from_function(lambda b, h, q, k: q >= k)
        output, weights = attlas.attention(query, key, value, mask, impl=impl)
        return output.sum() + weights.map_rows(lambda rows: rows.square()).sum()

    found = torch.autograd.grad(made(), (query, key, value))
    output, weights = attlas.attention(query, key, value, is_causal=True, impl="reference")
    want = output.sum() + weights.map_rows(lambda rows: rows.square()).sum()
    for a, b in zip(found, torch.autograd.grad(want, (query, key, value)), strict=True):
        assert gap(a, b) < CLOSE


UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*UNTRACED, "test_aot_dispatch_dynamic")


@every_kernel
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")  # opcheck makes errors, to look
def test_opcheck(impl, grad):
    query, key, value = qkv(grad=grad)
    weights = attlas.attention(query.detach(), key.detach(), value.detach(), is_causal=True).weights
    spec = encoding.encode(weights.spec, impl)
    normaliser = weights.normaliser.clone().requires_grad_(grad)
    inputs, entropy = (query, key, value, None, None), weights.entropy()
    output = (weights @ value).detach()
    also, reads = ["entropy", "received", "max"], (query, key, None, normaliser, [])
    found = [output, weights.normaliser, entropy, weights.received(), *weights.max()]
    calls = {
        "attend": (*spec, also, *inputs),
        "attend_backward": (*spec, also, *inputs, found, found, False),
        "read": (*spec, "TopK", [3], [], *reads),
        "read_backward": (
            *spec,
            "Entropy",
            [],
            [],
            *reads,
            [],
            [entropy],
            [True, True, False, True],
        ),
    }
    assert calls.keys() == operators.OPERATORS.keys()
    dropping = encoding.encode(replace(weights.spec, dropout=Dropout(0.3, torch.tensor(7))), impl)
    again = {name: (*dropping, *args[len(spec) :]) for name, args in calls.items()}
    # To trace the derivative of a backward takes 10 s, and it is the reference's for each impl.
    traced = calls if impl == "blocked" else again
    for name in calls:
        for args in (calls, again):
            known = grad and name.endswith("_backward") and args is not traced
            operator = getattr(torch.ops.attlas, name)
            opcheck(operator, args[name], test_utils=UNTRACED if known else UTILS)


@pytest.mark.filterwarnings("ignore")  # of torch.jit: that it is deprecated, and of constants
def test_jit_trace_records_what_is_computed():
    def fn(query, key, value):
        output, weights = attlas.attention(query, key, value, is_causal=True)
        return output, weights.entropy(), weights.received()

    inputs = [torch.cat([t] * 60, dim=2) for t in qkv(queries=5)]
    traced = torch.jit.trace(fn, inputs, check_trace=False)
    other = [t.flip(2) for t in inputs]
    assert all(gap(a, b) < CLOSE for a, b in zip(traced(*other), fn(*other), strict=True))
