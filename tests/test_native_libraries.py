"""Each compiled library, AVX-512, AVX2 and generic: which is built, taken, and tested.

Tests that are marked `numeric` run with each library that the processor can use, in one process
(see conftest.py), where torch keeps the instructions that it has. Here torch uses less, too, as on
a processor that has less: it can be told so, once for a process. What AVX512-BF16 computes in the
fourth library is emulated under `make sanitize`, on any processor.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import libraries

import attlas
from attlas import cli
from attlas.kernels import native
from attlas.kernels.native import library

from .helpers import NATIVE

pytestmark = list(NATIVE.marks)

ROOT = Path(__file__).parent.parent
INSTALLED, ISA = library.FOLDER, library.load()[1]
_spec = importlib.util.spec_from_file_location("build", Path(native.__file__).parent / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

INFO = "import sys; from attlas.cli import main; sys.exit(main(['info']))"
# The tests that compare errors with those of plain PyTorch, which change with its instructions.
TESTS = [f"tests/test_{name}.py" for name in ("nn", "verify", "huggingface_real", "weights")]
CAPABILITIES = {"avx2": "avx2", "default": "generic"}  # as torch names them, and the library


def run(capability: str, *arguments: str) -> str:
    """The output of a Python process in which torch uses an instruction set."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", libraries.NEEDS)
def test_numbers_are_tested_with_a_library(name):
    """Skipped, with the reason, where they are not: which is all that can be done about it."""
    if reason := libraries.left_out(name):
        pytest.skip(f"the numeric tests leave out the library of {name}: {reason}")
    with libraries.use(name):
        loaded, isa = library.load()
        assert isa == loaded.attlas_isa().decode().split()[0] == name


@pytest.mark.numeric
def test_a_numeric_test_runs_with_the_library_of_its_name(request):
    if names := libraries.usable():
        assert library.load()[1] == request.node.callspec.params["compiled"]
        assert library.load()[1] in names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_library_for_less_than_the_processor_has(capability):
    isa = CAPABILITIES[capability]
    path = library.FOLDER / f"libattlas_{isa}.so"
    if not path.exists():
        pytest.skip(f"no library was built for {isa}")
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    info = run(capability, "-c", INFO)
    assert re.search(rf"^cpu +{capability.upper()}, ", info, re.MULTILINE)
    assert re.search(rf"^impl='native' +on cpu: yes, compiled for {isa}$", info, re.MULTILINE)
    found = run(capability, "-m", "pytest", "-m", "numeric and not slow", "-k", isa, *TESTS)
    assert f"kernels: {library.FOLDER}, {isa}\n" in found
    assert " passed" in found
    assert "skipped" not in found


def test_a_processor_with_avx512_bf16_takes_its_library_where_one_was_built(tmp_path, monkeypatch):
    built = library.FOLDER / f"libattlas_{library.load()[1]}.so"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    steps = (
        ("avx512", True, "avx512"),  # alone, as an old compiler leaves it
        ("avx512bf16", True, "avx512bf16"),
        ("avx512bf16", False, "avx512"),
    )
    try:
        for name, has, isa in steps:
            if not (path := tmp_path / f"libattlas_{name}.so").exists():
                shutil.copy(built, path)  # not over one that is loaded: the process would crash
            features = {"avx512_bf16": has, "f16c": True}
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda given=features: given)
            library.load.cache_clear()
            assert library.load()[1] == isa
    finally:
        library.load.cache_clear()


