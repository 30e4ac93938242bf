"""The compiled libraries that this processor can run, and how to choose one of them.

attlas takes the best one for what torch uses of the processor. Here any of them is chosen: in this
process, where torch stays as it is, or in a new one, in which torch too uses no more than that.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from attlas.kernels.native import library

# Each library, the best first: what it needs, in torch's words, and the value of
# ATEN_CPU_CAPABILITY with which torch uses as much and no more.
AVX2 = ("avx2", "fma3", "f16c")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
NEEDS = {"avx512bf16": (*AVX512, "avx512_bf16"), "avx512": AVX512, "avx2": AVX2, "generic": ()}
CAPABILITY = {"avx512bf16": "avx512", "avx512": "avx512", "avx2": "avx2", "generic": "default"}


def left_out(name: str) -> str | None:
    """Why a library cannot be used here, or None."""
    has = torch.cpu.get_capabilities()
    missing = [need.upper().replace("_", "-") for need in NEEDS[name] if not has.get(need)]
    if missing:
        return f"this processor has no {missing[-1]}"
    if not (library.FOLDER / f"libattlas_{name}.so").exists():
        return "it was not built"
    return None


def usable() -> list[str]:
    """The libraries that can be used here, the best first."""
    return [name for name in NEEDS if left_out(name) is None]


@contextmanager
def use(name: str) -> Iterator[None]:
    """Has attlas use a library, in this process."""
    with mock.patch.object(library, "_isas", return_value=(name,)):
        library.load.cache_clear()
        yield
    library.load.cache_clear()


def in_process(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a new process, in which torch is held to what a library needs."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, ATEN_CPU_CAPABILITY=CAPABILITY[name]),
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(_using, name, function, arguments).result()


def _using(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with use(name):
        loaded = library.load()[1]
        if loaded != name:
            raise RuntimeError(f"the library of {name} must be loaded, got {loaded}")
        return function(*arguments)
