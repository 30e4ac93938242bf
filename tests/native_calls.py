"""Direct calls of the compiled library, an oracle for all that it computes, and a priori bounds.

The library has results that no readout asks for together; here every field of attlas.h is used,
through the structs of `attlas.kernels.native`. The oracle is the reference in float64. Bounds are
first order error analysis: with γ_n = n·eps, a score of size M is off by γ_E·M, a weight by that
share of itself, and each sum of n terms adds γ_n. Half precision adds roundings of its results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attlas.blocks import Shape, whole
from attlas.kernels import reference
from attlas.kernels.native import library
from attlas.kernels.native.call import Call, parts
from attlas.spec import Inputs, ScoreSpec, accumulate_dtype, logsumexp

from .helpers import gap

FORWARD = ("output", "weights", "normaliser", "entropy", "max_value", "max_key", "received")
HOOKS = ("output", "lse", "entropy", "received", "weights")  # what the backward has gradients of
READS = ("entropy", "max_value", "max_key", "topk_value", "topk_key", "received", "received_max")
READS += ("wx", "wty", "pool_max", "pool_mass", "weights", "tile_weights", "tile_scores")


@dataclass(frozen=True)
class Problem:
    """One attention problem, as the library gets it."""

    spec: ScoreSpec
    inputs: Inputs

    @classmethod
    def of(
        cls,
        query,
        key,
        value,
        bias=None,
        sinks=None,
        masks=(),
        scale=None,
        softcap=None,
        dropout=None,
    ):
        shape = Shape(*query.shape[:2], key.shape[1], query.shape[2], key.shape[2])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        spec = ScoreSpec(shape, scale, softcap, tuple(masks), dropout=dropout)
        return cls(spec, Inputs(query, key, value, bias, sinks))

    def item(self, b: int) -> Problem:
        """The problem of one batch item; its masks must not depend on the item."""
        query, key, value, bias, sinks = self.inputs
        bias = bias if bias is None or len(bias) == 1 else bias[b : b + 1]
        spec = replace(self.spec, shape=self.spec.shape._replace(batch=1))
        one = (t[b : b + 1] for t in (query, key, value))
        return Problem(spec, Inputs(*one, bias, sinks))

    def call(self, readout: library.Readout | None = None) -> Call:
        part = next(parts(self.spec))
        assert part.full
        value = self.inputs.value if readout is None else None
        query, key, _, bias, sinks = self.inputs
        call = Call(self.spec, part, query, key, value, bias, sinks, readout)
        call.drop(self.spec.dropout, part)  # which readouts must not see
        return call

    # --- the library ------------------------------------------------------------------------

    def forward(self, names=FORWARD, room: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Results by name, and lse with the normaliser; `room` gives places to write to."""
        call, out = self.call(), library.Forward()
        found = {}
        for name in names:
            if room and name in room:
                found[name] = room[name]
                library.fill(out, name, room[name], 3)
            else:
                found[name] = call.write(out, name)
        call.run("forward", out)
        if "normaliser" in found:
            found["lse"] = logsumexp(found["normaliser"])
        return found

    def backward(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the inputs from those of `HOOKS`, of one call."""
        call, args = self.call(), library.Backward()
        given = self.forward(("output", "normaliser", "entropy"))
        call.read(args, "normaliser", given["normaliser"])
        for name, gradient in gradients.items():
            call.read(args, "d_" + name, gradient)
            if name in ("output", "entropy"):
                call.read(args, name, given[name])
        names = ["dq", "dk"] + ["dv"] * ("output" in gradients)
        names += ["dbias"] * (self.inputs.bias is not None)
        names += ["dsinks"] * (self.inputs.sinks is not None)
        found = {name: call.write(args, name) for name in names}
        call.run("backward", args)
        if "dsinks" in found:
            found["dsinks"] = found["dsinks"].sum((0, 2))
        return found

    def read(
        self, normaliser, rows, keys, names=READS, k=3, cell=(3, 7), x=None, y=None, row_weight=None
    ):
        """Readouts of a tile by name, of one call."""
        args = library.Readout(row0=rows[0], row1=rows[1], key0=keys[0], key1=keys[1], k=k)
        args.F = 0 if x is None else x.shape[-1]
        args.cell_rows, args.cell_keys = cell
        call = self.call(args)
        given = {"normaliser": normaliser, "x": x, "y": y, "row_weight": row_weight}
        for name, tensor in given.items():
            if tensor is not None:
                call.read(args, name, tensor)
        found = {name: call.write(args, name) for name in names}
        call.run("read", args)
        return found

    def allowed(self) -> Tensor:
        """bool `[B, H, L, S]`: the pairs that neither a mask nor a bias of -inf leaves out."""
        shape, mask, bias = self.spec.shape, self.spec.mask, self.inputs.bias
        full = (shape.batch, shape.heads, shape.queries, shape.keys)
        seen = torch.ones(full, dtype=torch.bool)
        if mask is not None:
            seen &= mask.block(whole(shape), torch.device("cpu"))
        return seen if bias is None else seen & (bias != -math.inf)

    # --- the oracle -------------------------------------------------------------------------

    def expected(self, gradients: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the forward, and from `gradients` the backward, must give, in float64."""
        leaves = [None if t is None else t.detach().double() for t in self.inputs]
        if leaves[3] is not None:
            leaves[3] = leaves[3].expand(*self.inputs.query.shape[:3], self.spec.shape.keys).clone()
        for leaf in leaves:
            if leaf is not None and gradients:
                leaf.requires_grad_()
        dense = reference.attention(self.spec, *leaves)
        log = dense.log_weights.clamp(min=-1e30)  # 0 * -inf is NaN
        found = {
            "output": dense.output,
            "weights": dense.weights,
            "lse": logsumexp(dense.normaliser),
            "entropy": -(dense.weights * log).sum(-1),
            "received": dense.weights.sum(-2),
            "max_value": dense.weights.amax(-1),
        }
        if gradients:
            lse = found["lse"]
            seen = found | {"lse": lse.masked_fill(lse == -math.inf, 0.0)}
            total = sum((seen[n] * g.double()).sum() for n, g in gradients.items())
            names = ("dq", "dk", "dv", "dbias", "dsinks")
            wanted = {n: t for n, t in zip(names, leaves, strict=True) if t is not None}
            grads = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
            found |= dict(zip(wanted, grads, strict=True))
        return {name: t.detach() for name, t in found.items()}

    def bounds(self, gradients: dict[str, Tensor] | None = None) -> dict[str, float]:
        """How far each result may be from the oracle."""
        query, key, value, bias, sinks = (None if t is None else t.double() for t in self.inputs)
        shape, size = self.spec.shape, self.inputs.query.shape[-1]
        eps = torch.finfo(accumulate_dtype(self.inputs.query.dtype)).eps
        half = torch.finfo(self.inputs.query.dtype).eps
        scale = abs(self.spec.scale)
        score = scale * top(query.norm(dim=-1)) * top(key.norm(dim=-1)) + top(bias) + top(sinks)
        weight = 2 * eps * ((size + 8) * score + shape.keys + 8)  # the share by which one is off
        log = math.log(shape.keys) + score
        grown = 1.0 if self.spec.dropout is None else self.spec.dropout.scale
        values = top(value) * grown
        found = {
            "output": (weight + half) * values,
            "weights": weight + half,
            "lse": weight + eps * (score + log),
            "entropy": weight * (log + 1),
            "received": (weight + shape.queries * eps) * shape.queries,
            "max_value": weight,
        }
        if gradients:
            g = {n: top(gradients.get(n)) for n in HOOKS}
            inner = value.shape[-1] * g["output"] * values  # of dO·V, and of dO·O with a rounded O
            slope = 2 * (inner + g["weights"] + g["received"] + g["lse"] + g["entropy"] * (log + 1))
            error = slope * (weight + eps * (value.shape[-1] + shape.keys)) + half * inner
            rows = shape.group * shape.queries
            found |= {
                "dq": scale * top(key) * (error + half * slope),
                "dk": scale * top(query) * rows * (error + (rows * eps + half) * slope),
                "dv": g["output"] * rows * (weight + rows * eps + half) * grown,
                "dbias": error + eps * slope,
                "dsinks": shape.batch * rows * (error + rows * eps * slope),
            }
        return found


def top(tensor: Tensor | None) -> float:
    """The largest finite magnitude."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.abs().masked_fill(~tensor.isfinite(), 0.0).max())


def readouts(weights: Tensor, k: int, cell: tuple[int, int], x, y, row_weight) -> dict[str, Tensor]:
    """What `Problem.read` must give for a tile of float64 weights, in plain PyTorch."""
    count = min(k, weights.shape[-1])
    none = weights.new_zeros(*weights.shape[:-1], k - count)
    row, column = cell
    pad = (0, -weights.shape[-1] % column, 0, -weights.shape[-2] % row)
    cells = torch.nn.functional.pad(weights, pad).unfold(2, row, row).unfold(3, column, column)
    return {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "max_value": weights.amax(-1),
        "topk_value": torch.cat([weights.topk(count, -1).values, none], -1),
        "received": (weights * row_weight[..., None]).sum(-2),
        "received_max": weights.amax(-2),
        "wx": weights @ x,
        "wty": weights.mT @ y,
        "pool_max": cells.amax((-2, -1)),
        "pool_mass": cells.sum((-2, -1)),
        "weights": weights,
        "tile_weights": weights,
    }


def read_bounds(
    one: float, half: float, weights: Tensor, cell, x, y, row_weight
) -> dict[str, float]:
    """How far each of them may be off, for weights that are off by `one`, all at most 1."""
    rows, keys = weights.shape[-2:]
    log = 1 + math.log(keys) + 90  # of a weight that underflows in float32
    return {
        "entropy": one * log,
        "max_value": one,
        "topk_value": one,
        "received": one * rows * top(row_weight),
        "received_max": one,
        "wx": one * top(x),
        "wty": one * rows * top(y),
        "pool_max": one,
        "pool_mass": one * min(cell[0], rows),
        "weights": one + half,
        "tile_weights": one,
    }


def check(problem: Problem, hooks=HOOKS, tile=None, k=3, cell=(7, 37)) -> None:
    """A forward of all results, a backward from `hooks`, and readouts, against the oracle."""
    gradients = {name: g for name, g in cotangents(problem).items() if name in hooks}
    expected, bounds = problem.expected(gradients), problem.bounds(gradients)
    found = problem.forward() | problem.backward(gradients)
    normaliser = found.pop("normaliser")
    agree(found, expected, bounds)
    agree_on_keys(found, "max", expected["weights"], bounds["max_value"])
    queries, keys = problem.spec.shape[3:]
    inner = ((queries // 3, queries), (keys // 5, -(-keys * 4 // 5)))
    for rows, columns in [((0, queries), (0, keys)), tile or inner]:
        check_read(problem, normaliser, expected["weights"], bounds, rows, columns, k, cell)


def check_read(problem, normaliser, dense, bounds, rows, columns, k, cell) -> None:
    """Every readout of a tile against the same in plain PyTorch."""
    half = torch.finfo(problem.inputs.query.dtype).eps
    tile = dense[:, :, slice(*rows), slice(*columns)]
    x, y = torch.randn(*tile.shape[:2], tile.shape[3], 5), torch.randn(*tile.shape[:3], 5)
    extra = {"x": x, "y": y, "row_weight": torch.randn(tile.shape[:3])}
    extra = {name: t.to(normaliser.dtype) for name, t in extra.items()}
    found = problem.read(normaliser, rows, columns, k=k, cell=cell, **extra)
    scores = found.pop("tile_scores")  # what underflows has no logarithm
    allowed = problem.allowed()[:, :, slice(*rows), slice(*columns)]
    assert torch.equal(scores == -math.inf, ~allowed)
    again = (scores.double() - normaliser[:, :, slice(*rows), 1:].double().log()).exp()
    assert gap(again, tile) <= bounds["max_value"]
    wide = {name: t.double() for name, t in extra.items()}
    allowed = read_bounds(bounds["max_value"], half, tile, cell, **wide)
    agree(found, readouts(tile, k, cell, **wide), allowed)
    for name in ("max", "topk"):
        agree_on_keys(found, name, tile, bounds["max_value"], columns[0])


def cotangents(problem: Problem) -> dict[str, Tensor]:
    """A random gradient for each result that has one."""
    shape, dtype = problem.spec.shape, problem.inputs.query.dtype
    rows = (shape.batch, shape.heads, shape.queries)
    sizes = {"output": (*rows, problem.inputs.value.shape[-1]), "weights": (*rows, shape.keys)}
    sizes |= {"lse": rows, "entropy": rows, "received": (*rows[:2], shape.keys)}
    wide = accumulate_dtype(dtype)
    return {n: torch.randn(s).to(dtype if len(s) == 4 else wide) for n, s in sizes.items()}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], bounds: dict[str, float]) -> None:
    """Asserts that floating results are within their bounds, NaN and infinities where they are."""
    over = []
    for name, result in found.items():
        if result.is_floating_point():
            error = gap(result, expected[name])
            if not error <= bounds[name]:
                over.append(f"{name}: {error:.2g} > {bounds[name]:.2g}")
    assert not over, "\n".join(over)


def agree_on_keys(found, name: str, dense: Tensor, bound: float, first: int = 0) -> None:
    """Asserts that each key holds the value beside it, that none comes twice, and -1 is no key."""
    values, keys = found[f"{name}_value"], found[f"{name}_key"]
    if keys.ndim < dense.ndim:
        values, keys = values[..., None], keys[..., None]
    none = keys < 0
    assert (keys[none] == -1).all()
    held = dense.gather(-1, (keys - first).clamp(0)).masked_fill(none, 0.0)
    assert gap(held, values) <= bound, name
    ordered = keys.sort(-1).values
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all(), "a key twice"
