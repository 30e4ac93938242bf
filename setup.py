"""Builds the native CPU kernels beside the package, if there is a C++ compiler.

Everything else about the package is in pyproject.toml. One shared library is made for each
instruction set; torch is not needed to build. Without a compiler the package installs all the
same, and a note in the place of the libraries says what is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("src/attlas/kernels/native")


class BuildWithKernels(build_py):
    """build_py, and the libraries: into the build, or into the tree for an editable install."""

    def run(self) -> None:
        super().run()
        spec = importlib.util.spec_from_file_location("build_native", NATIVE / "build.py")
        assert spec is not None
        assert spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        root = Path("src") if self.editable_mode else Path(self.build_lib)
        self.libraries = root / "attlas/kernels/native/lib"
        reason = builder.build(self.libraries)
        if reason:
            print(f"attlas: {reason}", file=sys.stderr)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = sorted(map(str, self.libraries.glob("*"))) if hasattr(self, "libraries") else []
        return [*super().get_outputs(include_bytecode), *made]


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: any Python, as the libraries are plain C, but one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class WithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
    distclass=WithLibraries,
)
