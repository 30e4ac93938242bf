"""The differentiable operations: attention with its normaliser, and readouts of the weights.

    attend(...)  ->  output, normaliser and statistics of the same pass
    read(...)    ->  a statistic of weights = exp(scores - m) / l

The gradient of a readout with respect to the scores goes two ways, through the scores and
through the normaliser. That is an output of `attend`, so the backward of `attend` sums both ways in
one pass: dS = P * (dP - rowsum(P * dP) + dlse). Nothing of size L x S is kept; each block is
computed again. Second derivatives are those of the dense reference, O(L·S), and so is
forward-mode differentiation.

Both are operators of torch.library (`operators.py`); here a call finds its shortest way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import compute, encoding, operators, streaming
from .block_weights import BlockWeights, ScoredBlockWeights
from .spec import Attended, Inputs, ScoreSpec, full_precision, is_traced
from .statistics import Statistic


@full_precision
def attend(impl: str, spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = ()) -> Attended:
    """Output, normaliser and the statistics named in `also`, by one implementation."""
    if impl == "reference" or forward_ad._current_level >= 0:
        return compute.attend_dense(spec, inputs, also)
    if _is_plain(*inputs):
        return compute.attend(impl, spec, inputs, also)
    encoded = encoding.encode(spec, impl)
    return compute.named(operators.call("attend", *encoded, list(also), *inputs), also)


@full_precision
def read(
    impl: str,
    statistic: Statistic,
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
) -> tuple[Tensor, ...]:
    """The tensors of a statistic, streamed over blocks of the weights."""
    tensors = (query, key, bias, normaliser, *statistic.operands)
    if impl == "reference" or forward_ad._current_level >= 0:
        return streaming.dense(statistic, spec, tensors)
    if _is_plain(*tensors):
        return compute.read(impl, statistic, spec, tensors)
    *name, operands = encoding.name(statistic)
    args = (*encoding.encode(spec, impl), *name, query, key, bias, normaliser, operands)
    return tuple(operators.call("read", *args))


def block_weights(impl: str, *tensors: Tensor | None) -> Any:
    """What computes a block of weights for code that may be differentiated or transformed."""
    kind = compute.KERNELS[impl].BlockWeights if impl in compute.KERNELS else ScoredBlockWeights
    if kind is ScoredBlockWeights or forward_ad._current_level >= 0 or not _is_eager(*tensors):
        return ScoredBlockWeights
    return partial(Differentiable, kind) if _records(*tensors) else kind


class Differentiable(BlockWeights):
    """The weights of a kernel, with the gradient of those in PyTorch; `spec` is guarded."""

    def __init__(
        self, kind: Callable[..., BlockWeights], spec: ScoreSpec, *slices: Tensor | None
    ) -> None:
        self._graph = ScoredBlockWeights(spec, *slices)  # type: ignore[arg-type]
        self.device = self._graph.device
        self._exact = kind(spec, *(t if t is None else t.detach() for t in slices))

    def _compute_weights(self) -> Tensor:
        return _Exactly.apply(self._graph.weights, self._exact.weights)

    def _compute_log_weights(self) -> Tensor:
        return _Exactly.apply(self._graph.log_weights, self._exact.log_weights)


class _Exactly(torch.autograd.Function):
    """The second of two tensors that are equal but for rounding, with the graph of the first."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _is_eager(*tensors: Tensor | None) -> bool:
    """True when nothing traces or transforms a call with these tensors."""
    if is_traced() or operators.is_transformed():
        return False
    return all(t is None or operators.is_ordinary(t) for t in tensors)


def _is_plain(*tensors: Tensor | None) -> bool:
    """True when nothing differentiates, traces or transforms a call with these tensors."""
    return _is_eager(*tensors) and not _records(*tensors)


def _records(*tensors: Tensor | None) -> bool:
    """True when autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
