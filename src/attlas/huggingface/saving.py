"""Attention weights on disk: query, key, log-sum-exp and the score specification, as safetensors.

    save(path, [call.weights for call in run], tokens)
    layers, tokens = load(path)

The weights stay lazy: a file takes the O(L) memory that they do, and what is read back computes
the same weights again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import attlas

from .masks import KeyIntervals

FORMAT = "attlas 1"
OPTIONS = ("scale", "softcap", "alignment", "guard")
TENSORS = ("query", "key", "bias", "sinks", "normaliser")


class Saved(NamedTuple):
    """What `load` gives."""

    layers: list[attlas.AttentionWeights]
    tokens: list[str]


def save(
    path: str | Path, layers: Sequence[attlas.AttentionWeights], tokens: Sequence[str] = ()
) -> None:
    """Writes the weights of some layers, and the tokens that they are between.

    A mask is kept as one interval of keys for each query where it is one, else as bool.

    Args:
        path: the file.
        layers: lazy weights, such as `outputs.attentions`.
        tokens: the text of each position.

    Raises:
        TypeError: a layer is something else, such as the tensor of one query.
    """
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for i, weights in enumerate(layers):
        if not isinstance(weights, attlas.AttentionWeights):
            raise TypeError(
                f"layers[{i}] must be AttentionWeights, got {type(weights).__name__}; "
                "keep tensors with safetensors itself"
            )
        spec = weights.spec
        held: dict[str, Tensor | None] = {name: getattr(weights, name) for name in TENSORS}
        held |= _mask(weights)
        for name, tensor in held.items():
            if tensor is not None:
                copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                tensors[f"{i}.{name}"] = copied
        options = {name: getattr(spec, name) for name in OPTIONS}
        described.append({**options, "shape": list(spec.shape), "lead": list(weights.lead)})
    header = {"layers": described, "tokens": list(tokens)}
    save_file(tensors, path, {"format": FORMAT, "attlas": json.dumps(header)})


def load(path: str | Path) -> Saved:
    """The weights and tokens of a file that `save` wrote.

    Raises:
        ValueError: the file is another one.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"path must be a file of {FORMAT!r}, got format {metadata.get('format')!r}; "
                "write one with attlas.huggingface.save"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["attlas"])
    layers = [_layer(i, one, tensors) for i, one in enumerate(header["layers"])]
    return Saved(layers, header["tokens"])


def _mask(weights: attlas.AttentionWeights) -> dict[str, Tensor]:
    """The masks as tensors: start and stop of an interval, or allowed."""
    bound, shape = weights.spec.bind(), weights.spec.shape
    if bound is None:
        return {}
    if bound.bounds.exact:
        return {"start": bound.bounds.start, "stop": bound.bounds.stop}
    allowed = bound.mask.to_dense(
        queries=shape.queries, keys=shape.keys, batch=shape.batch, heads=shape.heads
    )
    for dim in range(4):  # what is the same along a dimension is kept once
        if allowed.stride(dim) == 0:
            allowed = allowed.narrow(dim, 0, 1)
    return {"allowed": allowed}


def _layer(i: int, described: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    own = {name: tensors.get(f"{i}.{name}") for name in (*TENSORS, "start", "stop", "allowed")}
    start, stop, allowed = (own.pop(name) for name in ("start", "stop", "allowed"))
    example = attlas.attention(*[torch.zeros(1, 1, device="cpu")] * 3).weights
    shape = type(example.spec.shape)(*described["shape"])
    masks: tuple[attlas.masks.Mask, ...] = ()
    if start is not None and stop is not None:
        full = torch.Size((shape.batch, 1, shape.queries, shape.keys))
        masks = (KeyIntervals(start, stop, full),)
    elif allowed is not None:
        masks = (attlas.masks.from_tensor(allowed),)
    options = {name: described[name] for name in OPTIONS}
    spec = replace(example.spec, shape=shape, masks=masks, **options)
    return replace(example, **own, spec=spec, lead=tuple(described["lead"]))