MAKES = 'while [ "$1" != -o ]; do shift; done; : > "$2"'  # what a compiler is asked for


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """Makes scripts the only compilers: each is a name, and what it does before it compiles."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")

    def write(**scripts: str) -> None:
        for name, script in scripts.items():
            path = tmp_path / name.replace("x", "+")
            path.write_text(f"#!/bin/sh\n{script}\n{MAKES}\n")
            path.chmod(0o755)

    return write


def test_a_compiler_without_avx512_bf16_leaves_that_library_out(tmp_path, compilers):
    old = 'case "$*" in *-mavx512bf16*) echo "unrecognized -mavx512bf16" >&2; exit 1; esac'
    compilers(gxx=old)
    assert build.build(tmp_path / "lib") is None
    made = {path.name for path in (tmp_path / "lib").iterdir()}
    assert made == {f"libattlas_{isa}.so" for isa in ("avx512", "avx2", "generic")}
    assert "unrecognized" in build.build(tmp_path / "lib", isa="avx512bf16")


def test_the_next_compiler_is_tried_where_one_fails(tmp_path, compilers, capfd, monkeypatch):
    compilers(gxx='echo "pack.h: error: too old" >&2; exit 1', clangxx='echo "a warning" >&2')
    assert build.build(tmp_path / "lib", isa="generic") is None
    assert (tmp_path / "lib" / "libattlas_generic.so").exists()
    said = capfd.readouterr().err
    assert "attlas: g++ failed: pack.h: error: too old\n" in said
    assert "a warning" in said, "what compilers say is seen, though they succeed"
    monkeypatch.setenv("CXX", "clang++ -a")
    assert build.build(tmp_path / "lib", isa="generic") is None
    assert "too old" not in capfd.readouterr().err


def test_where_all_compilers_fail_each_says_why(tmp_path, compilers, monkeypatch):
    compilers(gxx='echo "error: too old" >&2; exit 1', clangxx="exit 3")
    monkeypatch.setenv("CXX", "nothing-of-that-name")
    reason = build.build(tmp_path / "lib", isa="generic")
    assert reason == (tmp_path / "lib" / "missing.txt").read_text().strip()
    failures = "nothing-of-that-name cannot be run: No such file or directory; "
    failures += "g++ failed: error: too old; clang++ failed: exit status 3"
    assert f"could not be compiled ({failures}); install GCC 9 or clang 14" in reason


def test_no_more_compilers_run_than_processors_and_memory_allow(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 16000000 kB"}
    monkeypatch.setattr(build, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert build._jobs() == 6
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert build._jobs() == 6
    files["/sys/fs/cgroup/memory.max"] = str(2 << 30)
    assert build._jobs() == 5
    files["/proc/meminfo"] = "MemAvailable: 900000 kB"
    assert build._jobs() == 2
    files["/proc/meminfo"] = "MemAvailable: 1 kB"
    assert build._jobs() == 1


COMPILERS = ["g++", *(f"g++-{n}" for n in (9, 10, 11, 13)), "clang++", "clang++-14", "clang++-19"]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers_have_nothing_to_warn_of(compiler):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} is here")
    isa = "avx2" if build.platform.machine().lower() in ("x86_64", "amd64") else "generic"
    flags = [*build.FLAGS, *build.ISAS[isa].split(), "-fsyntax-only", "-Werror"]
    for source in build.SOURCES:
        command = [compiler, *flags, str(build.HERE / source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def other_folder(tmp_path, monkeypatch):
    """A folder in which libraries are looked for, from the first call on."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(library, "FOLDER", folder)
    library.load.cache_clear()
    library._warn.cache_clear()
    yield folder
    library.load.cache_clear()
    library._warn.cache_clear()


def test_without_a_compiler_the_build_says_what_is_missing(tmp_path, monkeypatch, other_folder):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build(other_folder) == (other_folder / "missing.txt").read_text().strip()
    assert "need a C++ compiler" in native.unsupported_reason(torch.zeros(1))
    with pytest.raises(NotImplementedError, match="install GCC 9"):
        attlas.attention(*[torch.zeros(1, 2)] * 3, impl="native")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_auto_says_once_that_there_is_no_library(other_folder):
    (other_folder / "missing.txt").write_text("a reason; a mend\n")
    query = torch.zeros(1, 2)
    with pytest.warns(RuntimeWarning, match=r"more slowly, .*no C\+\+ kernels: a reason; a mend"):
        assert attlas.attention(query, query, query).weights.impl == "blocked"
    attlas.attention(query, query, query)  # a second warning would be an error
    library._warn.cache_clear()
    large = torch.zeros(1, 1024, 4)
    with pytest.warns(RuntimeWarning, match="no C"):
        attlas.scaled_dot_product_attention(large, large, large)
    library._warn.cache_clear()
    compiled = torch.compile(lambda x: attlas.attention(x, x, x).output, fullgraph=True)
    with pytest.warns(RuntimeWarning, match="no C"):
        compiled(query)


def test_auto_is_silent_where_the_library_is_not_what_is_missing(other_folder, monkeypatch):
    meta = torch.zeros(1, 1, 2, 2, device="meta")
    attlas.attention(meta, meta, meta)
    query = torch.zeros(1, 1, 2, 2)
    attlas.attention(query, query, query, impl="blocked")
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "is_tracing", lambda: True)
        assert not native.is_available(query)
    with pytest.warns(RuntimeWarning, match="no C"):  # and so it was not said yet
        attlas.attention(query, query, query)


