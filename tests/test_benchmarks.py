"""The benchmarks run, and say what they found: tiny sizes, torch only. Nothing is timed here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks import cases, exactness, exactness_page, goals, libraries, measure, report
from benchmarks.peers import Function, Unsupported

import attlas
from attlas.kernels.native import library

from .helpers import NATIVE, gap

TORCH = ("attention", "dense", "eager", "sdpa", "mha", "received")
TINY = cases.Case("length", "L 6", TORCH, heads=2, kv_heads=2, queries=6, keys=6, size=4)
KEYS = {f"{case.group}/{case.name}": case for case in cases.CASES}


def results(entries: dict) -> dict:
    return {
        "date": "2026-01-01T00:00:00",
        "run": "make bench",
        "rounds": 2,
        "threads": 1,
        "machine": measure.machine(),
        "cases": entries,
    }


def test_cases_have_names_of_their_own_and_functions_that_exist():
    assert len(KEYS) == len(cases.CASES)
    for case in cases.CASES:
        assert {*case.functions, *case.memory} <= measure.FUNCTIONS.keys()


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.text)
def test_every_goal_is_measured_by_its_cases(goal):
    assert (goal.most is None) != (goal.least is None)
    for key in goal.cases:
        case = KEYS[key]
        assert {goal.over, *goal.under} <= {*(case.functions if goal.under else case.memory)}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", [None, "causal", "padding", "window"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_functions_agree_with_float64(mask, kv_heads, grad, monkeypatch):
    monkeypatch.setattr(measure, "LEAST", 0.0)
    length = cases.WINDOW + 5
    options = {"mask": mask, "kv_heads": kv_heads, "grad": grad, "dtype": "float64"}
    case = replace(TINY, queries=length, keys=length, **options)
    found = measure.times(case, threads=1, rounds=2, seconds=0.0)
    assert found.keys() == set(TORCH)
    if kv_heads == 1:
        assert "as many key heads" in found.pop("mha")["reason"]
    for name, function in found.items():
        assert len(function["seconds"]) == 2, function
        assert all(error < 1e-14 for error in function["error"].values())
        assert ("weights" in function["error"]) == measure.FUNCTIONS[name].dense


def test_an_error_is_seen():
    wrong = Function("wrong", lambda case: None)
    result = measure.FUNCTIONS["sdpa"].prepare(TINY)() + 0.5
    assert measure.errors(TINY, wrong, result)["output"] == pytest.approx(0.5, rel=1e-5)


def test_what_fails_is_listed_with_its_reason(monkeypatch):
    def broken(case):
        raise RuntimeError("no\nway")

    def refused(case):
        raise Unsupported("too small")

    monkeypatch.setitem(measure.FUNCTIONS, "mha", Function("broken", broken))
    monkeypatch.setitem(measure.FUNCTIONS, "eager", Function("refused", refused))
    case = replace(TINY, functions=("mha", "eager"))
    found = measure.times(case, threads=1, rounds=2, seconds=0.0)
    assert found == {"mha": {"reason": "RuntimeError: no way"}, "eager": {"reason": "too small"}}
    assert measure.memory(case, "mha", threads=1) == {"reason": "RuntimeError: no way"}
    text = report.absent(results({"length/L 6": {"functions": found, "memory": {}}}))
    assert "- refused: too small (length/L 6)" in text


def test_memory_is_measured():
    assert measure.memory(TINY, "sdpa", threads=1).keys() == {"bytes"}


def test_what_does_not_fit_in_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(measure, "available", lambda: 10)
    assert "GB are free" in measure.memory(TINY, "eager", threads=1)["reason"]
    assert "bytes" in measure.memory(TINY, "sdpa", threads=1)


def test_a_ratio_is_of_the_same_round_and_of_the_fastest():
    seconds = {"a": [2.0, 6.0], "b": [1.0, 9.0], "c": [4.0, 3.0]}
    functions = {name: {"seconds": values} for name, values in seconds.items()}
    assert goals.ratio(functions, "a", ("b", "c")) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("attention", "missing", "answer"),
    [
        (1.0, False, "yes"),
        (1.2, False, "**no**"),
        (1.0, True, "yes, so far"),
        (1.2, True, "**no**"),
    ],
)
def test_a_goal_is_met_only_where_every_case_meets_it(attention, missing, answer):
    functions = {"attention": {"seconds": [attention] * 3}, "sdpa": {"seconds": [1.0] * 3}}
    entries = {key: {"functions": functions, "memory": {}} for key in goals.LONG}
    if missing:
        del entries[goals.LONG[0]]
    verdict = next(goals.verdicts(results(entries)))
    assert verdict.goal == goals.GOALS[0]
    assert verdict.answer == answer
    assert ("not in this run" in report.measured(verdict)) == missing


def test_the_page_and_the_chart_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import chart

    entry = {
        "case": {"group": "length", "name": "L 6", "dtype": "float32", "queries": 6},
        "functions": measure.times(replace(TINY, functions=("attention", "sdpa")), 1, 2, 0.0),
        "memory": {"sdpa": {"bytes": 5_000_000}},
    }
    found = results({"length/L 6": entry})
    text = report.page(found)
    assert torch.__version__ in text
    assert "| L 6 |" in text
    assert "| length, L 6 | torch SDPA | 5 |" in text
    chart.draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


# --- exactness --------------------------------------------------------------------------


@pytest.fixture
def exact_case(monkeypatch):
    """The errors of every reading of one small random problem."""
    monkeypatch.setattr(exactness, "LENGTH", 12)
    return exactness.draw(10.0, 32, True, seed=0)


def test_every_reading_is_compared_with_float64(exact_case):
    rounding = torch.finfo(torch.float32).eps
    found = exactness.errors(exact_case, rounding)
    for name in exactness.READINGS:
        assert 0 < found[f"{name}, rms"] <= found[f"{name}, largest"] < 1e-4
        assert 0 < found[f"{name}, sum"] * rounding < 1e-4
        assert found[f"{name}, plain, largest"] == found["plain, largest"]  # all rows are read
    query, key = exact_case.weights.query, exact_case.weights.key
    assert found["score"] == pytest.approx(float((query @ key.mT).abs().max()) / 32**0.5)
    assert found["received"] * rounding < 1e-4


@pytest.mark.parametrize("name", exactness.READINGS)
def test_an_error_of_a_reading_is_seen(name, exact_case, monkeypatch):
    read = exactness.READINGS[name]
    monkeypatch.setitem(exactness.READINGS, name, lambda problem: read(problem) + 0.5)
    found = exactness.errors(exact_case, rounding=1.0)
    assert found[f"{name}, largest"] == pytest.approx(0.5, rel=1e-4)
    assert found[f"{name}, rms"] == pytest.approx(0.5, rel=1e-4)
    assert found[f"{name}, sum"] == pytest.approx(12 * 0.5, rel=1e-4)


def test_whispers_scale_is_taken_back_for_the_teaching_function():
    query, key = torch.randn(2, 1, 2, 12, 64, dtype=torch.float64)
    weights = attlas.attention(query, key, key, scale=1.0).weights
    problem = exactness.Problem(weights)
    assert gap(problem.teaching(), (query @ key.mT).softmax(-1)) < 1e-13
    assert gap(problem.exact, problem.teaching()) < 1e-13


def test_the_page_of_exactness_says_which_goals_are_met(exact_case):
    found = exactness.errors(exact_case, torch.finfo(torch.float32).eps)
    for name in exactness.READINGS:
        for kind in ("largest", "rms"):
            found[f"{name}, {kind}"] = found[f"{name}, plain, {kind}"]
        found[f"{name}, sum"] = 4.0
    parts = {part: {"10, E 32": found} for part in exactness.PARTS}
    machine = measure.machine()
    text = exactness_page.page({"avx2": parts}, {"avx512": "this processor has no AVX512"}, machine)
    assert "| avx2 | 1.00 | 1.00 | 4.0 |" in text
    assert "**no**" not in text
    assert "The library of avx512 is left out: this processor has no AVX512." in text
    assert text.count("| avx2 | 10, E 32 |") == len(exactness.PARTS)
    for name, wrong in (("index, rms", 1.3), ("map_rows, largest", 1.3), ("to_dense, sum", 5.0)):
        worse = found | {name: wrong * found[name] if wrong < 2 else wrong}
        goals_of = exactness_page.goals({"avx2": {"models": {"one": found, "two": worse}}})
        assert f"**{wrong}" in goals_of
        assert "| **no** |" in goals_of


@NATIVE.marks[0]
def test_a_library_is_used_in_a_process_that_torch_holds_to_it():
    name = libraries.usable()[-1]  # in_process looks that it is the one that is loaded
    before = library.load()[1]
    capability = libraries.in_process(name, torch.backends.cpu.get_cpu_capability)
    assert capability == libraries.CAPABILITY[name].upper()
    assert library.load()[1] == before
