"""The differentiable operations: attention with its lse, and readouts of the weights.

    attend(...)  ->  output, lse and statistics of the same pass
    read(...)    ->  a statistic of weights = exp(scores - lse)

The gradient of a readout with respect to the scores goes two ways, through the scores and
through lse. lse is an output of `attend`, so the backward of `attend` sums both ways in one
pass: dS = P * (dP - rowsum(P * dP) + dlse). Nothing of size L x S is kept; each block is
computed again. Second derivatives are those of the dense reference, O(L·S), and so is
forward-mode differentiation.

Both are operators of torch.library (`operators.py`); here a call finds its shortest way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import compute, encoding, operators, streaming
from .spec import Attended, Inputs, ScoreSpec, full_precision, is_traced
from .statistics import Statistic


@full_precision
def attend(impl: str, spec: ScoreSpec, inputs: Inputs, also: Sequence[str] = ()) -> Attended:
    """Output, lse and the statistics named in `also`, by one implementation."""
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
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """The tensors of a statistic, streamed over blocks of the weights."""
    tensors = (query, key, bias, lse, *statistic.operands)
    if impl == "reference" or forward_ad._current_level >= 0:
        return streaming.dense(statistic, spec, tensors)
    if _is_plain(*tensors):
        return compute.read(impl, statistic, spec, tensors)
    *name, operands = encoding.name(statistic)
    args = (*encoding.encode(spec, impl), *name, query, key, bias, lse, operands)
    return tuple(operators.call("read", *args))


def _is_plain(*tensors: Tensor | None) -> bool:
    """True when nothing differentiates, traces or transforms a call with these tensors."""
    if is_traced() or operators.is_transformed():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if (grad and tensor.requires_grad) or not operators.is_ordinary(tensor):
            return False
    return True
