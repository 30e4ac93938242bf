"""What makes lazy weights behave as the tensor that they stand for.

Code that was written for dense weights calls methods of tensors. Those that have a cheaper way
than the dense weights are written out here; what asks for a shape or a kind is answered without
a value; every other method of `torch.Tensor` is that of `to_dense()`. What would write to the
dense weights, or record a gradient of them, would be lost with them: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import checks, indexing
from .readouts import Readouts

# Answered from shape, dtype and device.
KIND = (
    "element_size get_device is_complex is_cpu is_cuda is_floating_point is_meta is_mps is_nested "
    "is_quantized is_signed is_sparse is_xpu itemsize layout nbytes ndimension nelement numel type"
)
# Would act on dense weights that live on.
LOST = "backward data_ptr grad grad_fn register_hook retain_grad storage untyped_storage"
# Operators, which Python looks up on the class.
OPERATORS = (
    "abs add eq floordiv ge gt le lt mod mul ne neg pow radd rfloordiv rmatmul rmul rpow rsub "
    "rtruediv sub truediv"
)


class TensorLike(Readouts):
    """The methods of a tensor, for `AttentionWeights`."""

    LAZY = ("sum", "mean", "amax", "argmax", "max", "clone")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in LOST.split() or name.endswith("_"):
            raise AttributeError(f"weights must be read only, got .{name}; call to_dense() first")
        if name in KIND.split():
            return getattr(self._element().expand(self.shape), name)
        return getattr(self.to_dense(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        mend = "call to_dense() first"
        raise TypeError(f"weights must be read only, got an assignment to an index; {mend}")

    def _element(self) -> Tensor:
        """A tensor of one element, of the dtype and on the device of the weights."""
        return torch.empty((), dtype=self.dtype, device=self.device)

    # --- copies, as lazy as the weights -------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The weights on another device, lazily; a tensor where the dtype is another one."""
        wanted = self._element().to(*args, **kwargs)
        if wanted.dtype != self.dtype:
            return self.to_dense().to(*args, **kwargs)
        if wanted.device == self.device:
            return self
        moved = self._map(lambda t: t.to(wanted.device))
        return moved if self.impl == "reference" else replace(moved, impl="blocked")

    def cpu(self) -> Any:
        """The weights on the CPU, lazily."""
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        """The weights on a GPU, lazily."""
        return self.to(self._element().cuda(*args, **kwargs).device)

    def float(self) -> Any:
        """The weights in float32."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """The weights in float64."""
        return self.to(torch.float64)

    def contiguous(self, **_: Any) -> Any:
        """The weights."""
        return self

    def clone(self, **_: Any) -> Any:
        """The weights with tensors of their own, that a change of query or key leaves alone."""
        return self._map(torch.clone)

    @property
    def data(self) -> Any:
        """The weights without gradients."""
        return self.detach()

    def _map(self: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        """The weights with `fn` of each tensor that they hold."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: tuple(map(fn, tensors)) for name, tensors in self.found.items()}
        tensors = {n: fn(t) for n, t in held.items() if isinstance(t, Tensor)}
        return replace(self, **tensors, found=found)

    def select_heads(self: Any, heads: Any) -> Any:
        """The weights of some heads, lazily: `weights[:, heads]`, holding those heads alone.

        Args:
            heads: positions, a slice or a range; a head may be there twice.

        Raises:
            ValueError: the weights have no dimension of heads.
            TypeError, IndexError: heads is not a set of head positions.
        """
        if len(self.lead) != 2:
            mend = "give query a dimension of heads, [B, H, L, E]"
            checks.fail(ValueError, "weights", "be [B, H, L, S]", list(self.shape), mend)
        (entry,) = indexing.expand(
            (heads if not isinstance(heads, int) else [heads],), (self.lead[1],)
        )
        chosen = torch.arange(self.lead[1], device="cpu")[entry]
        kv, sizes = (chosen // self.spec.shape.group).unique_consecutive(return_counts=True)
        if len(sizes.unique()) > 1:  # no groups of one size: a key head for each head
            kv = chosen // self.spec.shape.group
        at, kv_at = chosen.to(self.device), kv.to(self.device)
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, at]
        shape = self.spec.shape._replace(heads=len(chosen), kv_heads=len(kv))
        return replace(
            self,
            query=self.query[:, at],
            key=self.key[:, kv_at],
            bias=bias,
            sinks=None if self.sinks is None else self.sinks[at],
            lse=self.lse[:, at],
            found={name: tuple(t[:, at] for t in ts) for name, ts in self.found.items()},
            spec=replace(
                self.spec, shape=shape, masks=tuple(m.of_heads(chosen) for m in self.spec.masks)
            ),
            lead=(self.lead[0], len(chosen)),
            dropout=None if self.dropout is None else self.dropout.of_heads(chosen),
        )

    # --- reductions ---------------------------------------------------------------------

    def sum(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        """As `torch.Tensor.sum`: over queries it is `received()`, over keys 1 less the sinks."""
        if 0 in self.shape:
            return self.to_dense().sum(dim, keepdim, dtype=dtype)
        dims = self._dims(dim)
        queries, keys = self.ndim - 2, self.ndim - 1
        if keys in dims:
            held = (self.logsumexp > -torch.inf).to(self.logsumexp) - self.sink_mass()
            total, rest = held.unsqueeze(-1), dims - {keys}
        elif queries in dims:
            total, rest = self.received().unsqueeze(-2), dims - {queries}
        else:  # one map of the weights at a time
            first = min(dims)
            maps = (self[(slice(None),) * first + (i,)] for i in range(self.shape[first]))
            total = reduce(torch.add, maps, self.logsumexp.new_zeros(()))
            total, rest = total.unsqueeze(first), dims - {first}
        if rest:
            total = total.sum(tuple(rest), keepdim=True)
        total = total.to(dtype or self.dtype)
        return total if keepdim else total.squeeze(tuple(dims))

    def mean(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        """As `torch.Tensor.mean`."""
        dtype = dtype or self.dtype
        count = 1
        for d in self._dims(dim):
            count *= self.shape[d]
        return (self.sum(dim, keepdim, dtype=self.logsumexp.dtype) / count).to(dtype)

    def amax(self, dim: Any = (), keepdim: bool = False) -> Tensor:
        """As `torch.Tensor.amax`; over keys or over queries without the dense weights."""
        found = {self.ndim - 1: lambda: self.max().values}
        found[self.ndim - 2] = lambda: self.received("max")
        return self._along(found, "amax", dim, keepdim)

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """As `torch.Tensor.argmax`; over keys without the dense weights."""
        found = {self.ndim - 1: lambda: self.max().keys.clamp(min=0)}
        return self._along(found, "argmax", dim, keepdim)

    def max(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """The largest weight of each row and its key, `[B, H, L]`; 0 and -1 on an empty row.

        With `dim`, the largest weights and their indices as `torch.Tensor.max` gives them; over
        keys without the dense weights.
        """
        if dim is None:
            return super().max()
        if not isinstance(dim, int) or dim % self.ndim != self.ndim - 1:
            return self.to_dense().max(dim, *([keepdim] if keepdim else []))
        return torch.return_types.max((self.amax(dim, keepdim), self.argmax(dim, keepdim)))

    def _along(self, found: dict[int, Callable], name: str, dim: Any, keepdim: bool) -> Tensor:
        """The readout of a dimension that is in `found`, else the method of the dense weights."""
        one = next(iter(dim)) if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if not isinstance(one, int) or one % self.ndim not in found:
            return getattr(self.to_dense(), name)(dim, keepdim)
        result = found[one % self.ndim]()
        result = result.to(self.dtype) if result.is_floating_point() else result
        return result.unsqueeze(one % self.ndim) if keepdim else result

    def _dims(self, dim: Any) -> set[int]:
        """Dimensions as torch takes them, from 0; all of them for None or ()."""
        dims = range(self.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
        for d in dims:
            if not -self.ndim <= d < self.ndim:
                rule = f"dim must be from {-self.ndim} to {self.ndim - 1}, got {d}"
                raise IndexError(f"{rule}; weights have {self.ndim} dimensions")
        return {d % self.ndim for d in dims} or set(range(self.ndim))

    # --- operators ----------------------------------------------------------------------

    __hash__ = object.__hash__  # a class with == has none unless it says so


def _operator(name: str) -> Callable[..., Any]:
    def dense(self: Any, *others: Any) -> Any:
        others = tuple(o.to_dense() if isinstance(o, TensorLike) else o for o in others)
        return getattr(self.to_dense(), name)(*others)

    dense.__name__, dense.__doc__ = name, f"`{name}` of the dense weights."
    return dense


for _name in OPERATORS.split():
    setattr(TensorLike, f"__{_name}__", _operator(f"__{_name}__"))
