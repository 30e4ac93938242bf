"""One call of the library: a score specification and its tensors as the C struct.

A mask reaches the library as one key interval for each query and, where intervals do not say
it all, a dense mask. One that would have to be made dense is evaluated for a few rows at a time:
each `Part` is a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure
from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks import even, split, whole
from ...masks import Dense
from ...spec import ScoreSpec, accumulate_dtype
from . import library

MASK_ELEMENTS = 1 << 24  # elements of a dense mask, or of a dense bias gradient, at a time


class Part(NamedTuple):
    """Some rows of a call, with its mask as intervals and, where they do not do, a tensor."""

    rows: slice
    full: bool
    start: Tensor | None = None  # int64 [B or 1, H or 1, L or 1]
    stop: Tensor | None = None
    mask: Tensor | None = None  # bool [B or 1, H or 1, rows or 1, S or 1]

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [B, H, L, ...]; size 1 broadcasts."""
        whole_rows = self.full or tensor.shape[2] == 1
        return tensor if whole_rows else tensor[:, :, self.rows]


def parts(spec: ScoreSpec, dense_bias: bool = False) -> Iterator[Part]:
    """The call in one part, or in parts of a few rows where something dense must be made."""
    shape, every = spec.shape, slice(0, spec.shape.queries)
    rows = max(MASK_ELEMENTS // max(shape.batch * shape.heads * shape.keys, 1), 1)
    size = rows if dense_bias else max(shape.queries, 1)
    bound = spec.bind()
    if bound is None:
        for piece in _pieces(every, size):
            yield Part(piece, piece == every)
        return
    loose = [] if bound.bounds.exact else [m for m in spec.masks if not m.bounds(shape).exact]
    given = loose[0].tensor if len(loose) == 1 and isinstance(loose[0], Dense) else None
    evaluated = bool(loose) and given is None
    for piece in _pieces(every, min(size, rows) if evaluated else size):
        part = Part(piece, piece == every)
        mask = None if given is None else part.cut(given)
        if evaluated:
            mask = bound.mask.block(whole(shape)._replace(queries=piece), torch.device("cpu"))
        start, stop = part.cut(bound.bounds.start), part.cut(bound.bounds.stop)
        yield part._replace(start=start, stop=stop, mask=mask)


def _pieces(every: slice, size: int) -> Iterator[slice]:
    yield from split(every, even(every.stop, size)) if every.stop else (every,)


class Call:
    """The problem of one call, and the tensors that must outlive it."""

    def __init__(
        self,
        spec: ScoreSpec,
        part: Part,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        query = part.cut(query)
        self.sizes = (query.shape[0], query.shape[1], query.shape[2])
        self.keep: list[Tensor] = []
        self.problem = problem = library.Problem()
        problem.B, problem.Hq, problem.L, problem.E = query.shape
        problem.Hkv, problem.S = key.shape[1:3]
        problem.Ev = 0 if value is None else value.shape[-1]
        problem.dtype = library.DTYPES[query.dtype]
        problem.num_threads = torch.get_num_threads()
        problem.parallel_for = library.parallel_for()
        problem.scale, problem.softcap = spec.scale, spec.softcap or 0.0
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            if tensor is not None:
                self.read(problem, name, unit(tensor), 3)
        full = (*self.sizes, spec.shape.keys)
        for name, bound in (("start", part.start), ("stop", part.stop)):
            if bound is not None:
                self.read(problem, name, bound.expand(self.sizes), 3)
        if part.mask is not None:
            self.read(problem, "mask", part.mask.view(torch.uint8).expand(full), 4)
        dtype = accumulate_dtype(query.dtype)
        if bias is not None:
            self.read(problem, "bias", part.cut(bias.detach()).to(dtype).expand(full), 4)
        if sinks is not None:
            self.read(problem, "sinks", sinks.detach().to(dtype).contiguous())

    def read(self, struct: Structure, name: str, tensor: Tensor, strides: int = 0) -> None:
        """Gives a tensor to the call."""
        self.keep.append(tensor)
        library.fill(struct, name, tensor, strides)

    def write(
        self,
        struct: Structure,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: int = 0,
    ) -> Tensor:
        """A fresh tensor for the call to write into."""
        tensor = library.buffer(tuple(shape), dtype)
        library.fill(struct, name, tensor, strides)
        return tensor

    def run(self, name: str, struct: Structure) -> None:
        """Makes the call."""
        library.call(name, self.problem, struct)


def unit(tensor: Tensor) -> Tensor:
    """The tensor, or a copy without a graph, with a last dimension of stride 1."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.detach().contiguous()
