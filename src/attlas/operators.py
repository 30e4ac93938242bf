"""The operators of torch.library: what PyTorch's transforms know of each call.

    attlas::attend    attlas::attend_backward    attlas::read    attlas::read_backward

Each has a schema, a kernel, shapes for tracing (torch.compile, torch.export), a derivative and
a rule for vmap. The same derivative serves `Call`, a torch.autograd.Function, since
torch.func does not differentiate the operators of torch.library; `call` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]

from . import batched, compute, encoding, streaming
from .blocks import whole
from .compute import Tensors
from .encoding import Encoded
from .spec import Cotangents, Inputs, ScoreSpec, accumulate_dtype, is_traced, lse_gradient
from .statistics import Statistic
from .vjp import pull


def call(name: str, *args: Any) -> Sequence[Tensor]:
    """An operator by name, for what differentiates, traces or transforms it now."""
    if torch.compiler.is_compiling() and encoding.holds_objects(args):
        return _call_in_python(name, *args)
    if is_traced() or any(isinstance(a, Tensor) and not is_ordinary(a) for a in args):
        return getattr(torch.ops.attlas, name)(*args)
    form, tensors = _part(args)
    return Call.apply(name, form, *tensors)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _call_in_python(name: str, *args: Any) -> Sequence[Tensor]:
    """As `call`, where torch.compile has left its graph for what only Python can hold."""
    return call(name, *args)


def is_transformed() -> bool:
    """True inside of torch.func.grad, torch.vmap and the like."""
    return _functorch.peek_interpreter_stack() is not None


def is_ordinary(tensor: Tensor) -> bool:
    """True for a tensor that is no subclass with a meaning of its own."""
    kind = type(tensor)
    return kind is Tensor or kind is torch.nn.Parameter or is_transformed()


# --- arguments and their tensors ------------------------------------------------------------


class Form:
    """The arguments of a call with a hole in the place of each tensor."""

    HOLE = object()

    def __init__(self, args: list[Any]) -> None:
        self.args = args

    def fill(self, tensors: Sequence[Any]) -> list[Any]:
        """The arguments, with these tensors (or their gradients) in the holes."""
        rest = iter(tensors)
        return [
            [next(rest) for _ in arg]
            if isinstance(arg, list) and Form.HOLE in arg
            else next(rest)
            if arg is Form.HOLE
            else arg
            for arg in self.args
        ]

    def holes(self, values: Sequence[Any]) -> Iterator[Any]:
        """What stands where the tensors were, in their order."""
        for arg, value in zip(self.args, values, strict=True):
            if arg is Form.HOLE:
                yield value
            elif isinstance(arg, list) and Form.HOLE in arg:
                yield from [None] * len(arg) if value is None else value


def _part(args: Sequence[Any]) -> tuple[Form, list[Tensor]]:
    """The form of some arguments, and their tensors."""
    tensors: list[Tensor] = []
    form: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            form.append(Form.HOLE)
        elif isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
            tensors.extend(arg)
            form.append([Form.HOLE] * len(arg))
        else:
            form.append(arg)
    return Form(form), tensors


# --- differentiation ------------------------------------------------------------------------


class Operator(NamedTuple):
    """One operator: four functions of its arguments."""

    schema: str
    run: Callable[..., list[Tensor]]
    fake: Callable[..., list[Tensor]]  # empty results of the right shapes
    derivative: Callable[..., Sequence[Any]]  # (args, results, wanted, grads) -> those of args
    keeps: Callable[[Sequence[Any]], int]  # of args: how many results the derivative reads


class Call(torch.autograd.Function):
    """A call of an operator in eager mode and under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        run = getattr(torch.ops.attlas, name) if is_transformed() else OPERATORS[name].run
        return tuple(run(*form.fill(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, form, *tensors = inputs
        _save(ctx, name, form, tensors, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.form.fill(ctx.needs_input_grad[2:])

        def differentiate(grads: Tensors) -> list[Tensor | None]:
            return list(ctx.form.holes(_differentiate(ctx, wanted, grads)))

        if any(g is not None and _functorch.is_legacy_batchedtensor(g) for g in grads):
            return None, None, *batched.differentiated(differentiate, grads)
        return None, None, *differentiate(grads)


# torch inspects it at each call, and without this makes it anew.
Call.forward.__signature__ = signature(Call.forward)  # type: ignore[attr-defined]


def _save(
    ctx: Any, name: str, form: Form, tensors: Sequence[Tensor], results: Sequence[Tensor]
) -> None:
    keeps = OPERATORS[name].keeps(form.args)
    ctx.name, ctx.form, ctx.count = name, form, len(tensors)
    ctx.lives = encoding.objects(form.args)
    ctx.save_for_backward(*tensors, *results[:keeps])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, wanted: Sequence[Any], grads: Tensors) -> Sequence[Any]:
    saved, count = ctx.saved_tensors, ctx.count
    args = ctx.form.fill(saved[:count])
    return OPERATORS[ctx.name].derivative(args, saved[count:], wanted, grads)


def _nothing(like: Tensor) -> Tensor:
    """What an operator takes and returns in place of None, in a list of tensors."""
    return like.new_empty(0)


def _something(tensor: Tensor | None) -> Tensor | None:
    """The tensor, None for `_nothing`; what is real has batch, heads and positions."""
    return None if tensor is None or tensor.ndim == 1 else tensor


def _gradients(
    found: Tensors, tensors: Tensors, wanted: Sequence[bool], like: Tensor
) -> list[Tensor]:
    """Gradients as an operator returns them: in the dtypes of their tensors, where wanted."""
    return [
        _nothing(like)
        if t is None or not want
        else torch.zeros_like(t, memory_format=torch.contiguous_format)
        if g is None
        else g.to(t.dtype).contiguous()
        for g, t, want in zip(found, tensors, wanted, strict=True)
    ]


def _gradients_fake(tensors: Tensors, wanted: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Empty tensors in the place of `_gradients`."""
    pairs = zip(tensors, wanted, strict=True)
    return [t.new_empty(t.shape) if w and t is not None else _nothing(like) for t, w in pairs]


def _present(found: Tensors, tensors: Tensors) -> list[Tensor | None]:
    """The gradients that were computed."""
    return [
        None if g is None or t is None or g.shape != t.shape else g
        for g, t in zip(found, tensors, strict=True)
    ]


SPEC = len(Encoded._fields)  # the first arguments of each operator


def _split(args: Sequence[Any]) -> tuple[Encoded, Sequence[Any]]:
    """The encoded specification, and the other arguments."""
    return Encoded(*args[:SPEC]), args[SPEC:]


# --- attend: query, key, value, bias, sinks -> output, normaliser, statistics ---------------


def _attend(*args: Any) -> list[Tensor]:
    encoded, (also, *tensors) = _split(args)
    inputs = Inputs(*tensors)
    done = compute.attend(encoded.impl, encoding.decode(encoded, *inputs[:2]), inputs, also)
    return compute.flat(done)


def _attend_fake(*args: Any) -> list[Tensor]:
    also, query, key, value, *_ = args[SPEC:]
    dtype, rows = accumulate_dtype(query.dtype), query.shape[:3]
    columns = (*rows[:2], key.shape[2])
    made = {"entropy": [(rows, dtype)], "received": [(columns, dtype)]}
    made["max"] = [(rows, dtype), (rows, torch.int64)]
    found = [query.new_empty(s, dtype=d) for n in compute.FOUND if n in also for s, d in made[n]]
    output = query.new_empty(*rows, value.shape[-1])
    return [output, query.new_empty(*rows, 2, dtype=dtype), *found]


def _attend_derivative(
    args: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[Any], grads: Tensors
) -> Sequence[Any]:
    given = [_nothing(results[1]) if grad is None else grad for grad in grads]
    bias_grad = bool(wanted[SPEC + 4])
    found = call("attend_backward", *args, list(results), given, bias_grad)
    return *[None] * (SPEC + 1), *_present(found, args[SPEC + 1 :])


def _attend_backward(*args: Any) -> list[Tensor]:
    encoded, (also, *tensors, results, grads, bias_grad) = _split(args)
    inputs = Inputs(*tensors)
    done, given = compute.named(results, also), compute.named(grads, also)
    first = {name: _something(tensors[0]) for name, tensors in given.found.items()}
    normaliser = _something(given.normaliser)
    lse = None if normaliser is None else lse_gradient(normaliser, done.normaliser)
    cotangents = Cotangents(_something(given.output), lse, **first)
    spec = encoding.decode(encoded, *inputs[:2])
    found = compute.attend_backward(encoded.impl, spec, inputs, done, cotangents, bias_grad)
    return _gradients(found, inputs, _attend_wanted(*args), done.normaliser)


def _attend_backward_fake(*args: Any) -> list[Tensor]:
    inputs, results = args[SPEC + 1 : SPEC + 6], args[SPEC + 6]
    return _gradients_fake(inputs, _attend_wanted(*args), results[1])


def _attend_wanted(*args: Any) -> tuple[bool, ...]:
    """Which gradients there are: that of value comes from the output alone."""
    grads, bias_grad = args[SPEC + 7 :]
    return True, True, _something(grads[0]) is not None, bias_grad, True


def _attend_backward_derivative(
    args: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[Any], grads: Tensors
) -> Sequence[Any]:
    encoded, (also, *inputs, done, given, _) = _split(args)
    spec = encoding.decode(encoded, *inputs[:2])

    top = compute.named(done, also).normaliser[..., 0]

    def forward(*inputs: Any) -> Tensors:
        return compute.flat(compute.attend_dense(spec, Inputs(*inputs), also, top))

    def backward(*tensors: Tensor | None) -> Tensors:
        return pull(forward, tensors[:5], tensors[5:])

    found = pull(backward, (*inputs, *given), grads)
    return *[None] * (SPEC + 1), *found[:5], None, found[5:], None


# --- read: query, key, bias, normaliser, operands -> the results of a statistic -------------


READ = SPEC + 8  # the arguments of a reading; those of its backward follow


def _reading(args: Sequence[Any]) -> tuple[Encoded, Statistic, ScoreSpec, Tensors]:
    encoded, (kind, integers, floats, *tensors, operands) = _split(args[:READ])
    statistic = encoding.named(kind, integers, floats, operands)
    return encoded, statistic, encoding.decode(encoded, *tensors[:2]), (*tensors, *operands)


def _read(*args: Any) -> list[Tensor]:
    encoded, statistic, spec, tensors = _reading(args)
    return list(compute.read(encoded.impl, statistic, spec, tensors))


def _read_fake(*args: Any) -> list[Tensor]:
    _, statistic, spec, tensors = _reading(args)
    return statistic.shapes(whole(spec.shape), tensors[3])  # type: ignore[arg-type]


def _read_derivative(
    args: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[Any], grads: Tensors
) -> Sequence[Any]:
    *tensors, operands = args[SPEC + 3 : READ]
    *some, of_operands = wanted[SPEC + 3 : READ]
    flags = [bool(want) for want in (*some, *of_operands)]
    given = [_nothing(tensors[3]) if grad is None else grad for grad in grads]
    found = call("read_backward", *args, list(results), given, flags)
    found = _present(found, (*tensors, *operands))
    return *[None] * (SPEC + 3), *found[:4], found[4:]


def _read_backward(*args: Any) -> list[Tensor]:
    encoded, statistic, spec, tensors = _reading(args)
    results, grads, wanted = args[READ:]
    grads = [_something(g) for g in grads]
    found = compute.read_backward(encoded.impl, statistic, spec, tensors, results, grads, wanted)
    return _gradients(found, tensors, wanted, tensors[3])  # type: ignore[arg-type]


def _read_backward_fake(*args: Any) -> list[Tensor]:
    *tensors, operands = args[SPEC + 3 : READ]
    return _gradients_fake((*tensors, *operands), args[READ + 2], tensors[3])


def _read_backward_derivative(
    args: Sequence[Any], results: Sequence[Tensor], wanted: Sequence[Any], grads: Tensors
) -> Sequence[Any]:
    _, statistic, spec, tensors = _reading(args)
    count = len(tensors)

    def forward(*tensors: Tensor | None) -> Tensors:
        return streaming.dense(statistic, spec, tensors)

    def backward(*tensors: Tensor | None) -> Tensors:
        return pull(forward, tensors[:count], tensors[count:])

    found = pull(backward, (*tensors, *args[READ + 1]), grads)
    return *[None] * (SPEC + 3), *found[:4], found[4:count], None, found[count:], None


# --- registration ---------------------------------------------------------------------------

_SPEC = (
    "Tensor[] masks, SymInt[] code, float scale, float? softcap, str impl, "
    "float dropout_p, Tensor? seed"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks"
_READ = (
    "str kind, SymInt[] integers, float[] floats, "
    "Tensor query, Tensor key, Tensor? bias, Tensor normaliser, Tensor[] operands"
)
OPERATORS = {
    "attend": Operator(
        f"({_SPEC}, str[] also, {_INPUTS}) -> Tensor[]",
        _attend,
        _attend_fake,
        _attend_derivative,
        keeps=lambda args: 6,
    ),
    "attend_backward": Operator(
        f"({_SPEC}, str[] also, {_INPUTS}, Tensor[] results, Tensor[] grads, bool bias_grad)"
        " -> Tensor[]",
        _attend_backward,
        _attend_backward_fake,
        _attend_backward_derivative,
        keeps=lambda args: 0,
    ),
    "read": Operator(
        f"({_SPEC}, {_READ}) -> Tensor[]",
        _read,
        _read_fake,
        _read_derivative,
        keeps=lambda args: 2 if args[SPEC] in compute.SELECTS else 0,
    ),
    "read_backward": Operator(
        f"({_SPEC}, {_READ}, Tensor[] results, Tensor[] grads, bool[] wanted) -> Tensor[]",
        _read_backward,
        _read_backward_fake,
        _read_backward_derivative,
        keeps=lambda args: 0,
    ),
}


def _register(name: str, operator: Operator) -> None:
    def saves(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        _save(ctx, name, *_part(inputs), output)

    def derivative(ctx: Any, grads: Tensors) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad
        found = _differentiate(ctx, wanted, grads)
        return tuple(  # torch.library wants a list for each list that may hold tensors
            [None] * len(arg) if g is None and isinstance(arg, list) and _holds_tensors(arg) else g
            for g, arg in zip(found, ctx.form.args, strict=True)
        )

    full = f"attlas::{name}"
    torch.library.define(full, operator.schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full, ("cpu", "cuda"), partial(_from_the_top, operator.run))
    torch.library.register_fake(full, operator.fake)
    torch.library.register_autograd(full, derivative, setup_context=saves)
    torch.library.register_vmap(full, partial(batched.called, getattr(torch.ops.attlas, name)))


# Inside of an operator PyTorch records no graph and sees no transform; kernels that differentiate
# blocks need the dispatch of a call from the top.
_TOP = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _from_the_top(run: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    with torch._C._ForceDispatchKeyGuard(*_TOP), torch.no_grad():
        return [tensor.contiguous() for tensor in run(*args)]  # as the fakes say


def _holds_tensors(arg: list[Any]) -> bool:
    return all(item is Form.HOLE for item in arg)


for _name, _operator in OPERATORS.items():
    _register(_name, _operator)
