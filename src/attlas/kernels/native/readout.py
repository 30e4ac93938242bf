"""Statistics of the weights by the library, from query, key and the normaliser.

Those that it knows are computed in one pass of C++; `read` gives None for the others, which
`attlas.streaming` computes from the blocks of `NativeBlockWeights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks, statistics
from ...block_weights import BlockWeights
from ...masks import Bounds
from ...spec import ScoreSpec, log_weights, normaliser_gradient
from . import library
from .call import Call, Part, parts

MOST = 64  # the largest k of a top-k that is kept in registers and the L1 cache


def read(
    statistic: statistics.Statistic, spec: ScoreSpec, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """The results of a statistic, or None where it is one that PyTorch streams."""
    query, key, bias, normaliser, *operands = tensors
    assert query is not None
    assert key is not None
    assert normaliser is not None
    names = _names(statistic)
    if isinstance(statistic, statistics.Dense) and statistic.dtype != query.dtype:
        names = ("tile_weights",) if names else ()  # not those that are rounded already
    part = next(parts(spec)) if names and not spec.shape.empty else None
    if part is None or not part.full:
        return None
    args, operand = _arguments(statistic, spec), operands[0] if operands else None
    call = Call(spec, part, query, key, None, bias, None, args)
    call.read(args, "normaliser", normaliser)
    match statistic:
        case statistics.Mass() if operand is not None:
            call.read(args, "x", operand.unsqueeze(-1))
        case statistics.TransposedProduct() if operand is not None:
            call.read(args, "y", operand)
        case statistics.Received() if operand is not None:
            full = operand.expand(*operand.shape[:-1], spec.shape.queries)
            call.read(args, "row_weight", full[..., args.row0 : args.row1])
    results = [call.write(args, name) for name in names]
    call.run("read", args)
    match statistic:
        case statistics.Mass():
            return (results[0].squeeze(-1),)
        case statistics.Dense(dtype=dtype):
            return (results[0].to(dtype),)
        case statistics.OverHeads(of=statistics.Dense(dtype=dtype)):
            return (results[0].unsqueeze(1).to(dtype),)
    return tuple(results)


class NativeBlockWeights(BlockWeights):
    """The weights of one block by the library: the same bits wherever a block begins or ends."""

    takes_bounds = True

    def __init__(
        self,
        spec: ScoreSpec,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        allowed: Tensor | Bounds | None,
        normaliser: Tensor,
    ) -> None:
        self.device, self._spec, self._normaliser = query.device, spec, normaliser
        rows = slice(0, query.shape[2])
        if isinstance(allowed, Bounds):
            self._part = Part(rows, True, allowed.start, allowed.stop)
        else:
            self._part = Part(rows, True, mask=allowed)
        self._tensors = query, key, bias

    def like(self, *slices: Any) -> NativeBlockWeights:
        return NativeBlockWeights(*slices)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        return self._read("weights")[0] if self._weights is None else self._weights.to(dtype)

    def _compute_weights(self) -> Tensor:
        return self._read("tile_weights")[0]

    def _compute_log_weights(self) -> Tensor:
        if self._weights is None:  # who looks at the logarithms will look at the weights, too
            self._weights, scores = self._read("tile_weights", "tile_scores")
        else:
            (scores,) = self._read("tile_scores")
        return log_weights(scores, self._normaliser)

    def _read(self, *names: str) -> list[Tensor]:
        query, key, bias = self._tensors
        return read_tile(self._spec, self._part, query, key, bias, self._normaliser, names)


def read_tile(
    spec: ScoreSpec,
    part: Part,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
    names: Sequence[str],
) -> list[Tensor]:
    """Results of the matrix of all these queries and keys, masked as `part` says, by name."""
    args = library.Readout(row1=query.shape[2], key1=key.shape[2], k=1, cell_rows=1, cell_keys=1)
    call = Call(spec, part, query, key, None, bias, None, args)
    call.read(args, "normaliser", normaliser)
    results = [call.write(args, name) for name in names]
    if 0 not in (*query.shape[:3], key.shape[2]):
        call.run("read", args)
    return results


def _arguments(statistic: statistics.Statistic, spec: ScoreSpec) -> library.Readout:
    """The tile and the sizes of a readout."""
    _, _, _, queries, keys = spec.shape
    args = library.Readout(row1=queries, key1=keys, k=1, cell_rows=1, cell_keys=1)
    rows = statistic.queries
    if rows is not None:
        if not 0 <= rows.start <= rows.stop <= queries:
            rule, mend = f"lie within the {queries} queries", "cut them to that range"
            checks.fail(ValueError, "queries", rule, rows, mend)
        args.row0, args.row1 = rows.start, rows.stop
    match statistic:
        case statistics.Max():  # a TopK, of one
            pass
        case statistics.TopK():
            args.k = statistic.k
        case statistics.Mass():
            args.F = 1
        case statistics.TransposedProduct():
            args.F = statistic.operands[0].shape[-1]
        case statistics.Pool(cell=(cell_rows, cell_keys)):
            args.cell_rows, args.cell_keys = min(cell_rows, queries), min(cell_keys, keys)
    return args


def read_backward(
    statistic: statistics.Statistic,
    spec: ScoreSpec,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """The gradients of query, key, bias, normaliser and operands; None where PyTorch streams.

    The normaliser is a variable of its own: dS = P dP, and of its log-sum-exp -rowsum(P dP).
    """
    query, key, bias, normaliser, *operands = tensors
    grad, given = grads[0], operands[0] if operands else None
    assert query is not None
    assert key is not None
    assert normaliser is not None
    if (
        grad is None
        or spec.shape.empty
        or wanted[2]  # a bias asks for dS itself, which is streamed
        or not _differentiates(statistic, spec, query.dtype == normaliser.dtype, any(wanted[4:]))
    ):
        return None
    grad, total, u, v = grad.to(normaliser.dtype), [], None, None
    if given is not None:  # dP = u v^T, as if u were the gradient of an output and v the value
        match statistic:
            case statistics.Mass():
                u, v = grad.unsqueeze(-1), given.unsqueeze(-1)
            case statistics.TransposedProduct():
                u, v = given, grad
    for part in parts(spec):
        call, args = Call(spec, part, query, key, v, bias, None), library.Backward()
        call.read(args, "normaliser", part.cut(normaliser))
        if u is not None:
            call.read(args, "d_output", part.cut(u))
        elif isinstance(statistic, statistics.Entropy):
            call.read(args, "d_entropy", part.cut(grad))
        else:
            call.read(args, "d_received", grad)
            if given is not None:
                call.read(args, "row_weight", part.cut(given))
        found = [call.write(args, name) for name in ("dq", "dk", "minus_rowsum")]
        call.run("backward", args)
        if part.full:
            total = found
            break
        if not total:
            sums = torch.zeros_like(key, dtype=normaliser.dtype)
            total = [torch.zeros_like(query), sums, torch.zeros_like(normaliser[..., 0])]
        part.cut(total[0]).copy_(found[0])
        total[1].add_(found[1])
        part.cut(total[2]).copy_(found[2])
    of_operands: list[Tensor | None] = [None] * len(operands)
    if given is not None and wanted[4]:  # P grad
        product = u is not None
        read = grad if product else grad.unsqueeze(-1)
        read = _product(spec, query, key, bias, normaliser, read)
        of_operands[0] = (read if product else read.squeeze(-1)).sum_to_size(given.shape)
    of_normaliser = normaliser_gradient(total[2], normaliser)
    return [total[0], total[1].to(key.dtype), None, of_normaliser, *of_operands]


def _differentiates(
    statistic: statistics.Statistic, spec: ScoreSpec, full: bool, operands: bool
) -> bool:
    """Whether the C++ differentiates a statistic.

    Args:
        full: the inputs have the dtype of sums.
        operands: gradients of the operands are wanted.
    """
    if not _names(statistic):
        return False
    match statistic:
        case statistics.Entropy():
            return True
        case statistics.Mass(operands=(x,)):  # a value has the heads of the keys
            return full and not operands and x.shape[1] == 1
        case statistics.TransposedProduct():
            return full and spec.shape.group == 1
        case statistics.ReceivedMax():
            return False
        case statistics.Received(queries=rows):
            return rows in (None, slice(0, spec.shape.queries))
    return False


def _product(
    spec: ScoreSpec, query: Tensor, key: Tensor, bias: Tensor | None, normaliser: Tensor, x: Tensor
) -> Tensor:
    """weights @ x, `[B, H, L, F]`, for x `[B, H, S, F]` in the dtype of statistics."""
    total = normaliser.new_empty(*normaliser.shape[:3], x.shape[-1])
    for part in parts(spec):
        rows = part.cut(normaliser)
        args = library.Readout(row1=rows.shape[2], key1=spec.shape.keys, F=x.shape[-1])
        args.k = args.cell_rows = args.cell_keys = 1
        call = Call(spec, part, query, key, None, bias, None, args)
        call.read(args, "normaliser", rows)
        call.read(args, "x", x)
        result = call.write(args, "wx")
        call.run("read", args)
        if part.full:
            return result
        part.cut(total).copy_(result)
    return total


def _names(statistic: statistics.Statistic) -> tuple[str, ...]:
    """What the C++ readout calls the results of a statistic; none where it has no such thing."""
    kinds: dict[type, tuple[str, ...]] = {
        statistics.Entropy: ("entropy",),
        statistics.Max: ("max_value", "max_key"),
        statistics.Mass: ("wx",),
        statistics.TransposedProduct: ("wty",),
        statistics.Received: ("received",),
        statistics.Dense: ("weights",),
    }
    if not type(statistic).__module__.startswith(statistics.__name__):
        return ()  # a user's subclass may mean something else
    match statistic:
        case statistics.OverHeads(of=statistics.Dense()):
            return ("head_mean",)
        case statistics.Pool(how="max"):
            return ("pool_max",)
        case statistics.Pool(how="mass"):
            return ("pool_mass",)
        case statistics.ReceivedMax(operands=()):
            return ("received_max",)
        case statistics.TopK(k=k) if type(statistic) is statistics.TopK and 1 <= k <= MOST:
            return ("topk_value", "topk_key")
    return kinds.get(type(statistic), ())
