"""The compiled kernels from Python: which library is loaded, and the C structs of attlas.h.

The library is plain C and links to nothing of torch. Work is shared over torch's own threads:
the address of `torch_parallel_for`, of torch's stable C interface, is handed to each call.
"""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

FOLDER = Path(__file__).parent / "lib"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ABI = 2  # ATTLAS_ABI of attlas.h
KEPT_LEAST = 1 << 20  # bytes: below, malloc keeps what is freed
SMALLER = "use fewer heads or keys a call"
NO_MEMORY = f"workspace must fit into memory, got no memory for it; {SMALLER}"
MISFIT = (
    "its library was compiled from other sources than the Python beside it; run `make` in a clone, "
    "or install attlas again"
)
SLOWER = "attlas computes in plain PyTorch, more slowly, since it has no C++ kernels"
_Strides3, _Strides4 = c_int64 * 3, c_int64 * 4


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_int64) for name in names]


class Problem(Structure):
    """attlas_problem: sizes, inputs and options of a call."""

    _fields_ = (
        *_integers("B", "Hq", "Hkv", "L", "S", "E", "Ev", "dtype", "num_threads"),
        ("parallel_for", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        *_pointers("q", "k", "v"),
        ("q_s", _Strides3),
        ("k_s", _Strides3),
        ("v_s", _Strides3),
        *_pointers("start", "stop"),
        ("start_s", _Strides3),
        ("stop_s", _Strides3),
        ("mask", c_void_p),
        ("mask_s", _Strides4),
        ("bias", c_void_p),
        ("bias_s", _Strides4),
        ("sinks", c_void_p),
        ("dropout_p", c_double),
        ("seed", c_uint64),
        ("first_row", c_int64),
    )


class Forward(Structure):
    """attlas_forward_out: what a forward writes."""

    _fields_ = (
        ("output", c_void_p),
        ("output_s", _Strides3),
        ("weights", c_void_p),
        ("weights_s", _Strides3),
        *_pointers("normaliser", "entropy", "max_value", "max_key", "received"),
    )


class Readout(Structure):
    """attlas_readout: what is read later from q, k and the normaliser."""

    _fields_ = (
        ("normaliser", c_void_p),
        *_integers("row0", "row1", "key0", "key1"),
        *_pointers("entropy", "max_value", "max_key", "topk_value", "topk_key"),
        ("k", c_int64),
        *_pointers("received", "received_max", "row_weight", "x"),
        ("F", c_int64),
        *_pointers("wx", "y", "wty"),
        *_integers("cell_rows", "cell_keys"),
        *_pointers("pool_max", "pool_mass", "weights"),
        ("weights_s", _Strides3),
        *_pointers("tile_weights", "tile_scores", "head_mean"),
    )


class Backward(Structure):
    """attlas_backward_args: what a backward reads and writes."""

    _fields_ = (
        *_pointers("output", "normaliser"),
        ("output_s", _Strides3),
        ("d_output", c_void_p),
        ("d_output_s", _Strides3),
        *_pointers("d_lse", "d_entropy", "entropy", "d_received", "row_weight", "d_weights"),
        ("d_weights_s", _Strides3),
        *_pointers("dq", "dk", "dv", "dbias", "dsinks", "minus_rowsum"),
    )


def _isas() -> tuple[str, ...]:
    """The instruction sets to look for: what torch uses of this CPU, the best first."""
    has = torch.cpu.get_capabilities()
    match torch.backends.cpu.get_cpu_capability().upper():
        case "AVX512" | "AVX2" if not has.get("f16c"):
            return ("generic",)  # which torch does not look at, and virtual machines can mask
        case "AVX512" if has.get("avx512_bf16"):
            return "avx512bf16", "avx512"  # an old compiler leaves the first out
        case "AVX512" | "AVX2" as name:
            return (name.lower(),)
    return ("generic",)


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library for this CPU and the name of its instruction set, or None and the reason."""
    isas = _isas()
    paths = {isa: FOLDER / f"libattlas_{isa}.so" for isa in isas}
    isa = next((isa for isa in isas if paths[isa].exists()), None)
    if isa is None:
        note = FOLDER / "missing.txt"
        why = note.read_text().strip() if note.exists() else "install attlas with a C++ compiler"
        return None, why
    try:
        library = ctypes.CDLL(str(paths[isa]))
    except OSError as error:
        return None, f"its library cannot be loaded ({error}); install attlas on this machine"
    if not _fits(library):
        return None, MISFIT
    for name, kind in (("forward", Forward), ("read", Readout), ("backward", Backward)):
        function = getattr(library, "attlas_" + name)
        function.argtypes, function.restype = [POINTER(Problem), POINTER(kind)], c_int
    library.attlas_isa.restype = c_char_p
    library.attlas_release.restype = c_int64
    library.attlas_bytes.argtypes, library.attlas_bytes.restype = [c_int64], c_void_p
    return library, isa


def _fits(library: ctypes.CDLL) -> bool:
    """Whether a library has the functions and structs that are used here."""
    found = (c_int64 * 5)()
    sizes = getattr(library, "attlas_abi", None)  # which the first ones had not
    if sizes is not None:
        sizes.argtypes, sizes.restype = [POINTER(c_int64)], None
        sizes(found)
    structs = (Problem, Forward, Readout, Backward)
    return list(found) == [ABI, *(ctypes.sizeof(struct) for struct in structs)]


def missing() -> str | None:
    """Why there is no library, or None."""
    library, why = load()
    return None if library is not None else why


def warn_missing() -> None:
    """Says, once for a process, that there is no library, and why."""
    reason = missing()
    if reason is not None:
        _warn(f"{SLOWER}: {reason}")


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


for _function in (missing, warn_missing):  # torch.compile asks once, when it traces
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def parallel_for() -> int | None:
    """The address of torch_parallel_for; None (one thread) where this torch has none."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            function = getattr(ctypes.CDLL(path), "torch_parallel_for", None)
            return None if function is None else ctypes.cast(function, c_void_p).value
    return None


def call(name: str, problem: Problem, arguments: Structure) -> None:
    """Runs one of the three functions.

    Raises:
        MemoryError: the workspace could not be had.
    """
    library, why = load()
    if library is None:
        raise RuntimeError(why)
    if getattr(library, "attlas_" + name)(byref(problem), byref(arguments)):
        raise MemoryError(NO_MEMORY)


def fill(struct: Structure, name: str, tensor: Tensor, strides: int) -> None:
    """Puts the address of a tensor, and its first `strides` strides, into a struct."""
    setattr(struct, name, tensor.data_ptr())
    if strides:
        getattr(struct, name + "_s")[:] = tensor.stride()[:strides]


def fresh(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be written. Dense weights get memory that is kept for the next when freed.

    `resize_` cannot make such a tensor longer: memory that comes by DLPack is not torch's to
    allocate again, and torch has no way to say how. `clone()` gives one that it can.

    Raises:
        MemoryError: there is no memory for it.
    """
    library, size = load()[0], math.prod(shape) * dtype.itemsize
    if library is None or name not in ("weights", "tile_weights", "head_mean") or size < KEPT_LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pointer = library.attlas_bytes(size)
    if not pointer:
        raise MemoryError(f"weights must fit into memory, got no {size:,} bytes; {SMALLER}")
    return from_dlpack(_capsule(pointer, b"dltensor", None)).view(dtype).view(shape)


def instructions() -> str | None:
    """The instruction set that the loaded library was compiled for, None without a library."""
    library = load()[0]
    return None if library is None else library.attlas_isa().decode()


def release() -> int:
    """Gives the memory that is kept for the next call to the system; the bytes of it."""
    library = load()[0]
    return 0 if library is None else library.attlas_release()


_capsule = ctypes.pythonapi.PyCapsule_New  # for from_dlpack, which takes the memory over
_capsule.argtypes, _capsule.restype = [c_void_p, c_char_p, c_void_p], ctypes.py_object
