"""Singular values of the weights, from products with them alone: no matrix.

    weights = U diag(σ) Vᵀ        effective rank = exp(-Σ s log s), s = σ / Σ σ

A basis of a few columns grows by the residuals of the singular vectors that it gives so far (a
block Krylov space), and is cut back to the best of them when it is full. The singular values
are then diag(Uᵀ W V) for constant vectors, which has their exact gradient, dσ = uᵀ dW v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .matrix import LazyMatrix

PASSES = 500  # products with the weights after which one gives up


class Spectrum(LazyMatrix):
    """What the singular values say of weights as operators."""

    def singular_values(self, k: int) -> Tensor:
        """The k largest singular values σ of each matrix of weights, `[B, H, k]`, falling.

        Matrix-free, in O((L + S) k) memory: some passes over the weights, until the residuals
        |W v - σ u| are below eps^(2/3) σ_1, which is what bounds the error. Differentiable once,
        where σ is simple and not 0.

        Args:
            k: how many, from 1 to min(L, S). Small k are meant: with all of them the vectors
                take as much memory as the weights.

        Raises:
            TypeError: k is not an int.
            ValueError: k is not from 1 to min(L, S).
            RuntimeError: the iteration does not converge.
            NotImplementedError: in a backward with create_graph=True.

        Example:
            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 6, 8)  # all rows alike: rank 1
            >>> attlas.attention(q, q, q).weights.singular_values(2)
            tensor([[[1.0000, 0.0000]]])

        References:
            Golub and Kahan, 1965. Musco and Musco, Randomized Block Krylov Methods for Stronger
            and Faster Approximate Singular Value Decomposition, 2015.
        """
        most = min(self._sizes.queries, self._sizes.keys)
        checks.whole_number("k", k, least=1, most=max(most, 1))
        if not most:
            return self._like.new_zeros(*self.lead, k)
        with torch.no_grad():
            left, right = _vectors(self, k)
        values = (left * (self @ right).to(left.dtype)).sum(-2).clamp(min=0)
        return _Once.apply(values) if values.requires_grad else values

    def effective_rank(self, k: int) -> Tensor:
        """exp(-Σ s log s) for s = σ / Σ σ of the k largest singular values, `[B, H]`.

        From 1 (all rows alike) to k; 0 where all weights are 0. k = min(L, S) is the definition;
        fewer leave out the tail of the spectrum, and give a lower bound.
        Memory, errors and the gradient as for `singular_values`.

        Args:
            k: how many singular values, from 1 to min(L, S).

        Raises:
            TypeError, ValueError, RuntimeError: as `singular_values`.

        Example:
            >>> import torch, attlas
            >>> q = 30 * torch.eye(6)[None, None]  # each query reads its own key
            >>> attlas.attention(q, q, q).weights.effective_rank(6)
            tensor([[6.0000]])

        References:
            Roy and Vetterli, The effective rank: a measure of effective dimensionality, 2007.
        """
        values = self.singular_values(k)
        total = values.sum(-1, keepdim=True)
        share = values / total.masked_fill(total == 0, 1.0)
        log = share.masked_fill(share == 0, 1.0).log()
        rank = (-(share * log).sum(-1)).exp()
        return rank.masked_fill(total.squeeze(-1) == 0, 0.0)


def _vectors(weights: LazyMatrix, k: int) -> tuple[Tensor, Tensor]:
    """The first k singular vectors, `[..., L, k]` and `[..., S, k]`."""
    if weights.shape[-2] > weights.shape[-1]:
        right, left = _krylov(weights.T, weights, weights._like, k)
        return left, right
    return _krylov(weights, weights.T, weights._like, k)


def _krylov(wide: Any, tall: Any, like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k left and right singular vectors of a wide matrix, and `tall`, its transpose."""
    rank = wide.shape[-2]
    full = min(max(6 * k, 32), rank)  # the columns of a full basis
    noise = torch.Generator("cpu").manual_seed(0)

    def random(columns: int) -> Tensor:
        size = (*wide.shape[:-1], columns)
        return torch.randn(size, generator=noise, dtype=like.dtype, device="cpu").to(like.device)

    def times(matrix: Any, x: Tensor) -> Tensor:
        return (matrix @ x).to(like.dtype)

    basis = torch.linalg.qr(random(min(k + 4, rank)))[0]
    image = times(tall, basis)
    for _ in range(0, PASSES, 2):
        # basis @ image.mT is the matrix on the basis: its singular vectors, and what they miss.
        right, values, mixed = torch.linalg.svd(image, full_matrices=False)
        left = basis @ mixed.mT
        miss = times(wide, right[..., :k]) - left[..., :k] * values[..., None, :k]
        error = torch.linalg.vector_norm(miss, dim=-2, keepdim=True)
        limit = torch.finfo(like.dtype).eps ** (2 / 3) * values[..., None, :1]
        if bool((error <= limit).all()) or basis.shape[-1] == rank:
            return left[..., :k], right[..., :k]
        if basis.shape[-1] + k > full < rank:
            kept = 2 * k + 8
            basis, image = left[..., :kept], (right * values[..., None, :])[..., :kept]
        fresh = torch.where(error <= limit, random(k), miss)[..., : rank - basis.shape[-1]]
        for _ in range(3):  # once more than exact arithmetic needs, and once for roundings
            fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh))[0]
        basis = torch.cat([basis, fresh], dim=-1)
        image = torch.cat([image, times(tall, fresh)], dim=-1)
    raise RuntimeError(
        f"k must leave a gap that {PASSES} passes resolve, got {k}; choose another k, or take "
        "torch.linalg.svdvals(weights.to_dense())"
    )


class _Once(torch.autograd.Function):
    """The identity; vectors that are held constant would make a second derivative wrong."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            rule, got = "be differentiated once, without create_graph", "create_graph=True"
            mend = "take torch.linalg.svdvals(weights.to_dense())"
            checks.fail(NotImplementedError, "singular_values", rule, got, mend)
        return grads[0]
