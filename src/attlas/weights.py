"""Attention weights that are not materialised until asked.

    weights[i, j] = exp(score[i, j] - m[i]) / l[i]

`AttentionWeights` holds query, key, the normaliser (m, l) of each row and the score specification,
O(L) memory. Rows, tiles and statistics are computed from them, exactly, and are differentiable
with respect to query, key, bias and sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, compute, indexing, ops, statistics
from .blocks import Shape
from .comparisons import Comparisons
from .divergence import Beside
from .dropout import Dropout
from .dropped import DroppedWeights
from .heads import HeadMean
from .masks import sliding_window
from .spec import Inputs, ScoreSpec, logsumexp, sink_weights
from .spectrum import Spectrum
from .tensorlike import TensorLike


@dataclass(frozen=True, eq=False, repr=False)
class AttentionWeights(TensorLike, Comparisons, Spectrum):
    """The weights of one attention call, `[B, H, L, S]` (or `[B, L, S]`, `[L, S]`), lazily.

    Query, key, bias and mask are kept, not copied: what is changed in place after the call changes
    the weights; clone it first. Without gradients at the call, readouts have none.
    Rows that may attend to no key have weights 0. Statistics are float32 (float64 for float64
    inputs), and where this says `[B, H, L]`, the leading dimensions are those of the weights.

    Get one from `attlas.attention`. Its readouts, products and indices hold a few blocks of the
    matrix at a time, and their results (but for `impl="reference"`, which is dense). `to_dense()`
    allocates L x S, and so does what a tensor has and this has no way of its own for: operators
    such as `weights * 2`, other methods, functions of torch, numpy. Those say so by a warning, once
    each, where the dense weights take 256 MB or more.
    """

    query: Tensor  # [B, Hq, L, E]
    key: Tensor  # [B, Hkv, S, E]
    bias: Tensor | None
    sinks: Tensor | None
    normaliser: Tensor  # [B, Hq, L, 2]: the largest score of a row, and the sum relative to it
    spec: ScoreSpec
    impl: str  # the implementation that computed them, and computes readouts
    lead: tuple[int, ...]  # the leading dimensions that the user gave
    found: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # statistics that are known
    dropout: Dropout | None = None  # of the call, after these weights

    @property
    def _sizes(self) -> Shape:
        return self.spec.shape

    @property
    def _like(self) -> Tensor:
        return self.normaliser

    @property
    def _sums_to_one(self) -> bool:
        return self.sinks is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weights, that of query."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """The device of query."""
        return self.query.device

    @property
    def requires_grad(self) -> bool:
        """True when a readout may have a gradient: the normaliser has one."""
        return self.normaliser.requires_grad

    @property
    def logsumexp(self) -> Tensor:
        """log Σ_j exp(score_ij), `[B, H, L]`, natural log, sinks included; -inf on an empty row."""
        return self._lead(logsumexp(self.normaliser))

    @property
    def dropped(self) -> DroppedWeights | AttentionWeights:
        """What was multiplied with the values, lazily: the weights after dropout.

        `dropped[...]`, `dropped @ x`, `dropped.T @ x`, `dropped.to_dense()`. Without dropout,
        the weights themselves.

        Example:
            >>> import torch, attlas
            >>> q = torch.zeros(1, 1, 3, 4)
            >>> _ = torch.manual_seed(0)
            >>> output, weights = attlas.attention(q, q, q, dropout_p=0.5)
            >>> weights[0, 0, 0], weights.dropped[0, 0, 0]
            (tensor([0.3333, 0.3333, 0.3333]), tensor([0.6667, 0.0000, 0.6667]))
        """
        return self if self.dropout is None else DroppedWeights(self, self.dropout)

    def detach(self) -> AttentionWeights:
        """The same weights without gradients."""
        return self._map(Tensor.detach)

    # --- reading ------------------------------------------------------------------------

    def head_mean(self) -> HeadMean:
        """The mean over heads, lazily: `[B, L, S]`, with every readout, index and product.

        `weights.head_mean().entropy()` is the entropy of the mean, which is at least
        `weights.entropy().mean(1)`, the mean of the entropies.

        Raises:
            ValueError: the weights are not `[B, H, L, S]` with at least one head.

        Example:
            >>> import torch, attlas
            >>> q = torch.randn(2, 8, 100, 64)
            >>> mean = attlas.attention(q, q, q).weights.head_mean()
            >>> mean
            HeadMean(shape=[2, 100, 100], dtype=torch.float32, lazy, 80 kB if dense)
            >>> mean.topk(3).keys.shape, mean[0, 5].shape, (mean @ q[:, 0]).shape
            (torch.Size([2, 100, 3]), torch.Size([100]), torch.Size([2, 100, 64]))
        """
        if len(self.lead) != 2 or not self.spec.shape.heads:
            rule, mend = (
                "be [B, H, L, S] to have a mean of heads",
                "call attention with [B, H, L, E]",
            )
            checks.fail(ValueError, "weights", rule, list(self.shape), mend)
        return HeadMean(self)

    def _within(self, left: int | None, right: int | None) -> AttentionWeights:
        masks = (*self.spec.masks, sliding_window(left, right, self.spec.alignment))
        return replace(self, spec=replace(self.spec, masks=masks), found={})

    def _read(self, index: Any, kind: indexing.Kind = "weights") -> Tensor:
        full = indexing.expand(index, self.shape)
        return indexing.read(full, self.shape, self._matrix(), kind=kind)

    def _matrix(self) -> indexing.Matrix:
        """What an index reads."""
        return indexing.Matrix(
            self.spec, *self._tensors, ops.block_weights(self.impl, *self._tensors)
        )

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What a block of the weights is computed from."""
        return self.query, self.key, self.bias, self.normaliser

    def _beside(self) -> Beside:
        return Beside(self.spec, self._tensors, mean=False)

    def sink_mass(self) -> Tensor:
        """exp(sink - m) / l, the weight of the sink logits, `[B, H, L]`; 0 without sinks."""
        if self.sinks is None:
            return torch.zeros_like(self.logsumexp)
        return self._lead(sink_weights(self.sinks, self.normaliser))

    # --- the operator -------------------------------------------------------------------

    def __matmul__(self, x: Any) -> Tensor:
        """weights @ x, `[..., L, D]`, for x `[S]`, `[S, D]` or with leading dimensions."""
        return self._product(x)

    def _product(self, x: Any, dropout: Dropout | None = None) -> Tensor:
        x4, vector = self._operand(x, self.spec.shape.keys, "S")
        dtype = torch.promote_types(self.dtype, x4.dtype)
        query, key, x4 = (t.to(dtype) for t in (self.query, self.key, x4))
        shape, spec = self.spec.shape, replace(self.spec, dropout=dropout)
        if not checks.is_one_of(x4.shape[1], 1, shape.kv_heads):
            key = key.repeat_interleave(shape.group, dim=1)
            spec = replace(spec, shape=shape._replace(kv_heads=shape.heads))
        x4 = x4.expand(shape.batch, key.shape[1], *x4.shape[2:])
        inputs = Inputs(query, key, x4, self.bias, self.sinks)
        result = self._lead(ops.attend(self.impl, spec, inputs).output)
        return result.squeeze(-1) if vector else result

    def evaluate(self, statistic: statistics.Statistic) -> Any:
        """A statistic of your own; see `attlas.statistics`.

        Returns:
            Its result, or a tuple of them where it has more than one.
        """
        shaped = tuple(self._lead(result) for result in self._results(statistic))
        return shaped[0] if len(shaped) == 1 else shaped

    def _results(self, statistic: statistics.Statistic) -> tuple[Tensor, ...]:
        """The results of a statistic, `[B, H, ...]` each."""
        for name, tensors in self.found.items():
            if compute.is_found(name, statistic):
                return tensors
        return ops.read(self.impl, statistic, self.spec, *self._tensors)
