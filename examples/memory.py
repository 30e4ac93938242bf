"""How much memory a call takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import psutil

M_MMAP_THRESHOLD = -3


def peak(function: Callable[[], Any]) -> tuple[Any, float]:
    """What function returns, and by how many MB the process grew at most while it ran."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system at once:
        libc.malloc_trim(0)  # what is kept would not be seen to be taken again
    process, stop = psutil.Process(), Event()
    before = process.memory_info().rss
    sizes = [before]

    def watch() -> None:
        while not stop.wait(0.002):
            sizes.append(process.memory_info().rss)

    thread = Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        stop.set()
        thread.join()
    return result, (max(sizes) - before) / 1e6
