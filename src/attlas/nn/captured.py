"""What `attlas.nn.capture` gives: lazy weights, by module and call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

import attlas

from .heads import Heads


class Call:
    """One call of attention, and its weights once they were read."""

    def __init__(self, heads: Heads) -> None:
        query, key = _lasting(heads.query), _lasting(heads.key)
        self.heads = heads._replace(query=query, key=key, value=key[..., :1])
        self.grad = torch.is_grad_enabled()

    @cached_property
    def weights(self) -> attlas.AttentionWeights:
        with torch.set_grad_enabled(self.grad):
            return self.heads.attend().weights


def _lasting(tensor: Tensor) -> Tensor:
    """A tensor that the model will not write to: one that was written to (a cache) is copied."""
    return tensor.clone() if tensor.is_inference() or tensor._version else tensor


class Calls(Sequence["attlas.AttentionWeights"]):
    """The weights of one module, call by call: `calls[0]`, `calls[-1]`, `for weights in calls`."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    @overload
    def __getitem__(self, index: int) -> attlas.AttentionWeights: ...
    @overload
    def __getitem__(self, index: slice) -> list[attlas.AttentionWeights]: ...
    def __getitem__(self, index: Any) -> Any:
        found = self._calls[index]
        return [call.weights for call in found] if isinstance(found, list) else found.weights

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        shapes = [str(list(call.heads.shape)) for call in self._calls]
        more = f", ... {len(shapes) - 3} more" if len(shapes) > 3 else ""
        return f"Calls({', '.join(shapes[:3])}{more}; lazy)"


class Captured(Mapping[str, Calls]):
    """The `Calls` of each module by its name, in the order of their first calls."""

    def __init__(self) -> None:
        self._calls: dict[str, Calls] = {}

    def __getitem__(self, name: str) -> Calls:
        return self._calls[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        lines = [f"  {name!r}: {calls!r}" for name, calls in self.items()]
        return "\n".join([f"Captured({len(lines)} module{'s'[len(lines) == 1 :]})", *lines])

    def keep(self, name: str, heads: Heads) -> None:
        """Adds a call of a module."""
        self._calls.setdefault(name, Calls())._calls.append(Call(heads))
