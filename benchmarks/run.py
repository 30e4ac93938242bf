"""Measures attlas beside its peers and writes docs/benchmarks.md; `make bench` runs it.

Peers: plain eager (three lines, dense weights) and torch's fused scaled_dot_product_attention
(no weights). Every case is first compared with a float64 computation.

    python benchmarks/run.py            everything, a few minutes
    python benchmarks/run.py --quick    small sizes, under a minute, writes nothing
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from measure import in_turn, machine, peak_memory, save
from torch import Tensor
from torch.nn import functional as F

import attlas

ROOT = Path(__file__).parent.parent
HEADS, SIZE = 8, 64


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The three lines that everybody writes."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one sequence."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, HEADS, length, SIZE, generator=generator) for _ in range(3))
    return q, k, v


def speed(lengths: list[int]) -> list[dict]:
    """Times of both functions and their peers."""
    rows = []
    for length in lengths:
        q, k, v = inputs(length)
        times = in_turn(
            {
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                "attention": lambda q=q, k=k, v=v: attlas.attention(q, k, v),
                "eager": lambda q=q, k=k, v=v: eager(q, k, v),
                "dense": lambda q=q, k=k, v=v: attlas.scaled_dot_product_attention(q, k, v),
            }
        )
        rows.append({"L": length, "error": error(q, k, v), "times": times})
        print(line(rows[-1]), flush=True)
    return rows


def error(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """The largest difference of outputs from float64, on the first head."""
    one = [t[:, :1] for t in (q, k, v)]
    exact = eager(*(t.double() for t in one))[0]
    return {
        "attention": float((attlas.attention(*one).output - exact).abs().max()),
        "eager": float((eager(*one)[0] - exact).abs().max()),
    }


def memory(length: int) -> dict[str, int]:
    """What peers add to the peak resident set, in bytes."""
    setup = (
        "import torch, math, attlas\nfrom run import eager\nfrom torch.nn import functional as F\n"
        "t = torch.randn(1, 8, 512, 64); attlas.attention(t, t, t).weights.topk(8)\n"
        f"q, k, v = (torch.randn(1, {HEADS}, {length}, {SIZE}) for _ in range(3))"
    )
    readouts = "w = attlas.attention(q, k, v).weights; w.entropy(); w.received(); w.topk(8)"
    result = {
        "sdpa, no weights": peak_memory(setup, "F.scaled_dot_product_attention(q, k, v)"),
        "attention, entropy, received, topk(8)": peak_memory(setup, readouts),
    }
    dense = HEADS * length**2 * 4
    if 3 * dense < available():
        result["eager, dense weights"] = peak_memory(setup, "eager(q, k, v)")
    result["(one dense matrix of weights)"] = dense
    for name, size in result.items():
        print(f"  {name:40} {size / 1e6:10,.0f} MB", flush=True)
    return result


def available() -> int:
    """Bytes of memory that are free, or 0 where that is not known."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


def line(row: dict) -> str:
    """One row for the terminal."""
    t = {name: value["median"] for name, value in row["times"].items()}
    ms = {name: f"{name} {median * 1e3:9.3f} ms" for name, median in t.items()}
    lazy, fast = t["attention"] / t["sdpa"], t["eager"] / t["dense"]
    return (
        f"  L={row['L']:<6} {ms['sdpa']}   {ms['attention']} ({lazy:.2f} x)"
        f"   {ms['eager']}   {ms['dense']} ({fast:.2f} x as fast)"
    )


def page(rows: list[dict], used: dict[str, int], length: int) -> str:
    """docs/benchmarks.md."""
    where = machine()
    out = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {where['cpu']} ({where['isa']}, {where['threads']} threads), "
        f"torch {where['torch']}. B1 H{HEADS} E{SIZE}, float32, no mask; functions take turns in "
        "one process; medians of 9 runs, in milliseconds. Quartiles and errors are in "
        "`benchmarks/results.json`.",
        "",
        "| L = S | torch SDPA, no weights | `attention`, lazy weights | ratio "
        "| eager, dense weights | `scaled_dot_product_attention`, dense weights | times as fast |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        t = {name: value["median"] for name, value in row["times"].items()}
        out.append(
            f"| {row['L']} | {t['sdpa'] * 1e3:.3f} | {t['attention'] * 1e3:.3f} "
            f"| {t['attention'] / t['sdpa']:.2f} | {t['eager'] * 1e3:.3f} "
            f"| {t['dense'] * 1e3:.3f} | {t['eager'] / t['dense']:.2f} |"
        )
    out += ["", f"Peak memory over the inputs, L = S = {length}, one fresh process each:", ""]
    out += ["| what | MB |", "|---|---:|"]
    out += [f"| {name} | {size / 1e6:,.0f} |" for name, size in used.items()]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; write nothing")
    quick = parser.parse_args().quick
    print(f"{machine()}\nTime, medians of 9 runs in turn:")
    rows = speed([16, 64, 128, 1024] if quick else [16, 32, 64, 128, 512, 1024, 2048, 4096, 8192])
    length = 4096 if quick else 16384
    print(f"Memory over the inputs, L = S = {length}:")
    used = memory(length)
    if not quick:
        save(ROOT / "benchmarks" / "results.json", {"speed": rows, "memory": used})
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "benchmarks.md").write_text(page(rows, used, length))
        print("Written: docs/benchmarks.md, benchmarks/results.json")


if __name__ == "__main__":
    main()
