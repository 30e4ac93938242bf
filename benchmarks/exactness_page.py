"""What `exactness` measured as docs/exactness.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Errors = dict[str, float]  # of one case
Results = dict[str, dict[str, dict[str, Errors]]]  # library, part, case

GOAL = 1.25  # times the error of plain PyTorch, at most
SUMS = 4.0  # roundings, at most
LAZY = ("to_dense", "index", "map_rows")
SHOWN = ("teaching", *LAZY)

INTRO = """\
How far attention weights are from the same weights in float64, of the same query and key. Plain
PyTorch is `softmax(q @ k.mT * scale)` in the dtype of the inputs. The teaching function is
`attlas.scaled_dot_product_attention`. Lazy weights are those of `attlas.attention` (in real models:
those of the model, with `attn_implementation="attlas"`), read in three ways: all at once with
`weights.to_dense()`, single rows with `weights[:, :, i]`, and all rows with `weights.map_rows`.

An error is given twice: the largest of all weights, and the root of the mean square (rms). The
columns of attlas hold the errors as multiples of those that plain PyTorch makes in the same rows:
1.00 / 1.00 is as exact as plain PyTorch. "Rows" is how far the sum of a row of weights is from 1 at
worst, "received" how far the sum of `weights.received()` is from the number of queries, as a share
of it; both are in roundings of the dtype (of float32: 1.2e-7).

Each number is the worst of three draws (Whisper: of one, whose layers are large). Each library runs
in a process in which PyTorch, too, uses no more of the processor than the library does, so that one
machine stands for several. **Bold** is what misses the goal: at most {goal} times the error of
plain PyTorch, and sums within {sums:g} roundings."""

PARTS = {
    "random inputs": """\
## Random inputs

Normal queries and keys, float32, B2 H8 L256 S256. Scores are normal with the standard deviation
given, E is the size of a head.""",
    "half precision": """\
## Half precision

The same for inputs in half precision, whose weights are rounded to it.""",
    "models": """\
## Real models

Every layer of the pretrained models of the tests: MiniLM and RXNMapper read 2 texts of 96 random
tokens, Whisper base hears 30 seconds of noise and reads 96 random tokens. "Score" is the
largest score of the layer.""",
}


def page(results: Results, absent: dict[str, str], machine: dict[str, Any]) -> str:
    """The whole page, from the results of each library and why others are absent."""
    versions = machine["versions"]
    made = (
        f"Made by `python -m benchmarks.exactness` (some minutes), on {machine['cpu']} "
        f"({machine['system']}), attlas {versions['attlas']}, torch {versions['torch']}."
    )
    parts = ["# Exactness", INTRO.format(goal=GOAL, sums=SUMS), made]
    parts += ["## In short", goals(results)]
    parts += [f"The library of {name} is left out: {why}." for name, why in absent.items()]
    for part, text in PARTS.items():
        parts += [text, table(part, results)]
    return "\n\n".join(parts) + "\n"


def table(part: str, results: Results) -> str:
    """A line for each library and case."""
    head = ["library", "inputs", "score", "plain, largest / rms", *(f"{n}, times" for n in SHOWN)]
    head += ["rows: plain", "teaching", "lazy", "received"]
    lines = [" | ".join(head), " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for library, parts in results.items():
        for case, found in parts[part].items():
            cells = [library, case, f"{found['score']:.0f}"]
            cells.append(f"{found['plain, largest']:.1e} / {found['plain, rms']:.1e}")
            for name in SHOWN:
                largest, rms = ratios(found, name)
                cells.append(f"{bold(largest, GOAL)} / {bold(rms, GOAL)}")
            cells += [f"{found[f'{name}, sum']:.1f}" for name in ("plain", "teaching")]
            cells += [bold(value, SUMS, ".1f") for value in (rows(found), found["received"])]
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def goals(results: Results) -> str:
    """For each library the worst of all cases, and whether the goals are met."""
    lines = ["| library | largest error, times plain | rms, times plain | rows | received | met? |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for library in results:
        cases = list(_cases(results[library]))
        pairs = [ratios(found, name) for found in cases for name in LAZY]
        largest, rms = (max(values) for values in zip(*pairs, strict=True))
        sums = max(map(rows, cases)), max(found["received"] for found in cases)
        met = max(largest, rms) <= GOAL and max(sums) <= SUMS
        cells = [library, bold(largest, GOAL), bold(rms, GOAL)]
        cells += [bold(value, SUMS, ".1f") for value in sums]
        lines.append(f"| {' | '.join(cells)} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)


def _cases(parts: dict[str, dict[str, Errors]]) -> Iterator[Errors]:
    for cases in parts.values():
        yield from cases.values()


def rows(found: Errors) -> float:
    """How far a row of lazy weights is from a sum of 1, in roundings, in the worst way to read."""
    return max(found[f"{name}, sum"] for name in LAZY)


def ratios(found: Errors, name: str) -> tuple[float, float]:
    """The errors of a reading as multiples of those of plain PyTorch: largest, rms."""
    largest, rms = (
        found[f"{name}, {kind}"] / found[f"{name}, plain, {kind}"] for kind in ("largest", "rms")
    )
    return largest, rms


def bold(value: float, most: float, form: str = ".2f") -> str:
    """A number, in bold where it misses its goal."""
    text = format(value, form)
    return f"**{text}**" if value > most else text
