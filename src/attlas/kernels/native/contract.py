"""What the library may be given: sizes, dtypes and strides are settled here, before each call.

The C++ trusts its structs, so an address comes into one by `Call.read` or `Call.write` only, and
both ask `LAYOUT` what attlas.h reads or writes there. What a field `name_s` takes strides for
may lie anywhere (of three strides, the last dimension has stride 1); the rest is contiguous.
"""

from __future__ import annotations

from ctypes import Structure

import torch
from torch import Tensor

from ... import checks
from ...spec import accumulate_dtype
from . import library

# The dtype behind each pointer, and its axes. "data" is the dtype of query, "sums" that of sums.
# rows, keys: of the tile that is read, else all; bands, cells: of the rows and keys of a pool.
LAYOUT = {
    "q": "data B Hq L E",
    "k": "data B Hkv S E",
    "v": "data B Hkv S Ev",
    "start": "int64 B Hq L",
    "stop": "int64 B Hq L",
    "mask": "bool B Hq L S",
    "bias": "sums B Hq L S",
    "sinks": "sums Hq",
    "lse": "sums B Hq L",
    "output": "data B Hq L Ev",
    "weights": "data B Hq rows keys",
    "entropy": "sums B Hq rows",
    "max_value": "sums B Hq rows",
    "max_key": "int64 B Hq rows",
    "topk_value": "sums B Hq rows k",
    "topk_key": "int64 B Hq rows k",
    "received": "sums B Hq keys",
    "received_max": "sums B Hq keys",
    "row_weight": "sums B Hq rows",
    "x": "sums B Hq keys F",
    "wx": "sums B Hq rows F",
    "y": "sums B Hq rows F",
    "wty": "sums B Hq keys F",
    "pool_max": "sums B Hq bands cells",
    "pool_mass": "sums B Hq bands cells",
    "d_output": "data B Hq L Ev",
    "d_lse": "sums B Hq L",
    "d_entropy": "sums B Hq L",
    "d_received": "sums B Hq S",
    "d_weights": "data B Hq L S",
    "dq": "data B Hq L E",
    "dk": "data B Hkv S E",
    "dv": "data B Hkv S Ev",
    "dbias": "sums B Hq L S",
    "dsinks": "sums B Hq L",
}
_AXES = {name: tuple(line.split()) for name, line in LAYOUT.items()}
PADDING = 1 << 12  # more than any size is rounded up to, and any count of partial sums


def sizes(problem: library.Problem, readout: library.Readout | None = None) -> dict[str, int]:
    """The size of each axis, after a check that nothing computed from them overflows."""
    found = {name: getattr(problem, name) for name in ("B", "Hq", "Hkv", "L", "S", "E", "Ev")}
    found |= {"rows": problem.L, "keys": problem.S, "F": 0, "k": 1}
    if readout is not None:
        rows, keys = (readout.row0, readout.row1), (readout.key0, readout.key1)
        assert 0 <= rows[0] <= rows[1] <= problem.L, f"rows {rows} of {problem.L}"
        assert 0 <= keys[0] <= keys[1] <= problem.S, f"keys {keys} of {problem.S}"
        cell = readout.cell_rows, readout.cell_keys
        assert min(readout.k, *cell) >= 1, f"top-k {readout.k}, cells {cell}"
        found |= {"rows": rows[1] - rows[0], "keys": keys[1] - keys[0]}
        found |= {"F": readout.F, "k": readout.k}
        found |= {"bands": -(-found["rows"] // cell[0]), "cells": -(-found["keys"] // cell[1])}
    elements = found["B"] * found["Hq"] * (found["L"] + found["S"] + PADDING)
    if elements * (found["E"] + found["Ev"] + found["F"] + found["k"] + PADDING) >= 1 << 58:
        raise MemoryError(library.NO_MEMORY)  # its bytes, at most 16 for each, may pass 2^62
    return found


def layout(name: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[list[int], torch.dtype]:
    """The shape and the dtype of what lies behind a pointer, for query of `dtype`."""
    kind, *axes = _AXES[name]
    kinds = {"data": dtype, "sums": accumulate_dtype(dtype)}
    return [sizes[axis] for axis in axes], kinds.get(kind) or getattr(torch, kind)


def lay(
    struct: Structure, name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The tensor as the library can read it: on the CPU, in a shape, a dtype, with its strides."""
    if tensor.is_cpu and not tensor.data_ptr() and tensor.numel():
        mend = "it was freed, or is a fake one: give a tensor that holds data"
        checks.fail(ValueError, name, "lie in memory", f"a {type(tensor).__name__} of none", mend)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != dtype or not tensor.is_cpu:
        tensor = tensor.to("cpu", dtype)
    if tensor.is_neg() or tensor.data_ptr() % tensor.itemsize:
        tensor = tensor.clone()
    if list(tensor.shape) != shape:
        tensor = tensor.expand(shape)
    strides = len(getattr(struct, name + "_s", ()))
    if not strides or (strides < len(shape) and shape[-1] > 1 and tensor.stride(-1) != 1):
        tensor = tensor.contiguous()
    return tensor
