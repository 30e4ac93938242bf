"""Lazy weights compared with others: dense, sparse or lazy ones, in O(L) memory.

    KL(p ‖ q) = Σ_j p_ij (log p_ij - log q_ij)      H(t, p) = -Σ_j t_ij log p_ij

The mathematics of a block is in `attlas.divergence`; a sparse target is read pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .divergence import (
    Beside,
    CrossEntropy,
    DenseBeside,
    KLDivergence,
    TargetCrossEntropy,
    expected_log,
)
from .matrix import LazyMatrix


class Comparisons(LazyMatrix):
    """Divergences between weights, for distillation and supervision."""

    def kl_divergence(self, other: LazyMatrix | Tensor) -> Tensor:
        """KL(p ‖ q) = Σ_j p_ij (log p_ij - log q_ij), `[B, H, L]`, in nats: p these, q the other.

        A key with p = 0 gives 0, one with only q = 0 gives +inf (a constant, without a gradient).
        An empty row of p gives 0. With sinks the rows sum to less than 1, and this is the sum
        over keys alone, as it is for `entropy`; it may then be negative. Gradients reach both.

        Args:
            other: lazy weights of the same shape, of any head size, number of key heads, mask,
                options and implementation; or a dense floating tensor that broadcasts to
                `[B, H, L, S]`, of weights that are at least 0.

        Raises:
            TypeError: other is neither.
            ValueError: its shape, dtype, device or values do not fit.

        Example:
            Distillation of attention maps: `teacher.kl_divergence(student).mean()`.

            >>> import torch, attlas
            >>> x, y = torch.randn(2, 1, 4, 10, 8).unbind()
            >>> student = attlas.attention(x, x, x, is_causal=True).weights
            >>> teacher = attlas.attention(y, y, y, is_causal=True).weights
            >>> bool((teacher.kl_divergence(student) >= 0).all())
            True

        References:
            Kullback and Leibler, 1951. Wang et al., MiniLM, 2020, equation 2 (distillation).
        """
        divergence = self.evaluate(KLDivergence(self._other("other", other)))
        if not (self._sums_to_one and isinstance(other, LazyMatrix) and other._sums_to_one):
            return divergence
        return divergence - divergence.detach().clamp(max=0.0)  # the rounding of the sums of rows

    def cross_entropy(self, target: LazyMatrix | Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """-Σ_j t_ij log p_ij, `[B, H, L]`, in nats: p these weights, t the target.

        A key with t = 0 gives 0, one with t > 0 and p = 0 gives +inf (a constant, without a
        gradient). The target is not normalised: a row of zeros gives 0, and leaves the row out.
        With sinks p is what is left for keys. KL(t ‖ p) is this less the entropy of t. Gradients
        reach the weights, and a floating target.

        Args:
            target: one of
                lazy weights of the same shape;
                a dense floating tensor that broadcasts to `[B, H, L, S]`, of at least 0;
                a sparse tensor (COO or CSR) of the shape of the weights;
                an integer tensor that broadcasts to `[B, H, L]`: the key that each query is to
                read, as classes are given to `torch.nn.functional.cross_entropy`;
                a pair (values, keys) that broadcasts to `[B, H, L, k]`, as `topk` gives.
                A key below 0 means none.

        Raises:
            TypeError: target is none of these.
            ValueError, IndexError: its shape, dtype, device, values or keys do not fit.

        Example:
            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 4, 8)
            >>> weights = attlas.attention(q, q, q).weights  # each weight is 1 / 4
            >>> weights.cross_entropy(torch.tensor([0, 3, 2, -1]))
            tensor([[[1.3863, 1.3863, 1.3863, 0.0000]]])
        """
        if isinstance(target, LazyMatrix):
            self._same_shape("target", target)
            return target.evaluate(CrossEntropy(self._beside()))
        if isinstance(target, tuple) and len(target) == 2:
            return self._cross_entropy_at(*target)
        if isinstance(target, Tensor) and target.layout != torch.strided:
            return self._cross_entropy_sparse(target)
        if isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex()):
            if target.dtype == torch.bool:
                mend = "convert it with target.float() for a mask of 0 and 1"
                checks.fail(TypeError, "target", "be floating or positions", "bool", mend)
            ones = self._like.new_ones((1,) * (target.ndim + 1))
            return self._cross_entropy_at(ones, target.unsqueeze(-1))
        return self.evaluate(TargetCrossEntropy(self._dense_other("target", target)))

    def _cross_entropy_at(self, values: Tensor, keys: Tensor) -> Tensor:
        """The cross-entropy to a target that is 0 but for k keys of each row."""
        mend = "pass (values, keys) as `topk` gives, or keys alone as integers [..., L]"
        checks.float_tensor("the values of target", values, self._like, mend)
        if not isinstance(keys, Tensor) or keys.is_floating_point() or keys.dtype == torch.bool:
            got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            checks.fail(TypeError, "the keys of target", "be an integer tensor", got, mend)
        checks.same_device("the keys of target", keys, self.device)
        rows, count = tuple(self.shape[:-1]), keys.shape[-1] if keys.ndim else 0
        for name, tensor in (("keys", keys), ("values", values)):
            if not _broadcasts(tensor.shape, (*rows, count)):
                rule = f"broadcast to [..., L, k] = {[*rows, count]}"
                checks.fail(ValueError, f"the {name} of target", rule, list(tensor.shape), mend)
        keys = keys.long().expand(*rows, count)
        there = keys >= 0
        grids = torch.meshgrid(
            *(torch.arange(n, device=self.device) for n in (*rows, count)), indexing="ij"
        )
        index = (*(g[there] for g in grids[:-1]), keys[there])
        targets = values.to(self._like.dtype).expand(*rows, count)[there]
        return self._cross_entropy_pairs(index, targets)

    def _cross_entropy_sparse(self, target: Tensor) -> Tensor:
        """The cross-entropy to a target of sparse layout."""
        if target.shape != self.shape:
            mend = "give it the shape of the weights"
            rule = f"have the shape {list(self.shape)} where it is sparse"
            checks.fail(ValueError, "target", rule, list(target.shape), mend)
        target = target.to_sparse_coo().coalesce()
        mend = "a sparse target holds weights: convert it with target.float()"
        checks.float_tensor("target", target.values(), self._like, mend)
        index = tuple(target.indices())
        return self._cross_entropy_pairs(index, target.values().to(self._like.dtype))

    def _cross_entropy_pairs(self, index: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """-Σ t log p over pairs (..., query, key), summed into rows."""
        checks.at_least_zero("target", targets)
        shape = self.shape[:-1]
        row = torch.zeros_like(index[-1])
        for part, size in zip(index[:-1], shape, strict=True):
            row = row * size + part
        terms = expected_log(targets, self._read(index, "logs"))
        return -terms.new_zeros(shape.numel()).index_add(0, row, terms).view(shape)

    def _other(self, name: str, other: Any) -> Beside | DenseBeside:
        """What a statistic reads beside these weights."""
        if isinstance(other, LazyMatrix):
            self._same_shape(name, other)
            return other._beside()
        return DenseBeside(self._dense_other(name, other))

    def _same_shape(self, name: str, other: LazyMatrix) -> None:
        if other.shape != self.shape:
            mend = "compare weights of the same queries, keys and heads, or their head_mean()"
            checks.fail(
                ValueError, name, f"have the shape {list(self.shape)}", list(other.shape), mend
            )
        if other.device != self.device:
            mend = "compute both on one device"
            checks.fail(ValueError, name, f"be on the device {self.device}", other.device, mend)

    def _dense_other(self, name: str, other: Any) -> Tensor:
        """Dense weights as `[B or 1, H or 1, L or 1, S or 1]` in the dtype of statistics."""
        mend = "pass lazy weights, or a tensor of weights"
        checks.float_tensor(name, other, self._like, mend)
        if other.layout != torch.strided:
            rule, mend = "be lazy or dense", f"write {name}.to_dense()"
            checks.fail(TypeError, name, rule, str(other.layout), mend)
        checks.mask_dimensions(name, other.shape, self.ndim)
        checks.broadcastable(name, other.shape, self.shape)
        checks.at_least_zero(name, other)
        other = other[(None,) * (self.ndim - other.ndim)].to(self._like.dtype)
        lead = other.shape[:-2]
        return other.reshape(*((1, 1) if not lead else (*lead, 1)[:2]), *other.shape[-2:])


def _broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) in (1, 2, len(full)) and all(
        checks.is_one_of(size, 1, want) for size, want in pairs
    )
