"""Time and memory, measured so that peers can be compared.

Times: the functions take turns in one process, and each gets the median and quartiles of its
own runs, so what the machine does meanwhile falls on all of them. Memory: a fresh process each,
the peak resident set over what it was before the call.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Function = Callable[[], object]


def in_turn(functions: dict[str, Function], runs: int = 9, least: float = 0.02) -> dict[str, dict]:
    """Median and quartiles in seconds of each function; short ones are repeated in a run."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, int(least / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def peak_memory(setup: str, call: str) -> int:
    """Bytes that `call` adds to the peak resident set of a fresh process, after `setup`."""
    program = f"{setup}\nfrom measure import peak\nbefore = peak()\n{call}\nprint(peak() - before)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measured program failed:\n{program}\n{done.stderr}")
    return int(done.stdout.split()[-1])


def resident() -> int:
    """The resident set of this process in bytes; on Linux the peak starts again from it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The peak resident set of this process, in bytes."""
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def save(path: Path, results: dict) -> None:
    """Writes results with the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
