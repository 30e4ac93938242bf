"""Each compiled library, AVX-512, AVX2 and generic: which is built, taken, and tested.

Tests that are marked `numeric` run with each library that the processor can use, in one process
(see conftest.py), where torch keeps the instructions that it has. Here torch uses less, too, as on
a processor that has less: it can be told so, once for a process. What AVX512-BF16 computes in the
fourth library is emulated under `make sanitize`, on any processor.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import libraries

import attlas
from attlas.kernels import native
from attlas.kernels.native import library

from .helpers import NATIVE

pytestmark = list(NATIVE.marks)

ROOT = Path(__file__).parent.parent
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
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
            library.load.cache_clear()
            assert library.load()[1] == isa
    finally:
        library.load.cache_clear()


def test_a_compiler_without_avx512_bf16_leaves_that_library_out(tmp_path, monkeypatch):
    compiler = tmp_path / "old"
    compiler.write_text("""#!/bin/sh
case "$*" in *-mavx512bf16*) echo "unrecognized -mavx512bf16" >&2; exit 1; esac
while [ "$1" != -o ]; do shift; done; : > "$2"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.build(tmp_path / "lib") is None
    made = {path.name for path in (tmp_path / "lib").iterdir()}
    assert made == {f"libattlas_{isa}.so" for isa in ("avx512", "avx2", "generic")}
    assert "unrecognized" in build.build(tmp_path / "lib", isa="avx512bf16")


def test_without_a_compiler_the_build_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build(tmp_path / "lib") == (tmp_path / "lib" / "missing.txt").read_text().strip()
    monkeypatch.setattr(library, "FOLDER", tmp_path / "lib")
    library.load.cache_clear()
    try:
        assert "need a C++ compiler" in native.unsupported_reason(torch.zeros(1))
        with pytest.raises(NotImplementedError, match="install one"):
            attlas.attention(*[torch.zeros(1, 2)] * 3, impl="native")
        assert attlas.attention(*[torch.zeros(1, 2)] * 3).weights.impl == "blocked"
    finally:
        library.load.cache_clear()
