"""Dense weights that were not asked for by name: a warning, once for each method, where large.

Code that was written for dense weights runs on lazy ones, and most methods of a tensor are those of
`to_dense()`. Its author is told so where that is likely to matter, and which readout does without.
"""

from __future__ import annotations

import sys
import warnings
from typing import Protocol

import torch
from torch import Tensor

from .spec import is_traced

# Bytes of dense weights from which a warning is worth its line: 16 heads over 2000 tokens in
# float32. Short texts and small models stay silent; above, a few layers fill a laptop's memory.
WARN_FROM = 256_000_000

# What is read without dense weights, in place of methods and functions of torch by their names.
READOUTS = {
    "weights.map_rows(fn), a few rows at a time": (
        "amin aminmax argsort cumprod cumsum exp log_softmax logsumexp median min mode msort norm "
        "pow prod softmax sort sqrt square std std_mean var var_mean vector_norm"
    ),
    "weights.entropy(), or weights.map_rows(fn)": "log log2 xlogy special_xlogy special_entr",
    "weights.guided(penalty), or weights[...], which reads a part": "mul multiply rmul",
    "weights.quantile(share), or weights.map_rows(fn)": "eq ge greater gt le less lt ne nonzero",
    "weights @ x, or weights.T @ x": "addmm baddbmm bmm einsum inner mm mv rmatmul tensordot",
    "weights.pool(cell, how)": (
        "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d interpolate max_pool2d"
    ),
    "weights.kl_divergence(other)": "kl_div",
    "weights.cross_entropy(target)": "binary_cross_entropy cross_entropy nll_loss",
    "weights.singular_values(k)": "linalg_svd linalg_svdvals svd",
}
PART = "weights[...], which reads a part"

_said: set[str] = set()


class Lazy(Protocol):
    """Weights that can be made dense."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def to_dense(self) -> Tensor: ...


def dense(weights: Lazy, name: str) -> Tensor:
    """The dense weights that a method, operator or function of this name computes with."""
    name = name.strip("_")
    if is_traced() or name in _said:  # a graph may not know the size
        return weights.to_dense()
    size = weights.shape.numel() * weights.dtype.itemsize
    if size >= WARN_FROM:
        readout = next((r for r, names in READOUTS.items() if name in names.split()), PART)
        warnings.warn(
            f"{name!r} makes lazy weights of shape {list(weights.shape)} dense, {of_bytes(size)}; "
            f"take {readout}, or to_dense() where you want them all (said once for {name!r})",
            UserWarning,
            stacklevel=_level_of_the_caller(),
        )
        _said.add(name)  # not where the warning was made an error, which is then one each time
    return weights.to_dense()


def of_bytes(size: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _level_of_the_caller() -> int:
    """The stacklevel, for the function above, of the first code outside of attlas and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _package(frame.f_globals) in ("attlas", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
