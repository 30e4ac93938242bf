"""Is a result right? Sampled rows against float64, computed here in a few plain lines.

    m_j = 1 + Σ_e |scale q_e k_je|        what a score is summed from: its rounding is eps m_j
    unit(output[d]) = eps Σ_j p_j m_j |v_jd|,  unit(weights) = eps max_j p_j m_j,
    unit(logsumexp) = eps (|lse| + Σ_j p_j m_j)

An error is given in units: one rounding of the dtype, of all the numbers that were summed. Beside
it stands the error of the same row in plain PyTorch of the same dtype, the largest in some orders
of its sums: one order alone may be lucky.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .attention import attention
from .blocks import Block, Shape
from .matrix import LazyMatrix
from .spec import ScoreSpec, accumulate_dtype, finite
from .weights import AttentionWeights

ORDERS = range(1, 5)  # of the sums of plain PyTorch, each a permutation of what is summed


@dataclass(frozen=True)
class Error:
    """The largest error of one result over the rows that were looked at."""

    units: float  # roundings of the dtype
    plain: float  # the same of plain PyTorch in the same dtype
    absolute: float
    at: tuple[int, ...]  # the row of the largest error, in units: (batch, head, query)

    @property
    def passed(self) -> bool:
        """True for at most twice the error of plain PyTorch, and one rounding."""
        return self.units <= 2 * self.plain + 1


@dataclass(frozen=True)
class Verification:
    """What `verify` found; print it."""

    errors: dict[str, Error]  # "output", "logsumexp", "weights": those that were given
    rows: int
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """True when each result is as exact as plain PyTorch in the same dtype."""
        return all(error.passed for error in self.errors.values())

    def __str__(self) -> str:
        lines = [f"{self.rows} rows against float64, errors in roundings of {self.dtype}:"]
        for name, e in self.errors.items():
            verdict = "passed" if e.passed else "FAILED"
            lines.append(
                f"  {name:<10} {e.units:9.3g}  (plain PyTorch {e.plain:.3g})  "
                f"absolute {e.absolute:.2g} at {e.at}  {verdict}"
            )
        return "\n".join(lines)


def verify(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    *,
    output: Tensor | None = None,
    logsumexp: Tensor | None = None,
    weights: Tensor | LazyMatrix | None = None,
    rows: int = 64,
    seed: int = 0,
    **options: Any,
) -> Verification:
    """Compares an attention result, ours or any other's, with float64 on sampled rows.

    The first and the last row of the first and last head, and random ones, are computed in
    float64 from their definition: O(S) memory for each, one at a time. Ours is checked where no
    result is given; `attention` runs once in any case, for its checks.

    Args:
        query, key, value, mask: as in `attention`.
        output: `[..., L, Ev]`, a result of some other implementation.
        logsumexp: `[..., L]`, natural log, sinks included, -inf on an empty row.
        weights: `[..., L, S]`, dense or lazy.
        rows: how many rows (of one head of one batch item) to look at, at most.
        seed: which rows are sampled.
        **options: those of `attention`; `impl` says which of ours to check.

    Returns:
        A `Verification`: `passed`, and for each result the largest error in units of the dtype
        beside that of plain PyTorch on the same rows. It passes with at most twice that error,
        and one rounding.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`, or a result does not fit.

    Example:
        >>> import torch, attlas
        >>> q, k, v = torch.randn(3, 1, 8, 300, 64).unbind()
        >>> attlas.verify(q, k, v, is_causal=True).passed
        True
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> attlas.verify(q, k, v, output=theirs, is_causal=True).passed
        True
        >>> attlas.verify(q, k, v, output=theirs).passed  # without is_causal: another thing
        False

    References:
        Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1: the error of
        a sum of products is bounded in units of the sum of their magnitudes.
    """
    checks.whole_number("rows", rows, least=1)
    checks.whole_number("seed", seed, least=0)
    lead = query.shape[:-2] if isinstance(query, Tensor) else ()
    with torch.no_grad():
        ours = attention(query, key, value, mask, **options)
        given: dict[str, Any] = {"output": output, "logsumexp": logsumexp, "weights": weights}
        results = {name: result for name, result in given.items() if result is not None}
        results = results or {
            "output": ours.output,
            "logsumexp": ours.weights.logsumexp,
            "weights": ours.weights,
        }
        tails = {"output": value.shape[-1:], "logsumexp": (), "weights": key.shape[-2:-1]}
        for name, result in results.items():
            _check(name, result, (*query.shape[:-1], *tails[name]), query)
        places = _places(ours.weights.spec.shape, rows, seed)
        found = [_errors(ours.weights, value, results, at, len(lead)) for at in places]
    nothing = Error(0.0, 0.0, 0.0, ())
    errors = {}
    for name in results:
        each = [row[name] for row in found]
        worst = max(each, key=lambda error: error.units, default=nothing)
        plain = max((error.plain for error in each), default=0.0)
        errors[name] = replace(worst, plain=plain)
    return Verification(errors, len(places), query.dtype)


def _check(name: str, result: Any, shape: tuple[int, ...], query: Tensor) -> None:
    """Checks a result that was given."""
    mend = f"pass the {name} of the same query, key and value"
    if not isinstance(result, Tensor) and not (
        name == "weights" and isinstance(result, LazyMatrix)
    ):
        checks.fail(TypeError, name, "be a tensor", type(result).__name__, mend)
    if tuple(result.shape) != shape:
        checks.fail(ValueError, name, f"have the shape {list(shape)}", list(result.shape), mend)
    if result.device != query.device:
        checks.fail(ValueError, name, f"be on the device {query.device}", result.device, mend)


def _places(shape: Shape, rows: int, seed: int) -> list[tuple[int, int, int]]:
    """The rows to look at, (batch, head, query): the first, the last, and random ones."""
    if 0 in (shape.batch, shape.heads, shape.queries):
        return []
    last = (shape.batch - 1, shape.heads - 1, shape.queries - 1)
    generator = torch.Generator("cpu").manual_seed(seed)
    columns = [
        torch.randint(n + 1, (rows,), generator=generator, device="cpu").tolist() for n in last
    ]
    return list(dict.fromkeys([(0, 0, 0), last, *zip(*columns, strict=True)]))[:rows]


def _errors(
    weights: AttentionWeights,
    value: Tensor,
    results: dict[str, Any],
    at: tuple[int, int, int],
    ndim: int,
) -> dict[str, Error]:
    """The errors of one row."""
    spec, (b, h, i) = weights.spec, at
    shape, group, narrow = spec.shape, spec.shape.group, weights.dtype
    wide = accumulate_dtype(narrow)
    allowed = torch.ones(shape.keys, dtype=torch.bool, device=value.device)
    one_row = [slice(n, n + 1) for n in at]
    whole_row = Block(shape, one_row[0], one_row[1], one_row[2], slice(0, shape.keys))
    for mask in spec.masks:
        one = mask.block(whole_row, value.device)
        allowed &= one.expand(1, 1, 1, shape.keys).flatten()
    bias, sinks, factor = weights.bias, weights.sinks, torch.ones_like(allowed, dtype=wide)
    if weights.dropout is not None:
        keep = weights.dropout.keep(whole_row).flatten()
        factor = weights.dropout.apply(factor, keep)
    if bias is not None:
        bias = bias.expand(*shape[:2], *shape[3:])[b, h, i]
    row = _Row(
        spec,
        weights.query[b, h, i],
        weights.key[b, h // group],
        value.reshape(shape.batch, shape.kv_heads, *value.shape[-2:])[b, h // group],
        bias,
        None if sinks is None else sinks[h],
        allowed,
        factor,
    )
    exact, sizes = row.compute(torch.float64)
    plain = [row.compute(narrow, order)[0] for order in ORDERS]
    for again, order in zip(plain, ORDERS, strict=True):
        again["logsumexp"] = row.compute(wide, order)[0]["logsumexp"]
    index = (*at[:ndim], i)
    errors = {}
    for name, result in results.items():
        info = torch.finfo(wide if name == "logsumexp" else narrow)
        unit = info.eps * (sizes[name] + info.smallest_normal)
        units, absolute = _distance(result[index], exact[name], unit)
        others = max(_distance(again[name], exact[name], unit)[0] for again in plain)
        errors[name] = Error(units, others, absolute, at)
    return errors


class _Row(NamedTuple):
    """What one row is computed from: `[E]`, `[S, E]`, `[S, Ev]`, `[S]`, a number, `[S]`, `[S]`."""

    spec: ScoreSpec
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    sink: Tensor | None
    allowed: Tensor
    factor: Tensor  # of the weights, by dropout

    def compute(
        self, dtype: torch.dtype, order: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The results of the row, and their units less eps; `order` is a number of one of sums."""
        keep = self.allowed.nonzero().squeeze(-1)  # what is masked is not even read
        generator = torch.Generator("cpu").manual_seed(order)
        along, keys = (
            torch.randperm(n, generator=generator, device="cpu") if order else torch.arange(n)
            for n in (len(self.query), len(keep))
        )
        keep, along = keep[keys.to(keep.device)], along.to(keep.device)
        query, key, value = (t.to(dtype) for t in (self.query, self.key[keep], self.value[keep]))
        query, key = query[along], key[:, along]
        scores = key @ query * self.spec.scale
        if self.spec.softcap is not None:
            scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
        if self.bias is not None:
            scores = scores + self.bias[keep].to(dtype)
        some = torch.zeros_like(scores)
        lse = scores.new_tensor(-math.inf)
        if bool((scores != -math.inf).any()):  # else an empty row
            sink = [] if self.sink is None else [self.sink.to(dtype)[None]]
            logits = torch.cat([scores, *sink])
            some, lse = logits.softmax(-1)[: len(keep)], logits.logsumexp(-1)
        weights = scores.new_zeros(len(self.allowed)).index_copy(0, keep, some)
        used = some * self.factor[keep].to(dtype)
        read = value.masked_fill((used == 0)[:, None], 0.0)  # nor what has no weight
        size = some * (1 + (key.abs() @ query.abs()) * abs(self.spec.scale))
        sizes = {
            "output": (size * self.factor[keep].to(dtype)) @ read.abs(),
            "logsumexp": finite(lse).abs() + size.sum(),
            "weights": size.amax() if len(keep) else size.sum(),
        }
        return {"output": used @ read, "logsumexp": lse, "weights": weights}, sizes


def _distance(found: Tensor, exact: Tensor, unit: Tensor) -> tuple[float, float]:
    """The largest difference in units, and in itself; equal infinities and NaN differ by 0."""
    found, exact = found.double(), exact.double()
    if not found.numel():
        return 0.0, 0.0
    same = (found == exact) | (found.isnan() & exact.isnan())
    distance = (found - exact).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf)
    return (distance / unit).max().item(), distance.max().item()
