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
from ...dropout import Dropout
from ...masks import Dense
from ...spec import ScoreSpec
from . import contract, library

MASK_ELEMENTS = 1 << 24  # elements of a dense mask, or of a dense bias gradient, at a time


class Part(NamedTuple):
    """Some rows of a call, with its mask as intervals and, where they do not do, a tensor."""

    rows: slice
    full: bool
    start: Tensor | None = None  # int64 [B or 1, H or 1, L or 1]
    stop: Tensor | None = None
    mask: Tensor | None = None  # bool [B or 1, H or 1, rows or 1, S or 1]

    def masks(self) -> tuple[tuple[str, Tensor | None], ...]:
        """The tensors of the mask, by their names in the C struct."""
        return ("start", self.start), ("stop", self.stop), ("mask", self.mask)

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [B, H, L, ...]; size 1 broadcasts."""
        whole_rows = self.full or tensor.shape[2] == 1
        return tensor if whole_rows else tensor[:, :, self.rows]


def parts(spec: ScoreSpec, dense_bias: bool = False) -> Iterator[Part]:
    """The call in one part, or in parts of a few rows where something dense must be made."""
    shape, every = spec.shape, slice(0, spec.shape.queries)
    if not spec.masks and not dense_bias:
        yield Part(every, True)
        return
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
        readout: library.Readout | None = None,
    ) -> None:
        query = part.cut(query)
        self.keep: list[Tensor] = []
        self.plan = contract.plan(query, key, value, readout)
        self.across = query.shape[1] > 1 and query.stride(1) < query.stride(2)  # [B, L, H, E]
        self.problem = problem = self.plan.problem()
        problem.num_threads = torch.get_num_threads()
        problem.scale, problem.softcap = spec.scale, spec.softcap or 0.0
        self.read(problem, "q", query)
        self.read(problem, "k", key)
        bias = None if bias is None else part.cut(bias)
        rest = {"v": value, "bias": bias, "sinks": sinks}
        for name, tensor in (*rest.items(), *part.masks()):
            if tensor is not None:
                self.read(problem, name, tensor)

    def read(self, struct: Structure, name: str, tensor: Tensor) -> None:
        """Gives a tensor to the call; it may have to be converted, copied or broadcast."""
        place = self.plan.place(name)
        tensor = contract.lay(name, tensor, place)
        self.keep.append(tensor)
        library.fill(struct, name, tensor, strides=place[2])

    def drop(self, dropout: Dropout | None, part: Part) -> None:
        """Asks for dropout of the weights that meet the values."""
        if dropout is not None:
            self.problem.dropout_p, self.problem.seed = dropout.p, int(dropout.seed)
            self.problem.first_row = part.rows.start

    def write(self, struct: Structure, name: str) -> Tensor:
        """A fresh tensor for the call to write into; output in the memory order of query."""
        shape, dtype, strides = self.plan.place(name)
        if name == "output" and self.across:
            batch, heads, rows, size = shape
            tensor = library.fresh(name, (batch, rows, heads, size), dtype).transpose(1, 2)
        else:
            tensor = library.fresh(name, shape, dtype)
        library.fill(struct, name, tensor, strides)
        return tensor

    def run(self, name: str, struct: Structure) -> None:
        """Makes the call."""
        library.call(name, self.problem, struct)
