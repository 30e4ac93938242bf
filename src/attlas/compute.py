"""What an operation runs: the kernel of an implementation, and PyTorch for what it leaves out.

    attend, attend_backward       output and normaliser, with statistics of the same pass
    read, read_backward           a statistic of weights = exp(scores - m) / l

A kernel may leave statistics and their gradients to `attlas.streaming`. Nothing here records a
graph; `attend_dense`, by the reference, is plain PyTorch that any transform differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from torch import Tensor

from . import selection, statistics, streaming
from .kernels import blocked, native, reference
from .spec import Attended, Cotangents, Inputs, ScoreSpec, lse_gradient
from .statistics import Statistic

KERNELS = {"blocked": blocked, "native": native}

# What `attend` can find beside the output, in the order in which it is returned.
FOUND: dict[str, tuple[Callable[[], Statistic], int]] = {  # name: the statistic, its tensors
    "entropy": (statistics.Entropy, 1),
    "received": (statistics.Received, 1),
    "max": (statistics.Max, 2),
}

# Statistics that are a few weights of each row and their keys: their gradient is at those keys.
SELECTS = {"TopK": statistics.TopK, "Max": statistics.Max}

Tensors = Sequence[Tensor | None]


def attend(impl: str, spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = ()) -> Attended:
    """Output, normaliser, and the statistics named in `also`."""
    done = KERNELS[impl].forward(spec, inputs, also)
    for name in also:
        if name not in done.found:
            done.found[name] = read(impl, FOUND[name][0](), spec, _read_by(inputs, done.normaliser))
    return done


def is_found(name: str, statistic: Statistic) -> bool:
    """True when a statistic is the one of that name: of all queries, without operands."""
    return (
        type(statistic) is FOUND[name][0] and not statistic.operands and statistic.queries is None
    )


def flat(done: Attended) -> list[Tensor]:
    """All that a forward gave, in one order."""
    found = (tensor for name in FOUND for tensor in done.found.get(name, ()))
    return [done.output, done.normaliser, *found]


def named(tensors: Sequence[Tensor], also: Sequence[str]) -> Attended:
    """What `flat` made a list of."""
    output, normaliser, *rest = tensors
    left = iter(rest)
    found = {name: tuple(islice(left, n)) for name, (_, n) in FOUND.items() if name in also}
    return Attended(output, normaliser, found)


def attend_dense(
    spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = (), top: Tensor | None = None
) -> Attended:
    """As `attend`, by the reference: O(L·S). `top` is the m of a normaliser that is known."""
    dense = reference.attention(spec, *inputs, top)
    tensors = _read_by(inputs, dense.normaliser)
    found = {name: streaming.dense(FOUND[name][0](), spec, tensors) for name in also}
    return Attended(dense.output, dense.normaliser, found)


def attend_backward(
    impl: str, spec: ScoreSpec, inputs: Inputs, done: Attended, grads: Cotangents, bias_grad: bool
) -> Inputs:
    """The gradients of the inputs, None where one is not there (or a bias is not wanted)."""
    kernel, more = KERNELS[impl], []
    for name, (statistic, _) in FOUND.items():
        grad = getattr(grads, name)
        if grad is not None and name not in kernel.DIFFERENTIATES:
            tensors, wanted = _read_by(inputs, done.normaliser), (True, True, bias_grad, True)
            results = done.found.get(name, ())
            parts = read_backward(impl, statistic(), spec, tensors, results, [grad], wanted)
            query, key, bias, normaliser = parts
            more.append((query, key, None, bias, None))
            assert normaliser is not None
            lse = lse_gradient(normaliser, done.normaliser)
            lse = lse if grads.lse is None else grads.lse + lse
            grads = grads._replace(lse=lse, **{name: None})
    total = kernel.backward(spec, inputs, done, grads, bias_grad)
    return Inputs(*(_sum(parts) for parts in zip(total, *more, strict=True)))  # type: ignore[arg-type]


def read(impl: str, statistic: Statistic, spec: ScoreSpec, tensors: Tensors) -> tuple[Tensor, ...]:
    """The results of a statistic of query, key, bias, normaliser and its operands."""
    kernel = KERNELS[impl]
    found = kernel.read(statistic, spec, tensors)
    if found is None:
        return streaming.stream(statistic, spec, tensors, kernel.BlockWeights)
    return found


def read_backward(
    impl: str,
    statistic: Statistic,
    spec: ScoreSpec,
    tensors: Tensors,
    results: Sequence[Tensor],
    grads: Tensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query, key, bias, normaliser and the operands, where wanted.

    `results` are those of the statistic where it is one of SELECTS, else not read.
    """
    if type(statistic) in SELECTS.values():
        if grads[0] is None:
            return [None] * len(tensors)
        values, keys = (t if t.ndim == 4 else t.unsqueeze(-1) for t in results)
        grad = grads[0].view_as(values)
        return selection.backward(spec, tensors, keys, values, grad, wanted)
    found = KERNELS[impl].read_backward(statistic, spec, tensors, grads, wanted)
    if found is None:
        return streaming.stream_backward(statistic, spec, tensors, grads, wanted)
    return found


def _read_by(inputs: Inputs, normaliser: Tensor) -> tuple[Tensor | None, ...]:
    """What a statistic without operands reads."""
    return inputs.query, inputs.key, inputs.bias, normaliser


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None
