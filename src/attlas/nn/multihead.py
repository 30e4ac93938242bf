"""`MultiheadAttention`: torch.nn.MultiheadAttention by `attlas.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .heads import fail, in_heads


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Concat(softmax(Q_h K_hᵀ / sqrt(E)) V_h) Wᵒ, a drop-in for `torch.nn.MultiheadAttention`.

    Arguments, parameters, their names and initial values are those of torch's module, and so are
    both polarities of masks: True in `key_padding_mask` or `attn_mask` means *not* allowed, and
    floating masks are added to the scores. It differs in this:

    - a query that may attend to no key has weights 0 and attention output 0, not NaN;
    - `return_weights="lazy"` gives `attlas.AttentionWeights` in O(L) memory;
    - `need_weights` decides about the weights only: the output has the same bits in any case;
    - `is_causal=True` needs no `attn_mask`, and then no L x S mask is made;
    - nested tensors are refused.

    In training with dropout it drops other weights than torch does from the same seed, in O(L)
    memory. Dense weights are those after dropout, as torch gives them; lazy ones are those before,
    with those after it in `weights.dropped`.

    Example:
        >>> import torch, attlas
        >>> layer = attlas.nn.MultiheadAttention(64, num_heads=8, batch_first=True)
        >>> layer.load_state_dict(torch.nn.MultiheadAttention(64, 8).state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 100, 64)
        >>> output, weights = layer(x, x, x)  # the mean over heads, as torch gives it
        >>> weights.shape
        torch.Size([2, 100, 100])
        >>> output, weights = layer(x, x, x, is_causal=True, return_weights="lazy")
        >>> weights
        AttentionWeights(shape=[2, 8, 100, 100], dtype=torch.float32, lazy, 640 kB if dense)
        >>> weights.entropy().shape, weights.head_mean().topk(3).keys.shape
        (torch.Size([2, 8, 100]), torch.Size([2, 100, 3]))

    References:
        Vaswani et al., Attention Is All You Need, 2017, section 3.2.2.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        return_weights: str | None = None,
    ) -> tuple[Tensor, Any]:
        """The output, and the weights, dense, lazy or None.

        Args:
            query: `[N, L, E]` with batch_first, else `[L, N, E]`; `[L, E]` without a batch.
            key: `[N, S, kdim]`, likewise.
            value: `[N, S, vdim]`, likewise.
            key_padding_mask: `[N, S]` or `[S]`; True is a key to ignore, a float is added.
            need_weights: give dense weights; not read with return_weights.
            attn_mask: `[L, S]` or `[N * num_heads, L, S]`; True is a pair not allowed, a float is
                added, and may need a gradient.
            average_attn_weights: dense weights are the mean over heads.
            is_causal: a hint that attn_mask is the causal one; without attn_mask, the causal mask.
            return_weights: "lazy" for `AttentionWeights` of each head, of which
                `weights.head_mean()` is the mean.

        Returns:
            The output, as query. Weights `[N, L, S]`, or `[N, num_heads, L, S]` if lazy or not
            averaged, without N as the inputs; None if neither asked for.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: shapes or dtypes do not fit, or return_weights is another word.
            NotImplementedError: an input is a nested tensor.
        """
        if return_weights not in (None, "lazy"):
            mend = "need_weights=True gives dense weights"
            fail(ValueError, "return_weights", "be 'lazy' or None", repr(return_weights), mend)
        lazy, dense = return_weights == "lazy", need_weights and return_weights is None
        heads = in_heads(
            self,
            *(query, key, value, key_padding_mask, False, attn_mask, is_causal),
            batch_first=self.batch_first,
        )
        output, weights = heads.attend(self.dropout if self.training else 0.0)
        output = self.out_proj(output.transpose(-3, -2).flatten(-2))
        if query.ndim == 3 and not self.batch_first:
            output = output.transpose(0, 1)
        if not dense:
            return output, weights if lazy else None
        read = weights.dropped.to_dense()
        return output, read.mean(-3) if average_attn_weights else read
