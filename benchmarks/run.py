"""Measures attlas beside its peers; `make bench` runs it, with ARGS for the arguments.

python -m benchmarks.run                  everything, 10 to 15 minutes on 2 cores; writes docs/
python -m benchmarks.run --only decode    the cases with this in "group/name"
python -m benchmarks.run --quick          what is quick of each case, a few minutes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from . import chart, measure, report
from .cases import CASES, Case

ROOT = Path(__file__).parent.parent
QUICK = 6e8  # multiplications of Q Kᵀ, the most in a quick run
SECONDS = 2.0  # spent on more rounds where they are short
PRELOAD = ["torch._inductor.compile_fx", "torch._dynamo", "benchmarks.measure"]


def main() -> None:
    options, given = parse(), shlex.join(sys.argv[1:])
    cases = [case for case in CASES if options.only in f"{case.group}/{case.name}"]
    if options.quick:
        cases = [case for case in cases if case.scores * case.size <= QUICK]
    if not cases:
        raise SystemExit(f"--only {options.only!r} is in no case, such as 'length/L 1024'")
    out = options.out or ROOT / ("docs" if cases == CASES else "build/bench")
    results = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "run": "make bench" + (f' ARGS="{given}"' if given else ""),
        "rounds": options.rounds or (3 if options.quick else 7),
        "threads": options.threads,
        "machine": measure.machine(),
        "cases": {},
    }
    try:
        measure_all(cases, results, out)
    finally:  # an interrupted run too says what it found
        (out / "benchmarks.md").write_text(report.page(results))
        chart.draw(results, out / "benchmarks.png")
    console = Console()
    console.print(Markdown(report.goals(results)))
    console.print(f"Written: {out}/benchmarks.md, benchmarks.png, benchmarks.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help='TEXT is in "group/name"')
    parser.add_argument("--quick", action="store_true", help="small cases, and three rounds")
    parser.add_argument("--rounds", type=int, help="rounds at least (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each peer")
    parser.add_argument(
        "--out", type=Path, help="where results go (default: docs; build/bench for a part)"
    )
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    return options


def measure_all(cases: list[Case], results: dict[str, Any], out: Path) -> None:
    """Fills results, and writes them after each step, so that nothing is lost."""
    out.mkdir(parents=True, exist_ok=True)
    rounds, threads = results["rounds"], results["threads"]
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=sum(bool(c.functions) + len(c.memory) for c in cases))
        for case in cases:
            key = f"{case.group}/{case.name}"
            entry = {"case": asdict(case), "functions": {}, "memory": {}}
            results["cases"][key] = entry
            if case.functions:
                bar.update(task, description=key)
                begin = time.perf_counter()
                entry["functions"] = fresh(measure.times, case, threads, rounds, SECONDS)
                if "reason" in entry["functions"]:  # of the process, so of every function
                    entry["functions"] = dict.fromkeys(case.functions, entry["functions"])
                entry["wall"] = time.perf_counter() - begin
                bar.advance(task)
            for name in case.memory:
                bar.update(task, description=f"{key}: memory of {name}")
                entry["memory"][name] = fresh(measure.memory, case, name, threads)
                bar.advance(task)
            (out / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result from a process of its own, or the reason why that died.

    Where the system can, processes are forked from one that has imported torch and done nothing.
    """
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"reason": "the process died; it may have been out of memory"}


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside ours
    main()
