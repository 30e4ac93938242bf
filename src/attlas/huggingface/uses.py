"""What people read attention for, each in O(L) memory.

entropy_profile      how sharply each head of a model looks
heavy_hitters        how much each key of a cache is read (H2O)
window_scores        how much the last queries read each key (SnapKV)
best_matches         the key that each of some queries means, both ways (RXNMapper)
token_timestamps     when each token of Whisper was spoken
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import attlas

from .recording import Call, capture

POSITIONS = 50  # of Whisper's encoder in a second


def entropy_profile(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The mean entropy of the rows of each head, `[layers, heads]`, in nats.

    Padding is left out where inputs have an attention mask. All layers of the model must have
    one number of heads.

    Args:
        model: a model of transformers that uses its attention interface.
        inputs: what it is called with.
    """
    mask = inputs.get("attention_mask")

    def mean(weights: attlas.AttentionWeights) -> Tensor:
        entropy = weights.entropy()
        real = torch.ones_like(entropy[:, 0]) if mask is None else mask.to(entropy)
        return torch.einsum("bhl,bl->h", entropy, real) / real.sum()

    with torch.no_grad(), capture(model, reduce={"entropy": mean}) as run:
        model(**inputs)
    return torch.stack([call.statistics["entropy"] for call in run])


def heavy_hitters(weights: attlas.AttentionWeights, kv_heads: int | None = None) -> Tensor:
    """Σ_i p_ij / (the number of queries that may see key j), `[B, Hkv, S]`.

    A causal key that comes late is seen by few queries: the mean over those that see it is what
    compares keys. Heads that share a key head are averaged.

    Args:
        weights: causal self attention of a prompt, `[B, H, S, S]`.
        kv_heads: how many key heads the cache has; default: those of weights.

    References:
        Zhang et al., H2O: Heavy-Hitter Oracle, 2023. kvpress, ObservedAttentionPress.
    """
    keys = weights.shape[-1]
    seen = torch.arange(keys, 0, -1, device=weights.device)
    return _of_groups(weights.received() / seen, weights, kv_heads)


def window_scores(
    weights: attlas.AttentionWeights, window: int, kernel: int = 5, kv_heads: int | None = None
) -> Tensor:
    """The mean weight that the last queries give to each key before them, smoothed, `[B, Hkv, S]`.

    The window itself has the largest score, so that it is kept.

    Args:
        weights: causal self attention of a prompt, `[B, H, S, S]`.
        window: how many queries look.
        kernel: keys of the moving average, odd; 1 for none.
        kv_heads: how many key heads the cache has; default: those of weights.

    References:
        Li et al., SnapKV, 2024.
    """
    keys = weights.shape[-1]
    scores = weights.received("mean", queries=slice(keys - window, keys))[..., : keys - window]
    scores = F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    scores = _of_groups(scores, weights, kv_heads)
    return F.pad(scores, (0, window), value=float(scores.max()) if scores.numel() else 0.0)


def _of_groups(scores: Tensor, weights: attlas.AttentionWeights, kv_heads: int | None) -> Tensor:
    kv_heads = kv_heads or weights.key.shape[1]
    return scores.unflatten(1, (kv_heads, -1)).mean(2)


def best_matches(
    weights: attlas.AttentionWeights, head: int, queries: Sequence[int], keys: Sequence[int]
) -> Tensor:
    """For each query the key j of the largest p_ij + p_ji, as positions `[B, queries]`.

    Only the rows and columns of the chosen tokens are computed. With the head that maps atoms of
    RXNMapper (layer 10, head 5), atoms of the product as queries and atoms of the reactants as
    keys, it is the atom mapping before RXNMapper's rules of chemistry.

    Args:
        weights: self attention, `[B, H, L, L]`.
        head: which head.
        queries: positions of the tokens to be matched.
        keys: positions of those that they are matched with.

    References:
        Schwaller et al., Extraction of organic chemistry grammar from unsupervised learning of
        chemical reactions, 2021.
    """
    rows, columns = torch.as_tensor(queries), torch.as_tensor(keys)
    there = weights[:, head, rows][..., columns]
    back = weights[:, head, columns][..., rows]
    return columns.to(there.device)[(there + back.mT).argmax(-1)]


# Options of generate that would change what it returns.
FORMS = (
    "force_unique_generate_call",
    "return_dict_in_generate",
    "return_segments",
    "return_token_timestamps",
)


