"""Compiles the kernels: one shared library for each instruction set, without torch.

    python build.py [--sanitize] [--isa NAME] [--out FOLDER]

One library each, not one for all: the linker merges inline functions of the C++ library across
objects, so baseline code could end up calling a copy that was compiled for AVX-512.

The compilers are CXX, g++, clang++ and c++: the first that compiles everything is taken. What they
say goes to stderr, warnings too.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("api.cpp", "memory.cpp", "forward.cpp", "readout.cpp", "backward.cpp")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-Wno-unused-function", "-Wno-unknown-warning-option"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of AVX-512's own header: GCC #105593
FLAGS += [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]  # no -ffast-math: inf and NaN carry meaning
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
ISAS = {
    "avx512bf16": AVX512 + " -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma -mf16c",
    "generic": "",
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1"]
SANITIZE += ["-DATTLAS_EMULATE_BF16"]  # so that pairs of bf16 are tested on any processor
COMPILER = "GCC 9 or clang 14, or newer"
MEND = f"install {COMPILER} (Debian: apt install g++), or set CXX, and install attlas again"
JOB_BYTES = 400 << 20  # what a compiler takes for the largest source


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
    compilers = _compilers()
    if not compilers:
        return f"the native kernels need a C++ compiler, found none; {MEND}"
    failed = []
    for compiler in compilers:
        reason = _compile_by(compiler, out, extra, only)
        if reason is None:
            return None
        failed.append(reason)
        print(f"attlas: {reason}", file=sys.stderr)
    return f"the native kernels could not be compiled ({'; '.join(failed)}); {MEND}"


def _compilers() -> list[list[str]]:
    """The commands to try, each a name and its first arguments."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = [[name] for name in ("g++", "clang++", "c++") if shutil.which(name)]
    return [named, *(command for command in found if command != named)] if named else found


def _compile_by(compiler: list[str], out: Path, extra: list[str], only: str | None) -> str | None:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [only] if only else list(ISAS) if x86 else ["generic"]
    with tempfile.TemporaryDirectory(dir=out, prefix="objects-") as folder:
        objects = Path(folder)
        if "avx512bf16" in isas and not only and not _knows_bf16(compiler, objects):
            isas.remove("avx512bf16")

        def compile_one(isa: str, source: str) -> str | None:
            flags = [*FLAGS, *ISAS[isa].split(), *extra, "-c", str(HERE / source)]
            return _run([*compiler, *flags, "-o", str(objects / f"{source}.{isa}.o")])

        with ThreadPoolExecutor(_jobs()) as pool:
            jobs = [pool.submit(compile_one, isa, source) for isa in isas for source in SOURCES]
            for job in as_completed(jobs):
                if job.result():
                    pool.shutdown(cancel_futures=True)
                    return job.result()
        for isa in isas:
            library = out / f"libattlas_{isa}.so"
            temporary = objects / library.name
            linked = [str(objects / f"{source}.{isa}.o") for source in SOURCES]
            reason = _run([*compiler, "-shared", "-pthread", *extra, "-o", str(temporary), *linked])
            if reason:
                return reason
            temporary.replace(library)  # never a library that is half written
    return None


def _knows_bf16(compiler: list[str], folder: Path) -> bool:
    """Whether compiler and assembler know AVX512-BF16; old ones do not."""
    source = folder / "probe.cpp"
    source.write_text('asm("vdpbf16ps %zmm0, %zmm1, %zmm2");\n')
    command = [*compiler, "-mavx512bf16", "-c", str(source), "-o", str(folder / "probe.o")]
    return _run(command, quiet=True) is None


def _run(command: list[str], quiet: bool = False) -> str | None:
    """Runs a compiler, and passes on what it says; returns its first error, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    if done.stderr and not quiet:
        print(done.stderr.strip(), file=sys.stderr)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"{command[0]} failed: {next((ln for ln in lines if 'error' in ln), lines[-1]).strip()}"


def _jobs() -> int:
    """As many compilers at a time as this process has processors and the machine has memory."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    free = [_kilobytes("/proc/meminfo", "MemAvailable:") * 1024]
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    free += [int(text) for text in map(_text, limits) if text.isdigit()]
    return max(1, min(processors, *(size // JOB_BYTES for size in free if size)))


def _kilobytes(path: str, name: str) -> int:
    """The number beside a name in a file of /proc, 0 where there is none."""
    found = [line.split()[1] for line in _text(path).splitlines() if line.startswith(name)]
    return int(found[0]) if found else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compiles the native kernels.")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument("--isa", choices=ISAS, help="one instruction set; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "lib")
    options = parser.parse_args()
    sys.exit(build(options.out, options.sanitize, options.isa))
