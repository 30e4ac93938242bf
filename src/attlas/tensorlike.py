"""What makes lazy weights behave as the tensor that they stand for.

Code that was written for dense weights calls methods of tensors. Those that have a cheaper way
than the dense weights are written out here; what asks for a shape or a kind is answered without
a value; every other method of `torch.Tensor` is that of `to_dense()`, and says so once where
they are large (`attlas.implicit`). What would write to the
dense weights, or record a gradient of them, would be lost with them: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor

from . import checks, implicit, indexing, statistics
from .matrix import NO_GRADIENT
from .readouts import Readouts

# Answered from shape, dtype and device.
KIND = (
    "element_size get_device is_complex is_cpu is_cuda is_floating_point is_meta is_mps is_nested "
    "is_quantized is_signed is_sparse is_xpu itemsize layout nbytes ndimension nelement new_empty "
    "new_full new_ones new_tensor new_zeros numel"
)
# Would act on dense weights that live on.
LOST = "backward data_ptr grad_fn storage untyped_storage"
# Would record a gradient of dense weights, which nothing is computed from.
RECORDED = "grad register_hook retain_grad"
# Operators, which Python looks up on the class.
OPERATORS = (
    "abs add bool eq floordiv ge gt le lt mod mul ne neg pos pow radd rfloordiv rmatmul rmul rpow "
    "rsub rtruediv sub truediv"
)
NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # names that torch takes, too


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with numpy's names of its arguments, too."""

    @wraps(method)
    def named(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **{NUMPY.get(name, name): value for name, value in kwargs.items()})

    return named


class TensorLike(Readouts):
    """The methods of a tensor, for `AttentionWeights`."""

    LAZY = ("sum", "mean", "amax", "argmax", "max", "clone", "numel", "is_floating_point")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in RECORDED.split():
            raise AttributeError(f"weights must be read only, got .{name}; {NO_GRADIENT}")
        if name in LOST.split() or name.endswith("_"):
            raise AttributeError(f"weights must be read only, got .{name}; call to_dense() first")
        if name in KIND.split():
            return getattr(self._element().expand(self.shape), name)
        if not callable(getattr(Tensor, name)):
            return getattr(implicit.dense(self, name), name)
        return lambda *args, **kwargs: getattr(implicit.dense(self, name), name)(*args, **kwargs)

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
            return implicit.dense(self, "to").to(*args, **kwargs)
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

    def type(self, dtype: Any = None, **_: Any) -> Any:
        """The name of the type; with a dtype or the name of a type, the weights in it."""
        return self._element().type() if dtype is None else self.to(self._element().type(dtype))

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
        dropout = None if self.dropout is None else self.dropout.map(fn)
        return replace(self, **tensors, found=found, dropout=dropout)

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
            normaliser=self.normaliser[:, at],
            found={name: tuple(t[:, at] for t in ts) for name, ts in self.found.items()},
            spec=replace(
                self.spec, shape=shape, masks=tuple(m.of_heads(chosen) for m in self.spec.masks)
            ),
            lead=(self.lead[0], len(chosen)),
            dropout=None if self.dropout is None else self.dropout.of_heads(chosen),
        )

    # --- reductions ---------------------------------------------------------------------

    @_named
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

    @_named
    def mean(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        """As `torch.Tensor.mean`; over heads it is `head_mean()`, dense."""
        dtype = dtype or self.dtype
        if self.ndim == 4 and 0 not in self.shape and self._dims(dim) == {1}:
            mean = self.head_mean().evaluate(statistics.Dense(self.logsumexp.dtype)).to(dtype)
            return mean.unsqueeze(1) if keepdim else mean
        count = 1
        for d in self._dims(dim):
            count *= self.shape[d]
        return (self.sum(dim, keepdim, dtype=self.logsumexp.dtype) / count).to(dtype)

    @_named
    def amax(self, dim: Any = (), keepdim: bool = False) -> Tensor:
        """As `torch.Tensor.amax`; over keys or over queries without the dense weights."""
        dims = self._dims(dim)
        if 0 in self.shape or not dims & {self.ndim - 2, self.ndim - 1}:
            return implicit.dense(self, "amax").amax(dim, keepdim)
        if self.ndim - 1 in dims:
            largest = self.max().values.unsqueeze(-1)
        else:
            largest = self.received("max").unsqueeze(-2)
        return largest.amax(tuple(dims), keepdim).to(self.dtype)

    @_named
    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """As `torch.Tensor.argmax`; over keys without the dense weights."""
        if not self._over_keys(dim):
            return implicit.dense(self, "argmax").argmax(dim, keepdim)
        keys = self.max().keys.clamp(min=0)
        return keys.unsqueeze(-1) if keepdim else keys

    @_named
    def max(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """The largest weight of each row and its key, `[B, H, L]`; 0 and -1 on an empty row.

        With `dim`, the largest weights and their indices as `torch.Tensor.max` gives them; over
        keys without the dense weights.
        """
        if dim is None:
            return super().max()
        if not self._over_keys(dim):
            return implicit.dense(self, "max").max(dim, *([keepdim] if keepdim else []))
        return torch.return_types.max((self.amax(dim, keepdim), self.argmax(dim, keepdim)))

    @_named
    def topk(
        self, k: int, dim: int | None = None, largest: bool = True, sorted: bool = True
    ) -> Any:
        """The k largest weights of each row, in falling order, and their keys, `[B, H, L, k]`.

        Where fewer than k keys are allowed the rest are 0, with key -1. With one of the other
        arguments, what `torch.Tensor.topk` gives; over keys without the dense weights.

        Raises:
            TypeError: k is not an int.
            ValueError: k is not from 1 to S.
        """
        if dim is None and largest and sorted:
            return super().topk(k)
        dim = -1 if dim is None else dim
        if not self._over_keys(dim):
            return implicit.dense(self, "topk").topk(k, dim, largest, sorted)

        def rows(i: int) -> Tensor:
            return self.map_rows(lambda weights: weights.topk(k, -1, largest, sorted)[i])

        return torch.return_types.topk((rows(0).to(self.dtype), rows(1)))

    def _over_keys(self, dim: Any) -> bool:
        return isinstance(dim, int) and self._dims(dim) == {self.ndim - 1}

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
        others = tuple(implicit.dense(o, name) if isinstance(o, TensorLike) else o for o in others)
        return getattr(implicit.dense(self, name), name)(*others)

    dense.__name__, dense.__doc__ = name, f"`{name}` of the dense weights."
    return dense


for _name in OPERATORS.split():
    setattr(TensorLike, f"__{_name}__", _operator(f"__{_name}__"))
