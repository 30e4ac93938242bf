"""The chart of docs/benchmarks.md: time over that of torch SDPA, over L and for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from .goals import quartiles, ratio
from .measure import FUNCTIONS

# Ours in colour and in front.
STYLES: dict[str, dict[str, Any]] = {
    "attention": {"color": "#c1272d", "marker": "o", "linewidth": 2.6, "zorder": 5},
    "dense": {"color": "#ee8a2f", "marker": "s", "linewidth": 2.6, "zorder": 4},
    "eager": {"color": "#222222", "marker": "v"},
    "compiled": {"color": "#6b7280", "marker": "^"},
    "mha": {"color": "#a3a3a3", "marker": "<"},
    "jax": {"color": "#2f855a", "marker": "D"},
    "onnx": {"color": "#2b6cb0", "marker": "P"},
    "flex": {"color": "#7b4ea3", "marker": "X"},
}
WIDTH = 1.1
TIMES = FuncFormatter(lambda value, _: f"{value:.3g}×")


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the chart of what was measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    lengths = timed(results, "length")
    for name, style in STYLES.items():
        points = ratios(lengths, name)
        x = [lengths[i]["case"]["queries"] for i in points]
        left.plot(x, [*points.values()], **{"linewidth": WIDTH, **style}, label=label(name))
    left.set_xscale("log", base=2)
    left.set_xticks([entry["case"]["queries"] for entry in lengths])
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set(title="Sweep over L = S", xlabel="L = S    (B1 H8 E64, float32, no mask)")
    left.set(yscale="log", ylabel="time / time of torch SDPA, which gives no weights")

    models = timed(results, "models")
    for name, style in STYLES.items():
        points = ratios(models, name)
        size = 11 if name in ("attention", "dense") else 8
        right.plot([*points.values()], [*points], **style | {"linewidth": 0}, markersize=size)
    right.set_yticks(range(len(models)), [entry["case"]["name"] for entry in models])
    right.set(title="Named models", xlabel="time / time of torch SDPA", xscale="log")
    right.invert_yaxis()
    right.grid(axis="y", color="#eeeeee", linewidth=8)

    finish(left, left.yaxis, left.axhline)
    finish(right, right.xaxis, right.axvline)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    at = results["machine"]
    figure.suptitle(
        f"Attention beside its peers: {at['cpu']}, {results['threads']} threads, "
        f"torch {at['versions']['torch']}, {results['date'][:10]}. Less is faster.",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label(name: str) -> str:
    """The name of a function, and what it gives."""
    kind = "dense weights" if FUNCTIONS[name].dense else "no weights"
    return f"{FUNCTIONS[name].label} ({'lazy weights' if name == 'attention' else kind})"


def timed(results: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """The cases of a group in which torch SDPA was timed."""
    entries = [e for e in results["cases"].values() if e["case"]["group"] == group]
    return [e for e in entries if "median" in e["functions"].get("sdpa", {})]


def ratios(entries: list[dict[str, Any]], name: str) -> dict[int, float]:
    """The time of a function over that of torch SDPA, by the place of the case."""
    found = {i: e["functions"] for i, e in enumerate(entries)}
    found = {i: f for i, f in found.items() if "median" in f.get(name, {})}
    return {i: quartiles(ratio(f, name, ("sdpa",)))[0] for i, f in found.items()}


def finish(axes: Axes, ratio_axis: Any, line: Any) -> None:
    """Ticks for ratios, a line at 1, no frame."""
    line(1, color="#222222", linewidth=1, linestyle="--", zorder=1)
    low, high = ratio_axis.get_view_interval()
    ticks = [t for t in (2.0**n for n in range(-8, 9)) if low <= t <= high]
    ratio_axis.set_ticks(ticks)
    ratio_axis.set_major_formatter(TIMES)
    ratio_axis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=ratio_axis.axis_name, color="#dddddd")
    axes.set_axisbelow(True)
