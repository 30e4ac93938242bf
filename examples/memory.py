"""How much memory a call takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import psutil


def peak(function: Callable[[], Any]) -> tuple[Any, float]:
    """What function returns, and by how many MB the process grew at most while it ran."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what is free and kept would not be seen to be taken
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
