"""What PyTorch batches, as loops: right for every mask and statistic, and each call is a large one.

    torch.vmap                                     a call of an operator for each item
    is_grads_batched, jacobian(vectorize=True)     a backward for each gradient

Both stack what the loop gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks
from .compute import Tensors


def called(operator: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """The results of an operator for each item of a batch, stacked: its rule for torch.vmap."""

    def at(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):
            return [at(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    if not info.batch_size:  # the shapes, by a call with zeros

        def zeros(arg: Any, dim: Any) -> Any:
            if isinstance(dim, list | tuple):
                return [zeros(a, d) for a, d in zip(arg, dim, strict=True)]
            return arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:])

        found = operator(*map(zeros, args, in_dims))
        return [part.new_empty(0, *part.shape) for part in found], [0] * len(found)
    calls = range(info.batch_size)
    results = [operator(*map(at, args, in_dims, [i] * len(args))) for i in calls]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


def differentiated(
    differentiate: Callable[[Tensors], list[Tensor | None]], grads: Tensors
) -> list[Tensor | None]:
    """`differentiate` in a loop, for batched gradients of `is_grads_batched` of torch.autograd.

    They are batched by torch's first vmap, which knows no rule for our operators.
    """
    if torch.is_grad_enabled():
        mend = "use torch.func.jacrev and torch.func.hessian"
        rule = "be False where gradients are batched (is_grads_batched, vectorize)"
        checks.fail(NotImplementedError, "create_graph", rule, True, mend)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # The batch comes first; what is not batched has a batch of 1.
    unwrap, wrap = torch._remove_batch_dim, torch._add_batch_dim  # type: ignore[attr-defined]
    batched = [None if g is None else unwrap(g, level, 1, 0) for g in grads]
    size = max(len(g) for g in batched if g is not None)
    results = [
        differentiate([None if g is None else g.expand(size, *g.shape[1:])[i] for g in batched])
        for i in range(size)
    ]
    return [
        None if parts[0] is None else wrap(torch.stack(parts), 0, level)  # type: ignore[arg-type]
        for parts in zip(*results, strict=True)
    ]
