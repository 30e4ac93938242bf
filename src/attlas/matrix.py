"""A matrix of weights that is not there: what makes it look like a tensor and an operator.

    weights @ x      weights.T @ x      weights[...]      torch functions on weights

`LazyMatrix` is all of that but the numbers, which its subclasses give: `evaluate`, `@`, and what
an index reads. `attlas.readouts` adds what can be asked of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checks, implicit, statistics
from .blocks import Shape
from .divergence import Beside

NO_GRADIENT = (
    "the output is not computed from them: for its gradient take eager attention, or compute it "
    "as weights.to_dense() @ value"
)


class LazyMatrix:
    """Weights `[..., L, S]` that are computed when they are asked for."""

    LAZY: tuple[str, ...] = ()  # functions of torch that are methods of a subclass
    lead: tuple[int, ...]  # the dimensions before L and S

    @property
    def _sizes(self) -> Shape:
        """The sizes of the four-dimensional weights, as statistics see them."""
        raise NotImplementedError

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype of statistics, on the device."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weights, that of query."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of query."""
        raise NotImplementedError

    @property
    def _sums_to_one(self) -> bool:
        """True when the weights of every row that is not empty sum to 1."""
        return False

    def evaluate(self, statistic: statistics.Statistic) -> Any:
        """A statistic of the weights: a tensor, or a tuple of them."""
        raise NotImplementedError

    def _read(self, index: Any, kind: Any = "weights") -> Tensor:
        """The weights at an index, of a kind that `attlas.indexing` names."""
        raise NotImplementedError

    def _beside(self) -> Beside:
        """What a statistic of other weights needs to read these beside them."""
        raise NotImplementedError

    def __matmul__(self, x: Any) -> Tensor:
        raise NotImplementedError

    def _transposed_matmul(self, x: Any) -> Tensor:
        x4, vector = self._operand(x, self._sizes.queries, "L")
        if not checks.is_one_of(x4.shape[1], 1, self._sizes.heads):
            mend = "give one head, or one for each query head"
            checks.fail(ValueError, "x", "have the heads of the weights", x4.shape[1], mend)
        dtype = torch.promote_types(self.dtype, x4.dtype)
        x4 = x4.to(self._like.dtype)
        result = self.evaluate(statistics.TransposedProduct(x4)).to(dtype)
        return result.squeeze(-1) if vector else result

    def __getitem__(self, index: Any) -> Tensor:
        """The weights at an index, `to_dense()[index]`, computing only those.

        By the native kernels they are equal bit for bit. In plain PyTorch a product of another
        shape may round otherwise.
        """
        return self._read(index, "rounded").to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weights."""
        return torch.Size((*self.lead, self._sizes.queries, self._sizes.keys))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.lead) + 2

    @property
    def T(self) -> TransposedWeights:
        """The transposed weights, for `weights.T @ x`."""
        return TransposedWeights(self)

    mT = T

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def __repr__(self) -> str:
        size = implicit.of_bytes(self.shape.numel() * self.dtype.itemsize)
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}{where}, "
            f"lazy, {size} if dense)"
        )

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def to_dense(self) -> Tensor:
        """All the weights as a tensor; allocates L x S, as its name says."""
        return self.evaluate(statistics.Dense(self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        dense = implicit.dense(self, "__array__").detach().cpu()
        array = (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return implicit.dense(self, "__dlpack__").detach().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._like.__dlpack_device__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch functions see the dense weights; matmul and some reductions stay lazy."""
        name, of = getattr(func, "__name__", ""), args[0] if args else None
        if name in cls.LAZY and isinstance(of, cls) and (name != "max" or len(args) > 1 or kwargs):
            return getattr(of, name)(*args[1:], **(kwargs or {}))
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            left, right = args[:2]
            if torch.compiler.is_compiling() and func != torch.matmul:
                mend = "torch.compile swaps its sides; write torch.matmul(weights, x)"
                checks.fail(NotImplementedError, "@", "be compiled as a function", "@", mend)
            if isinstance(left, LazyMatrix | TransposedWeights):
                return left.__matmul__(_densify(right, "matmul"))
            right = right.T
            return right.__matmul__(left) if left.ndim == 1 else right.__matmul__(left.mT).mT
        if func is torch.autograd.grad and any(isinstance(i, LazyMatrix) for i in args[1]):
            checks.fail(TypeError, "inputs", "not be lazy weights", "some", NO_GRADIENT)
        densify = partial(_densify, name=name)
        return func(*tree_map(densify, args), **tree_map(densify, kwargs or {}))

    def _lead(self, result: Tensor) -> Tensor:
        """[B, H, ...] with the leading dimensions that the user gave."""
        return result.reshape(*self.lead, *result.shape[2:])

    def _operand(self, x: Any, size: int, letter: str) -> tuple[Tensor, bool]:
        """x as `[B or 1, H or 1, size, D]`, and whether it was a vector."""
        x = _densify(x, "matmul")
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            mend = "convert it with x.float(), of one dimension at least"
            checks.fail(TypeError, "x", "be a floating tensor", got, mend)
        vector = x.ndim == 1
        x = x.unsqueeze(-1) if vector else x
        full = (*self.lead, size, x.shape[-1])
        if x.shape[-2] != size or x.ndim not in (2, len(full)):
            mend = f"its last two dimensions are [{letter}, D], those before as in the weights"
            checks.fail(
                ValueError, "x", f"be [..., {letter}, D], {letter}={size}", list(x.shape), mend
            )
        x = x.view(*(1,) * (2 - len(self.lead)), *x.shape) if x.ndim == len(full) else x[None, None]
        if len(self.lead) == 1 and x.ndim == 4:
            x = x.transpose(0, 1)
        batch, heads = self._sizes[:2]
        fits = checks.is_one_of(x.shape[1], 1, heads, self._sizes.kv_heads)
        if not (fits and checks.is_one_of(x.shape[0], 1, batch)):
            mend = "give the leading dimensions of the weights, or none"
            checks.fail(ValueError, "x", f"broadcast to {list(full)}", list(x.shape), mend)
        checks.same_device("x", x, self.device)
        return x, vector


@dataclass(frozen=True, eq=False, repr=False)
class TransposedWeights:
    """weightsᵀ, `[B, H, S, L]`, as a linear operator."""

    weights: LazyMatrix

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense transpose."""
        *lead, queries, keys = self.weights.shape
        return torch.Size((*lead, keys, queries))

    @property
    def T(self) -> LazyMatrix:
        """The weights themselves."""
        return self.weights

    mT = T

    def __matmul__(self, x: Any) -> Tensor:
        """weightsᵀ @ x, `[..., S, D]`, for x `[L]`, `[L, D]` or with leading dimensions.

        x is read in the dtype of the statistics.
        """
        return self.weights._transposed_matmul(x)

    def to_dense(self) -> Tensor:
        """The transpose as a tensor; allocates L x S."""
        return self.weights.to_dense().mT

    def __repr__(self) -> str:
        return f"{self.weights!r}.T"

    __torch_function__ = LazyMatrix.__torch_function__


def _densify(value: Any, name: str) -> Any:
    """Dense weights in the place of lazy ones, for a function of that name."""
    if isinstance(value, TransposedWeights):
        return implicit.dense(value.weights, name).mT
    return implicit.dense(value, name) if isinstance(value, LazyMatrix) else value
