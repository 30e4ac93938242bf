"""Time, memory and error of functions, so that they can be compared.

Time: the functions of a case take turns in one process, in an order that is drawn anew for each
round, so what the machine does meanwhile falls on all of them. Memory: a fresh process each.
Error: against float64, on some rows. What cannot run is reported with the reason.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import resource
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas

from .cases import Case
from .ours import OURS
from .peers import PEERS, Function, Unsupported, three_lines

FUNCTIONS: dict[str, Function] = OURS | PEERS
PACKAGES = ("torch", "numpy", "jax", "jaxlib", "onnxruntime", "onnx")
LEAST = 0.02  # seconds of one sample: what is shorter is repeated in it
SPIN = 0.005  # seconds after which the threads of whoever was before sleep
ROWS = 32  # queries of each head whose results are compared with float64


def start(threads: int) -> None:
    """Gives every peer the same number of threads; before any of them runs."""
    torch.set_num_threads(threads)
    os.environ["NPROC"] = str(threads)  # the size of XLA's pool
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside this one


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text[:300]}"


# --- time -------------------------------------------------------------------------------


def times(case: Case, threads: int, rounds: int, seconds: float) -> dict[str, dict]:
    """Samples and errors of each function of a case, or the reason why there are none."""
    start(threads)
    found: dict[str, dict] = {}
    ready: dict[str, Callable[[], Any]] = {}
    try:
        if case.reuse:
            keep_freed_memory()
    except Unsupported as error:
        return {name: {"reason": reason(error)} for name in case.functions}
    for name in case.functions:
        try:
            fits(case, name)
            call = FUNCTIONS[name].prepare(case)
            found[name] = {"error": errors(case, FUNCTIONS[name], call())}
            ready[name] = call
        except Exception as error:  # a peer that fails is part of the result
            found[name] = {"reason": reason(error)}
    for name, samples in in_turn(ready, rounds, seconds).items():
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        found[name] |= {"median": median, "low": low, "high": high, "seconds": samples}
    return found


def in_turn(
    functions: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call, once a round for each function, which has been called before.

    At least `rounds`, and more, up to three times as many, while they take fewer seconds.
    """
    repeats = {}
    for name, function in functions.items():
        once = timeit.timeit(function, number=1)
        if once < LEAST:
            once = min(timeit.repeat(function, number=1, repeat=3))
        repeats[name] = max(1, round(LEAST / once))
    order, draw = list(functions), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for count in range(3 * rounds):
        if count >= rounds and time.perf_counter() - begin > seconds:
            break
        draw.shuffle(order)
        for name in order:
            time.sleep(SPIN)
            taken = timeit.timeit(functions[name], number=repeats[name])
            samples[name].append(taken / repeats[name])
    return samples


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed, so that a large result gets pages used before."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError as error:
        raise Unsupported("only the malloc of glibc can be told to reuse large buffers") from error
    most_mapped, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if not (mallopt(most_mapped, 0) and mallopt(trim, -1)):
        raise Unsupported("malloc refused to reuse large buffers")


# --- error ------------------------------------------------------------------------------


def errors(case: Case, function: Function, result: Any) -> dict[str, float]:
    """The largest differences of output and weights from float64, on some rows."""
    if function.gives == "other":
        return {}
    rows, exact = float64(case)
    first = result if isinstance(result, Tensor) else result[0]
    got = {"output": first, "weights": result[1]} if function.dense else {"output": first}
    return {
        name: float((function.to_torch(value).detach()[:, :, rows] - right).abs().max())
        for (name, value), right in zip(got.items(), exact, strict=False)
    }


@lru_cache(1)
def float64(case: Case) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Some rows, and their output and weights in float64."""
    rows = torch.linspace(0, case.queries - 1, min(ROWS, case.queries)).long()
    q, k, v = (t.detach().double() for t in case.inputs())
    allowed = case.allowed(rows)
    mask = None if allowed is None else torch.where(allowed, 0.0, -torch.inf).double()
    return rows, three_lines(q[:, :, rows], k, v, mask)


# --- memory -----------------------------------------------------------------------------


def memory(case: Case, name: str, threads: int) -> dict[str, Any]:
    """Bytes that a call adds to the peak resident set of this process, which must be fresh.

    Inputs are there before, and so is what a small call leaves: libraries, threads, compilers.
    """
    start(threads)
    function = FUNCTIONS[name]
    try:
        fits(case, name)
        function.prepare(case.small())()
        call = function.prepare(case)
        gc.collect()
        before = resident()
        if function.compiles:  # for these sizes, now; the peak starts again
            call()
            resident()
        call()
        return {"bytes": peak() - before}
    except Exception as error:  # a peer that fails is part of the result
        return {"reason": reason(error)}


def fits(case: Case, name: str) -> None:
    """Raises where the dense matrices of a function do not fit in memory."""
    function, free = FUNCTIONS[name], available()
    need = function.matrices * case.scores * case.torch_dtype.itemsize
    if function.dense and free is not None and need > free:
        raise Unsupported(f"needs up to {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


def available() -> int | None:
    """Bytes of memory that are free, None where that is not known."""
    info = Path("/proc/meminfo")
    return _field(info, "MemAvailable") if info.exists() else None


def resident() -> int:
    """The resident set of this process in bytes; on Linux the peak starts again from it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _field(status, "VmRSS")


def peak() -> int:
    """The peak resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return _field(status, "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# --- the machine ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What is measured on, and with which versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {"attlas": attlas.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that ran in the last minute
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }
