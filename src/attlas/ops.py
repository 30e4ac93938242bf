"""The differentiable operations: attention with its lse, and readouts of the weights.

    attend(...)   -> (output, lse)       both differentiable
    read(...)     -> a statistic         of weights = exp(scores - lse), differentiable

The gradient of a readout with respect to the scores goes two ways, through the scores and
through lse. lse is an output of `attend`, so the backward of `attend` sums both ways in one
pass: dS = P * (dP - rowsum(P * dP) + dlse). Nothing of size L x S is kept; each block is
computed again. Where a gradient is itself differentiated (create_graph=True), the dense
reference is differentiated instead, which holds O(L·S).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .kernels import blocked, native, reference
from .spec import Inputs, ScoreSpec, full_precision
from .statistics import Statistic

KERNELS = {"reference": reference, "blocked": blocked, "native": native}


@full_precision
def attend(impl: str, spec: ScoreSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(output `[B, H, L, Ev]`, lse `[B, H, L]`) by one implementation."""
    if impl == "reference":
        dense = reference.attention(spec, *inputs)
        return dense.output, dense.lse
    return _Attend.apply(KERNELS[impl], spec, *inputs)


@full_precision
def read(
    impl: str,
    statistic: Statistic,
    spec: ScoreSpec,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """The tensors of a statistic, streamed over blocks of the weights."""
    tensors = (query, key, bias, lse, *statistic.operands)
    if impl == "reference":
        return streaming.dense(statistic, spec, tensors)
    return _Read.apply(KERNELS[impl], statistic, spec, *tensors)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: ModuleType, spec: ScoreSpec, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        output, lse = kernel.forward(spec, Inputs(*tensors))
        ctx.kernel, ctx.spec = kernel, spec
        ctx.save_for_backward(*tensors, output, lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @full_precision
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, output, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors = _aliases(tensors)
            dense = reference.attention(ctx.spec, *Inputs(*tensors))
            return None, None, *_differentiate((dense.output, dense.lse), tensors, grads)
        return None, None, *ctx.kernel.backward(ctx.spec, Inputs(*tensors), output, lse, *grads)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: ModuleType,
        statistic: Statistic,
        spec: ScoreSpec,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        results = kernel.read(statistic, spec, tensors) or streaming.stream(
            statistic, spec, tensors
        )
        ctx.statistic, ctx.spec = statistic, spec
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(r for r in results if not r.is_floating_point()))
        return results

    @staticmethod
    @full_precision
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors = _aliases(tensors)
            results = streaming.dense(ctx.statistic, ctx.spec, tensors)
            return None, None, None, *_differentiate(results, tensors, grads)
        return (
            None,
            None,
            None,
            *streaming.stream_backward(ctx.statistic, ctx.spec, tensors, grads),
        )


def _aliases(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views, so that one tensor given twice (query is key) has two gradients."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _differentiate(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, None where an input needs none."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
