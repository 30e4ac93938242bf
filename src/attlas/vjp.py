"""Vector-Jacobian products of functions of optional tensors.

By torch.func, not by recording a graph: inside of an operator of torch.library nothing is
recorded, and what runs here may itself be differentiated or traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pull(
    fn: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of floating inputs, for gradients of the results of fn.

    None, or a tensor without elements, is a result without gradient; None in the result is an
    input that has none.
    """
    places = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]
    chosen = [
        i for i, g in enumerate(grads) if g is not None and g.numel() and g.is_floating_point()
    ]
    found: list[Tensor | None] = [None] * len(inputs)
    if not chosen or not places:
        return found

    def of(*present: Tensor) -> tuple[Any, ...]:
        full = list(inputs)
        for place, tensor in zip(places, present, strict=True):
            full[place] = tensor
        results = fn(*full)
        return tuple(results[i] for i in chosen)

    back = torch.func.vjp(of, *(inputs[i] for i in places))[1]
    for place, grad in zip(places, back(tuple(grads[i] for i in chosen)), strict=True):
        found[place] = grad
    return found