def token_timestamps(
    model: PreTrainedModel,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What Whisper hears and when each token was spoken, `(tokens [B, T], seconds [B, T])`.

    The model stays with fused attention, and of each step only the queries of the layers with
    alignment heads are kept: the weights of one head after the other are computed at the end. For
    audio of one segment, up to 30 s; greedy or sampled.

    The times are those of transformers, which are late by one token: each token is given the time
    at which the model, having read it, looks for the next one. To know when a word begins, take
    the time of the token before it.

    Args:
        model: `WhisperForConditionalGeneration`, with alignment heads in its generation config.
        input_features: `[B, mels, frames]`.
        attention_mask: `[B, frames]`, 1 for the frames that are audio, at the beginning; only
            those can be a token's time. None for all.
        options: for `model.generate`; no beams.

    Raises:
        ValueError: the model has no alignment heads; beams, or another form of result, are
            asked for.

    References:
        Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2022; the
        alignment is that of its reference implementation: weights normalised over tokens,
        median filtered, averaged over heads, and warped.
    """
    alignment = getattr(model.generation_config, "alignment_heads", None)
    if not alignment:
        raise ValueError(
            "model must have alignment_heads in its generation config, got none; load one that "
            "was made for timestamps, such as a Whisper of OpenAI"
        )
    if options.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams must be 1, got {options['num_beams']}; sample or be greedy")
    for name in FORMS:
        if name in options:
            raise ValueError(
                f"options must not have {name}, got {options[name]!r}; leave it out: tokens and "
                "seconds are what is returned"
            )
    layers = sorted({layer for layer, _ in alignment})
    last: deque[attlas.AttentionWeights] = deque(maxlen=len(layers))  # of each of the layers

    def query(weights: attlas.AttentionWeights) -> Tensor:
        last.append(weights)  # the key, which is the encoder's, is that of all steps
        return weights.query

    reduce = {"query": query}
    with torch.no_grad(), capture(model, layers, within="encoder_attn", reduce=reduce) as run:
        tokens: Any = model.generate(  # type: ignore[operator]
            input_features,
            attention_mask=attention_mask,
            return_dict_in_generate=False,  # a dict would have a copy of the whole cache
            force_unique_generate_call=True,  # with the prompt
            **options,
        )
    weights = {
        layer: _generated(run.of(layer), tokens, at_last.key, at_last.spec.scale)
        for layer, at_last in zip(layers, last, strict=True)
    }
    seconds = torch.zeros(tokens.shape, dtype=torch.float32)
    for i in range(len(tokens) if weights[layers[0]].shape[2] else 0):
        # Two frames are a position.
        heard = None if attention_mask is None else int(attention_mask[i].sum()) // 2
        seen = torch.zeros(())
        for layer, head in alignment:
            read = weights[layer][i, head, :, :heard].float().cpu()
            spread, middle = torch.std_mean(read, dim=0, keepdim=True, correction=0)
            seen = seen + _median((read - middle) / spread, model.config.median_filter_width)
        starts = _warp(-seen.double() / len(alignment)) / POSITIONS
        # The last token was not read by the model: it is given the time of the one before.
        seconds[i, -len(starts) - 1 :] = torch.cat([starts, starts[-1:]])
    return tokens, seconds


def _generated(
    calls: Sequence[Call], tokens: Tensor, key: Tensor, scale: float
) -> attlas.AttentionWeights:
    """The weights of one layer for the tokens that were generated, `[B, H, tokens, S]`.

    The steps are taken from the end: a forward to detect the language may come before them. The
    first of them reads the prompt.
    """
    steps, missing = [], tokens.shape[1] - 1
    for call in reversed(calls):
        query = call.statistics["query"]
        missing -= query.shape[2]
        if missing <= 0:
            steps.append(query[:, :, :0])
            break
        steps.append(query)
    query = torch.cat(steps[::-1], dim=2)
    return attlas.attention(query, key, key, scale=scale).weights


def _median(weights: Tensor, width: int) -> Tensor:
    """The median of `width` neighbours along the last dimension, mirrored at the ends."""
    side = width // 2
    if weights.shape[-1] <= side:
        return weights
    padded = F.pad(weights, (side, side), mode="reflect")
    return padded.unfold(-1, width, 1).median(-1).values


def _warp(cost: Tensor) -> Tensor:
    """The first column of each row on the cheapest monotone path through `cost [n, m]`.

    Column by column, the best cost of a row is its own plus the least of its left neighbour, the
    one above, and the one above left; an antidiagonal is computed at once.
    """
    rows, columns = cost.shape
    total = cost.new_full((rows + 1, columns + 1), torch.inf)
    total[0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        i = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = torch.stack([total[i, j], total[i, j + 1], total[i + 1, j]])
        total[i + 1, j + 1] = cost[i, j] + before.amin(0)
    starts = torch.zeros(rows)
    i, j = rows, columns
    while i > 0:
        starts[i - 1] = j - 1
        both, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        if both < up and both < left:
            i, j = i - 1, j - 1
        elif up < both and up < left:
            i -= 1
        else:
            j -= 1
    return starts
