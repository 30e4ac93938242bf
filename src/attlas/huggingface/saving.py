"""Attention weights on disk: their tensors and their encoded specification, as safetensors.

    save(path, [call.weights for call in run], tokens)
    layers, tokens = load(path)

The weights stay lazy: a file takes the O(L) memory that they do, and what is read back computes
the same weights again, bit for bit, and drops the same of them. The specification is written as
the operators take it (`attlas.encoding`), so that there is no second list of what it holds.
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

from ..encoding import Encoded, decode, encode, without_objects

FORMAT = "attlas 2"
FIRST_FORMAT = "attlas 1"  # which `load` still reads
TENSORS = ("query", "key", "bias", "sinks", "normaliser")  # of AttentionWeights
NUMBERS = ("code", "scale", "softcap", "dropout_p")  # of Encoded


class Saved(NamedTuple):
    """What `load` gives."""

    layers: list[attlas.AttentionWeights]
    tokens: list[str]


def save(
    path: str | Path, layers: Sequence[attlas.AttentionWeights], tokens: Sequence[str] = ()
) -> None:
    """Writes the weights of some layers, and the tokens that they are between.

    A mask is kept as the rule that it is; one of a Python function is evaluated, and kept as bool.
    Statistics that were found with the output are not kept: they are computed again.

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
            mend = (
                "keep tensors with safetensors itself, and of what is made of weights its .weights"
            )
            kind = type(weights).__name__
            raise TypeError(f"layers[{i}] must be AttentionWeights, got {kind}; {mend}")
        encoded = _encoded(weights)
        held = {name: getattr(weights, name) for name in TENSORS} | {"seed": encoded.seed}
        held |= {f"encoded.{n}": tensor for n, tensor in enumerate(encoded.tensors)}
        expanded: dict[str, list[int]] = {}
        for name, tensor in held.items():
            if tensor is None:
                continue
            once = _once(tensor.detach())
            if once.shape != tensor.shape:
                expanded[name] = list(tensor.shape)
            copied = once.cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"{i}.{name}"] = copied
        numbers = {name: getattr(encoded, name) for name in NUMBERS}
        sizes = {"encoded": len(encoded.tensors), "expanded": expanded, "lead": list(weights.lead)}
        described.append(numbers | sizes)
    header = {"layers": described, "tokens": list(tokens)}
    save_file(tensors, path, {"format": FORMAT, "attlas": json.dumps(header)})


def load(path: str | Path) -> Saved:
    """The weights and tokens of a file that `save` wrote, on the CPU.

    Raises:
        ValueError: the file is another one.
    """
    readers = {FORMAT: _layer, FIRST_FORMAT: _first_layer}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in readers:
            raise ValueError(
                f"path must be a file of {FORMAT!r}, got format {metadata.get('format')!r}; "
                "write one with attlas.huggingface.save"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header, read = json.loads(metadata["attlas"]), readers[metadata["format"]]
    layers = []
    for i, described in enumerate(header["layers"]):
        own = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
        layers.append(read(described, own))
    return Saved(layers, header["tokens"])


def _encoded(weights: attlas.AttentionWeights) -> Encoded:
    """The specification of the weights, with the dropout after them, as tensors and numbers."""
    spec = without_objects(weights.spec, weights.device)
    return encode(replace(spec, dropout=weights.dropout), weights.impl)


def _once(tensor: Tensor) -> Tensor:
    """The tensor with what is the same along a dimension kept once."""
    for dim in range(tensor.ndim):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _layer(described: dict[str, Any], tensors: dict[str, Tensor]) -> attlas.AttentionWeights:
    """The weights of one layer."""
    for name, shape in described["expanded"].items():
        tensors[name] = tensors[name].expand(shape)
    encoded = Encoded(
        [tensors[f"encoded.{n}"] for n in range(described["encoded"])],
        **{name: described[name] for name in NUMBERS},
        impl="",
        seed=tensors.get("seed"),
    )
    return _weights(encoded, described["lead"], tensors)


def _weights(
    encoded: Encoded, lead: Sequence[int], tensors: dict[str, Tensor]
) -> attlas.AttentionWeights:
    """Weights that the implementation computes which "auto" takes on this machine."""
    impl = attlas.attention(*[torch.zeros(1, 1, device="cpu")] * 3).weights.impl
    own: dict[str, Any] = {name: tensors.get(name) for name in TENSORS}
    spec = decode(encoded, own["query"], own["key"])
    spec, dropout = replace(spec, dropout=None), spec.dropout
    return attlas.AttentionWeights(**own, spec=spec, impl=impl, lead=tuple(lead), dropout=dropout)


def _first_layer(described: dict[str, Any], tensors: dict[str, Tensor]) -> attlas.AttentionWeights:
    """The weights of one layer of the first format, which had intervals or a dense mask.

    Of the normaliser it kept the log-sum-exp alone, which is exact to its own rounding.
    """
    lse = tensors["lse"]
    tensors["normaliser"] = torch.stack([lse, torch.ones_like(lse)], dim=-1)
    masks: tuple[attlas.masks.Mask, ...] = ()
    if "start" in tensors:
        masks = (attlas.masks.Intervals(tensors["start"], tensors["stop"]),)
    elif "allowed" in tensors:
        masks = (attlas.masks.from_tensor(tensors["allowed"]),)
    encoded = Encoded([], [0, 0], described["scale"], described["softcap"], "")
    weights = _weights(encoded, described["lead"], tensors)
    options = {"alignment": described["alignment"], "masks": masks}
    return replace(weights, spec=replace(weights.spec, **options))
