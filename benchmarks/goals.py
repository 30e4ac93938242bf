"""The goals of the project, and whether measured results meet them.

A ratio of times is the median of the ratios of each round, in which both functions ran in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .cases import CASES

GB = 1e9


@dataclass(frozen=True)
class Goal:
    """`over / under` at most, or at least, a bound in each case; without `under`, bytes."""

    issue: int
    text: str
    cases: tuple[str, ...]  # "group/name"
    over: str
    under: tuple[str, ...] = ()  # the fastest of these in each round
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value meets the bound."""
        if self.most is not None:
            return value <= self.most
        return self.least is not None and value >= self.least


@dataclass(frozen=True)
class Verdict:
    """What was measured of a goal: the worst of its cases, and cases without a measurement."""

    goal: Goal
    values: dict[str, tuple[float, float, float]]  # of each case: median, quartiles
    missing: dict[str, str]

    @property
    def worst(self) -> str:
        """The case that is furthest from the goal."""
        pick = max if self.goal.most is not None else min
        return pick(self.values, key=lambda case: self.values[case][0])

    @property
    def answer(self) -> str:
        """Met or not: yes only where every case was measured."""
        if any(not self.goal.met(value[0]) for value in self.values.values()):
            return "**no**"
        if self.missing:
            return "yes, so far" if self.values else "not measured"
        return "yes"


def at(group: str, *names: object) -> tuple[str, ...]:
    """The keys of cases; a number is a length."""
    return tuple(f"{group}/L {n}" if isinstance(n, int) else f"{group}/{n}" for n in names)


TINY, LONG = at("length", 4, 8, 16, 32, 64, 128), at("length", 1024, 2048, 4096, 8192)
MEDIUM = at("length", 512, 1024, 2048, 4096, 8192)
SMALL = at("small, batch 32", 16, 32, 64)
BF16 = at("dtype", "bfloat16, L 1024", "bfloat16, L 4096")
SDPA = ("sdpa",)
DECODE = [case for case in CASES if case.group == "decode"]

GOALS = [
    Goal(1, "lazy weights, time of torch SDPA", LONG, "attention", SDPA, most=1.1),
    Goal(1, "dense weights, times as fast as eager", LONG, "eager", ("dense",), least=1.5),
    Goal(1, "dense weights, short, time of eager", TINY, "dense", ("eager",), most=1.1),
    Goal(1, "memory of attention, entropy(), received(), topk(8), L = S = 16384",
         at("memory", 16384), "readouts", most=1 * GB),
    Goal(2, "output and lse, time of torch SDPA", MEDIUM, "attention", SDPA, most=1.0),
    Goal(2, "dense weights in fresh memory, time of torch SDPA", MEDIUM, "fresh", SDPA, most=1.4),
    Goal(2, "dense weights, kept memory, time of torch SDPA", MEDIUM, "dense", SDPA, most=1.2),
    Goal(2, "dense weights, times as fast as eager", MEDIUM, "eager", ("dense",), least=3),
    Goal(2, "dense weights, time of ONNX Runtime", MEDIUM, "dense", ("onnx",), most=1.0),
    Goal(2, "dense weights, malloc keeps memory for all, time of torch SDPA",
         at("reused buffers", 512, 1024, 2048, 4096), "dense", SDPA, most=1.2),
    Goal(2, "output, lse, entropy, max, received in one call, time of torch SDPA",
         MEDIUM, "statistics", SDPA, most=1.15),
    Goal(2, "received() later, time of torch SDPA", MEDIUM, "received", SDPA, most=0.65),
    Goal(2, "causal, time of unmasked", at("mask", "causal"), "attention", ("unmasked",), most=0.6),
    Goal(2, "half of the keys padding, time of unmasked",
         at("mask", "padding"), "attention", ("unmasked",), most=0.6),
    Goal(2, "bfloat16, dense weights, time of torch SDPA without", BF16, "dense", SDPA, most=1.0),
    Goal(2, "small, batch 32: lazy weights, time of the faster of eager and SDPA",
         SMALL, "attention", ("eager", "sdpa"), most=1.1),
    Goal(2, "small, batch 32: dense weights, time of the faster of eager and SDPA",
         SMALL, "dense", ("eager", "sdpa"), most=1.1),
    Goal(2, "decoding, of the memory bandwidth of a copy",
         at("decode", "L 1, S 32768, E 128, 32 heads on 8"), "copy", ("attention",), least=0.8),
    Goal(6, "decoding, time of torch SDPA",
         at("decode", *(case.name for case in DECODE)), "attention", SDPA, most=1.0),
    Goal(6, "decoding from 16384 keys, of the memory bandwidth of a copy",
         at("decode", *(case.name for case in DECODE if case.keys >= 16384)),
         "copy", ("attention",), least=0.8),
    Goal(2, "forward and backward, output only, time of torch SDPA",
         at("forward and backward", 512, 1024, 2048, 4096), "attention", SDPA, most=1.0),
    Goal(2, "memory of entropy and top-k at a million keys, 64 queries",
         at("memory", "L 64, S 1000000, 1 head"), "entropy_topk", most=1 * GB),
    Goal(3, "memory of gradients of entropy().mean() + received().var(), L = S = 16384",
         at("memory", "L 16384, with gradients"), "train", most=1.5 * GB),
    Goal(3, "backward of received().var(), time of the backward of torch SDPA",
         at("backward alone", 1024, 2048), "received_backward", ("sdpa_backward",), most=2.5),
]  # fmt: skip


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, and the quartiles below and above."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio(functions: dict[str, Any], over: str, under: tuple[str, ...]) -> list[float]:
    """`over / under` in each round."""
    rounds = zip(*(functions[name]["seconds"] for name in (over, *under)), strict=True)
    return [top / min(bottom) for top, *bottom in rounds]


def verdicts(results: dict[str, Any]) -> Iterator[Verdict]:
    """Every goal, with what was measured of it."""
    for goal in GOALS:
        values, missing = {}, {}
        for key in goal.cases:
            measured = (
                results["cases"].get(key, {}).get("functions" if goal.under else "memory", {})
            )
            wanted = (goal.over, *goal.under)
            absent = [name for name in wanted if name not in measured]
            failed = [measured[n]["reason"] for n in wanted if "reason" in measured.get(n, {})]
            if absent or failed:
                missing[key] = failed[0] if failed else "not in this run"
            elif goal.under:
                values[key] = quartiles(ratio(measured, goal.over, goal.under))
            else:
                size = float(measured[goal.over]["bytes"])
                values[key] = (size, size, size)
        yield Verdict(goal, values, missing)