def test_the_command_line_says_it_in_its_own_words(other_folder, capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "on cpu: yes, chooses 'blocked'" in printed.out


def other_library(folder: Path, change: Callable[[bytes], bytes] = lambda code: code) -> None:
    """The library of this processor, copied with a change."""
    name = f"libattlas_{ISA}.so"
    (folder / name).write_bytes(change((INSTALLED / name).read_bytes()))
    library.load.cache_clear()


def longer(struct: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """A struct with a field more."""
    return type("Longer", (struct,), {"_fields_": [("more", ctypes.c_int64)]})


@pytest.mark.parametrize("name", ["ABI", "Problem", "Forward", "Readout", "Backward"])
def test_a_library_of_other_structs_is_refused(other_folder, monkeypatch, name):
    other_library(other_folder)
    assert library.missing() is None
    mine = getattr(library, name)
    monkeypatch.setattr(library, name, mine + 1 if name == "ABI" else longer(mine))
    library.load.cache_clear()
    assert "compiled from other sources" in library.missing()
    with pytest.raises(NotImplementedError, match="run `make` in a clone, or install attlas again"):
        attlas.attention(*[torch.zeros(1, 2)] * 3, impl="native")


def test_a_library_that_cannot_tell_its_structs_is_refused(other_folder):
    other_library(other_folder, lambda code: code.replace(b"attlas_abi\0", b"attlas_old\0"))
    assert library.missing() == library.MISFIT


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_a_processor_without_half_conversions_takes_the_generic_library(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    has = {"avx512_bf16": True, "f16c": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert library._isas() == ("generic",)
    has["f16c"] = True
    assert library._isas()[-1] == capability.lower()


EXPONENTIALS = """
#include "simd.h"
using namespace attlas;
template <class T> void all(T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += VL<T>) store(x + i, vexp<T>(load(x + i)));
}
extern "C" void exp_float32(float* x, int64_t n) { all(x, n); }
extern "C" void exp_float64(double* x, int64_t n) { all(x, n); }
"""
FEATURES = {"avx512": ("avx512_f", "avx512_dq"), "avx2": ("avx2", "fma3"), "generic": ()}


@pytest.fixture(scope="module", params=FEATURES)
def exponential(request, tmp_path_factory):
    """`vexp` as it is compiled for an instruction set, in place."""
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    if not all(torch.cpu.get_capabilities().get(name) for name in FEATURES[request.param]):
        pytest.skip(f"this processor has no {request.param}")
    folder = tmp_path_factory.mktemp("exp")
    (folder / "exp.cpp").write_text(EXPONENTIALS)
    flags = [*build.FLAGS, *build.ISAS[request.param].split(), "-shared", "-fvisibility=default"]
    files = [str(folder / "exp.cpp"), "-I", str(build.HERE), "-o", str(folder / "exp.so")]
    command = [compiler, *flags, *files]
    subprocess.run(command, check=True)
    compiled = ctypes.CDLL(str(folder / "exp.so"))

    def run(x: torch.Tensor) -> torch.Tensor:
        name = str(x.dtype).removeprefix("torch.")
        x = torch.cat([x, x.new_zeros(-len(x) % 16)])  # whole vectors
        compiled[f"exp_{name}"](ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)))
        return x

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_exact_in_its_range(exponential, dtype):
    low, high = (-86.98, 88.72) if dtype == torch.float32 else (-707.9, 709.78)
    x = torch.linspace(low, high, 100_000, dtype=torch.float64).to(dtype)
    exact = x.double().exp()  # of float64 to an ulp of its own
    error = ((exponential(x)[: len(x)].double() - exact) / exact).abs().max()
    assert error <= (1.5 if dtype == torch.float32 else 2.5) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_saturates(exponential, dtype):
    past = math.log(torch.finfo(dtype).max) * (1 + torch.finfo(dtype).eps)
    powers = torch.logspace(3, 38, 100, dtype=torch.float64)
    high = torch.cat([torch.tensor([past, 100.0, 200.0, math.inf]).double(), powers]).to(dtype)
    high = high[high > past]
    assert (exponential(high)[: len(high)] == math.inf).all()
    low = -torch.cat([high, torch.tensor([800.0], dtype=dtype)])
    assert (exponential(low)[: len(low)] == 0).all()


@pytest.mark.parametrize("sign", [0, 1], ids=["+", "-"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_of_a_nan_is_a_nan_whatever_its_payload(exponential, dtype, sign):
    integer, bits = (torch.int32, 23) if dtype == torch.float32 else (torch.int64, 52)
    payloads = [0, 1, 2, 3, 0x100, 0x1FF, 0x7FF, 0xFFF, 1954, (1 << bits) - 1]
    payloads += [1 << bit for bit in range(bits)]
    quiet = torch.finfo(dtype).bits - 1 - bits
    exponent = ((1 << quiet) - 1) << bits
    patterns = [(exponent | p) - (sign << (bits + quiet)) for p in payloads if p]
    x = torch.tensor(patterns, dtype=integer).view(dtype)
    assert x.isnan().all()
    assert exponential(x)[: len(x)].isnan().all()
