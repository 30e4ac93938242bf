"""What the library may be given: sizes, dtypes and strides are settled here, before each call.

The C++ trusts its structs, so an address comes into one by `Call.read` or `Call.write` only, and
both ask `LAYOUT` what attlas.h reads or writes there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor

from ... import checks
from ...spec import accumulate_dtype
from . import library

# The dtype behind each pointer, and its axes: those before a | have any strides, given in a field
# `name_s`, those after it are contiguous. "data" is the dtype of query, "sums" that of sums. rows
# and keys are those of the tile that is read, else all; bands and cells those of a pool.
LAYOUT = {
    "q": "data B Hq L | E",
    "k": "data B Hkv S | E",
    "v": "data B Hkv S | Ev",
    "start": "int64 B Hq L |",
    "stop": "int64 B Hq L |",
    "mask": "bool B Hq L S |",
    "bias": "sums B Hq L S |",
    "sinks": "sums Hq",
    "normaliser": "sums B Hq L pair",
    "output": "data B Hq L | Ev",
    "weights": "data B Hq rows | keys",
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
    "tile_weights": "sums B Hq rows keys",
    "tile_scores": "sums B Hq rows keys",
    "head_mean": "sums B rows keys",
    "d_output": "data B Hq L | Ev",
    "d_lse": "sums B Hq L",
    "d_entropy": "sums B Hq L",
    "d_received": "sums B Hq S",
    "d_weights": "data B Hq L | S",
    "dq": "data B Hq L E",
    "dk": "data B Hkv S E",
    "dv": "data B Hkv S Ev",
    "dbias": "sums B Hq L S",
    "dsinks": "sums B Hq L",
    "minus_rowsum": "sums B Hq L",
}
READ = ("row0", "row1", "key0", "key1", "k", "cell_rows", "cell_keys", "F")  # of a readout
PADDING = 1 << 12  # more than any size is rounded up to, and any count of partial sums

Place = tuple[tuple[int, ...], torch.dtype, int]  # a shape, a dtype, and how many strides


def _parse(line: str) -> tuple[str, Callable[[dict[str, int]], tuple[int, ...]], int]:
    """The dtype, the function from sizes to a shape, and the number of strides."""
    kind, *axes = line.split()
    strides = axes.index("|") if "|" in axes else 0
    axes = [axis for axis in axes if axis != "|"]
    if len(axes) == 1:
        return kind, lambda sizes: (sizes[axes[0]],), strides
    return kind, itemgetter(*axes), strides


_BEHIND = {name: _parse(line) for name, line in LAYOUT.items()}
_KINDS = {"int64": torch.int64, "bool": torch.bool}


class Plan:
    """The sizes of a call, the problem that they make, and what lies behind each pointer."""

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        axes = {name: sizes[name] for name in ("B", "Hq", "Hkv", "L", "S", "E", "Ev")}
        self._problem = library.Problem(
            **axes, dtype=library.DTYPES[dtype], parallel_for=library.parallel_for()
        )
        self._places: dict[str, Place] = {}

    def problem(self) -> library.Problem:
        """A problem of these sizes, without addresses."""
        return library.Problem.from_buffer_copy(self._problem)

    def place(self, name: str) -> Place:
        """What lies behind a pointer."""
        found = self._places.get(name)
        if found is None:
            kind, shape, strides = _BEHIND[name]
            sums = accumulate_dtype(self.dtype)
            dtype = {"data": self.dtype, "sums": sums, **_KINDS}[kind]
            found = self._places[name] = (shape(self.sizes), dtype, strides)
        return found


def plan(
    query: Tensor, key: Tensor, value: Tensor | None, readout: library.Readout | None = None
) -> Plan:
    """The plan of a call; calls of the same sizes have one."""
    value_size = 0 if value is None else value.shape[-1]
    tile = None if readout is None else tuple(getattr(readout, name) for name in READ)
    return _plan(query.shape, key.shape, value_size, query.dtype, tile)


@lru_cache(maxsize=512)
def _plan(
    query: torch.Size,
    key: torch.Size,
    value_size: int,
    dtype: torch.dtype,
    tile: tuple[int, ...] | None,
) -> Plan:
    batch, heads, queries, size = query
    kv_heads, keys = key[1:3]
    sizes = {"B": batch, "Hq": heads, "Hkv": kv_heads, "L": queries, "S": keys}
    sizes |= {"E": size, "Ev": value_size, "rows": queries, "keys": keys, "F": 0, "k": 1, "pair": 2}
    if tile is not None:
        sizes |= _tile(dict(zip(READ, tile, strict=True)), queries, keys)
    elements = batch * heads * (queries + keys + PADDING)
    if elements * (size + value_size + sizes["F"] + sizes["k"] + PADDING) >= 1 << 58:
        raise MemoryError(library.NO_MEMORY)  # its bytes, at most 16 for each, may pass 2^62
    return Plan(sizes, dtype)


def _tile(given: dict[str, int], queries: int, keys: int) -> dict[str, int]:
    """The sizes of what is read of the matrix, which must lie within it."""
    row0, row1, key0, key1, k, cell_rows, cell_keys, width = given.values()
    assert 0 <= row0 <= row1 <= queries, f"rows {row0} to {row1} of {queries}"
    assert 0 <= key0 <= key1 <= keys, f"keys {key0} to {key1} of {keys}"
    assert min(k, cell_rows, cell_keys) >= 1, f"top {k}, cells of {cell_rows} x {cell_keys}"
    rows, columns = row1 - row0, key1 - key0
    cells = {"bands": -(-rows // cell_rows), "cells": -(-columns // cell_keys)}
    return {"rows": rows, "keys": columns, "F": width, "k": k} | cells


def lay(name: str, tensor: Tensor, place: Place) -> Tensor:
    """The tensor as the library can read it there; mostly itself."""
    shape, dtype, strides = place
    address = tensor.data_ptr() if tensor.is_cpu else None
    if address == 0 and tensor.numel():
        mend = "it was freed, or is a fake one: give a tensor that holds data"
        checks.fail(ValueError, name, "lie in memory", f"a {type(tensor).__name__} of none", mend)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if address is None or tensor.dtype != dtype:
        tensor = tensor.to("cpu", dtype)
    elif tensor.is_neg() or address % dtype.itemsize:
        tensor = tensor.clone()
    if tensor.shape != shape:
        tensor = tensor.expand(shape)
    if not strides or (strides < len(shape) and shape[-1] > 1 and tensor.stride(-1) != 1):
        tensor = tensor.contiguous()
    return tensor
