"""Results as docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cases import CASES
from .goals import GB, Goal, Verdict, quartiles, ratio, verdicts
from .measure import FUNCTIONS

TITLES = {
    "models": "Named models",
    "length": "Sweep over L = S (B1 H8 E64, float32, no mask)",
    "head size": "Sweep over E (B1 H8 L1024, float32, no mask)",
    "dtype": "Sweep over the dtype (B1 H8 E64, no mask)",
    "mask": "Sweep over the mask (B1 H8 L2048 E64, float32)",
    "small, batch 32": "Small, in batches (B32 H8 E64, float32, no mask)",
    "reused buffers": "Results in used pages (malloc keeps what is freed; B1 H8 E64, float32)",
    "decode": "Decoding, one query",
    "forward and backward": "Forward and backward (B1 H8 E64, float32, no mask)",
    "backward alone": "Backward alone (B1 H8 E64, float32, no mask)",
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
BUSY = 0.5  # load average at the start above which times are not to be believed
METHOD = """\
Every function of a case runs in one process, all in turn, in a new order each round; a round
takes one sample of each, of 20 ms at least. Times are medians of {rounds} rounds or more, in
milliseconds; in brackets the ratio to torch SDPA, or where that is not in the table to the last
column, the median of the ratios of each round. Each peer has {threads} threads. Inputs exist and
graphs are compiled before. Quartiles, samples and versions are in `benchmarks.json`."""
FUNCTION_NOTES = """\
Dense weights come from attlas `scaled_dot_product_attention`, eager (scores, softmax, product, in
three lines), torch.compile of it, the core of nn.MultiheadAttention(need_weights=True) (its
operators without the projections), the same three lines in JAX jit, and the ONNX operator
Attention with qk_matmul_output_mode=3. Lazy weights come from attlas `attention`. torch SDPA and
flex_attention give the output only. attlas and ONNX Runtime keep the memory of results that were
freed for the next call; "fresh memory" is attlas when it has given it back before each call."""
MEMORY = """\
What one call adds to the peak resident set (VmHWM on Linux) of a fresh process, in MB, inputs not
counted: one process for each number, after a small call that loads libraries and starts threads."""
ERRORS = """\
The largest difference from float64 in any case of that dtype, on up to 32 queries of each head:
output / weights."""


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    parts = ["# Benchmarks", header(results), "## Goals", goals(results), "## Times"]
    parts += [
        "![Times beside torch SDPA](benchmarks.png)",
        FUNCTION_NOTES,
        METHOD.format(**results),
    ]
    for group in dict.fromkeys(entry["case"]["group"] for entry in results["cases"].values()):
        entries = {k: e for k, e in results["cases"].items() if e["case"]["group"] == group}
        if group in TITLES:
            parts += [f"### {TITLES[group]}", times(entries)]
    parts += ["## Memory", MEMORY, memory(results), "## Error", ERRORS, errors(results)]
    parts += ["## What did not run", absent(results)]
    return "\n\n".join(parts) + "\n"


def header(results: dict[str, Any]) -> str:
    """When, where and how."""
    at, versions = results["machine"], results["machine"]["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"Made by `{results['run']}` on {results['date']}, on {at['cpu']} ({at['instructions']}, "
        f"{at['cores']} cores, {at['system']}), Python {at['python']}, {names}."
    ]
    if at["load"] > BUSY:
        lines.append(
            f"**The load average was {at['load']:.1f} at the start: other work may have disturbed "
            "the times.**"
        )
    if len(results["cases"]) < len(CASES):
        lines.append(
            f"**{len(results['cases'])} of {len(CASES)} cases; `make bench` measures all of them.**"
        )
    return "\n\n".join(lines)


def table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


# --- goals ------------------------------------------------------------------------------


def goals(results: dict[str, Any]) -> str:
    """The table "goal, measured, met?"; the page and the terminal show it."""
    rows = [
        [str(v.goal.issue), v.goal.text, bound(v.goal), measured(v), v.answer]
        for v in verdicts(results)
    ]
    return table(["issue", "what", "goal", "measured, worst case (quartiles)", "met?"], rows, 5)


def bound(goal: Goal) -> str:
    """The bound of a goal."""
    if not goal.under:
        return f"≤ {goal.most / GB:g} GB"
    return f"≤ {goal.most:g}" if goal.most is not None else f"≥ {goal.least:g}"


def measured(verdict: Verdict) -> str:
    """The worst case, with what all cases gave, and what is missing."""
    texts, values = [], verdict.values
    if values:
        median, low, high = values[verdict.worst]
        name = verdict.worst.split("/", 1)[1]
        if verdict.goal.under:
            texts.append(f"{median:.2f} ({low:.2f} to {high:.2f}) at {name}")
        else:
            texts.append(f"{median / GB:.2f} GB")
        others = [v[0] for case, v in values.items() if case != verdict.worst]
        if others:
            spread = f"{min(others):.2f}", f"{max(others):.2f}"
            texts.append("others " + " to ".join(dict.fromkeys(spread)))
    for why in dict.fromkeys(verdict.missing.values()):
        cases = [case.split("/", 1)[1] for case, r in verdict.missing.items() if r == why]
        texts.append(f"{', '.join(cases)}: {why}")
    return "; ".join(texts)


# --- tables -----------------------------------------------------------------------------


def times(entries: dict[str, Any]) -> str:
    """Milliseconds of each function in each case, and the ratio to the base."""
    timed = {key: entry["functions"] for key, entry in entries.items()}
    names = [n for n in FUNCTIONS if any("median" in t.get(n, {}) for t in timed.values())]
    if not names:
        return "Nothing was measured."
    base = "sdpa" if "sdpa" in names else names[-1]
    rows = [
        [entries[key]["case"]["name"], *(time(functions, name, base) for name in names)]
        for key, functions in timed.items()
    ]
    return table(["", *(FUNCTIONS[n].label for n in names)], rows)


def time(functions: dict[str, Any], name: str, base: str) -> str:
    """One cell."""
    if "median" not in functions.get(name, {}):
        return "–"
    median = functions[name]["median"] * 1e3
    text = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
    if name == base or "median" not in functions.get(base, {}):
        return text
    return f"{text} ({quartiles(ratio(functions, name, (base,)))[0]:.2f})"


def memory(results: dict[str, Any]) -> str:
    """Megabytes of each function in each case."""
    entries = [e for e in results["cases"].values() if e["memory"]]
    rows = []
    for entry in entries:
        case = entry["case"]
        title = f"{case['group']}, {case['name']}" if case["group"] != "memory" else case["name"]
        for name, value in entry["memory"].items():
            size = f"{value['bytes'] / 1e6:,.0f}" if "bytes" in value else value["reason"]
            rows.append([title, FUNCTIONS[name].label, size])
    return table(["", "function", "MB"], rows, 2)


def errors(results: dict[str, Any]) -> str:
    """The largest error of each function by dtype."""
    worst: dict[tuple[str, str, str], float] = {}
    for entry in results["cases"].values():
        for name, value in entry["functions"].items():
            for what, size in value.get("error", {}).items():
                key = name, entry["case"]["dtype"], what
                worst[key] = max(size, worst.get(key, 0.0))
    dtypes = [d for d in DTYPES if any(dtype == d for _, dtype, _ in worst)]
    rows = []
    for name in dict.fromkeys(name for name, _, _ in worst):
        both = [[worst.get((name, d, w)) for w in ("output", "weights")] for d in dtypes]
        cells = [" / ".join(f"{x:.0e}" for x in pair if x is not None) or "–" for pair in both]
        rows.append([FUNCTIONS[name].label, *cells])
    return table(["", *dtypes], rows)


def absent(results: dict[str, Any]) -> str:
    """Each function that could not run a case, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, entry in results["cases"].items():
        for name, value in [*entry["functions"].items(), *entry["memory"].items()]:
            if "reason" in value:
                reasons.setdefault((name, value["reason"]), []).append(key)
    lines = [
        f"- {FUNCTIONS[name].label}: {why} ({'; '.join(dict.fromkeys(cases))})"
        for (name, why), cases in reasons.items()
    ]
    return "\n".join(lines) or "Everything did."
