"""Compiles the kernels: one shared library for each instruction set, without torch.

    python build.py [--sanitize] [--isa NAME] [--out FOLDER]

One library each, not one for all: the linker merges inline functions of the C++ library across
objects, so baseline code could end up calling a copy that was compiled for AVX-512.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("api.cpp", "memory.cpp", "forward.cpp", "readout.cpp", "backward.cpp")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unused-function", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # no -ffast-math: inf and NaN carry meaning
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
ISAS = {
    "avx512bf16": AVX512 + " -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
    "generic": "",
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1"]
SANITIZE += ["-DATTLAS_EMULATE_BF16"]  # so that pairs of bf16 are tested on any processor


def build(out: Path, sanitize: bool = False, isa: str | None = None) -> str | None:
    """Compiles the libraries (or one) into `out`; returns why they could not be made, or None."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / "missing.txt"
    reason = _compile(out, SANITIZE if sanitize else [], isa)
    if reason:
        note.write_text(reason + "\n")
    else:
        note.unlink(missing_ok=True)
    return reason


def _compile(out: Path, extra: list[str], only: str | None) -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        return (
            "the native kernels need a C++ compiler, found none; install one (Debian: apt install "
            "g++), or set CXX, and install attlas again"
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [only] if only else list(ISAS) if x86 else ["generic"]

    def run(arguments: list[str], stdin: str = "") -> str | None:
        command = [compiler, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else f"{compiler} failed: {done.stderr.strip()[-2000:]}"

    if "avx512bf16" in isas and not only:  # left out where compiler or assembler are too old
        probe = ["-mavx512bf16", "-x", "c++", "-c", "-", "-o", str(out / "probe.o")]
        if run(probe, 'asm("vdpbf16ps %zmm0, %zmm1, %zmm2");'):
            isas.remove("avx512bf16")

    def compile_one(job: tuple[str, str]) -> str | None:
        isa, source = job
        target = str(out / f"{source}.{isa}.o")
        flags = [*FLAGS, *ISAS[isa].split(), *extra]
        return run([*flags, "-c", str(HERE / source), "-o", target])

    jobs = [(isa, source) for isa in isas for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [reason for reason in pool.map(compile_one, jobs) if reason]
    for isa in isas if not failed else ():
        objects = [str(out / f"{source}.{isa}.o") for source in SOURCES]
        library = out / f"libattlas_{isa}.so"
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        reason = run(["-shared", "-pthread", *extra, "-o", str(temporary), *objects])
        if reason:
            failed.append(reason)
        else:
            temporary.replace(library)  # never a library that is half written
    for left in out.glob("*.o"):
        left.unlink()
    return failed[0] if failed else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compiles the native kernels.")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument("--isa", choices=ISAS, help="one instruction set; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "lib")
    options = parser.parse_args()
    sys.exit(build(options.out, options.sanitize, options.isa))
