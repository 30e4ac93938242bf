"""Fixtures for every test: a fixed seed, small blocks, poisoned memory."""

from __future__ import annotations

import importlib
import pkgutil

import hypothesis
import pytest
import torch

import attlas

pytest.register_assert_rewrite("tests.helpers")

hypothesis.settings.register_profile(
    "attlas", deadline=None, max_examples=50, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("attlas")

# Every budget by which the source cuts a computation into blocks, so small that the tests'
# matrices need several of each kind. A name that is imported by value is set in each module.
SMALL = {"ELEMENTS": 192, "SPAN": 16, "ROWS": 8, "TILE": 4, "MASK_ELEMENTS": 256}


def attlas_modules() -> list:
    """The modules of the core that are or can be imported."""
    names = [
        info.name
        for info in pkgutil.walk_packages(attlas.__path__, "attlas.")
        if info.name.count(".") == 1 or info.name.startswith("attlas.kernels.")
    ]
    optional = {"attlas.cli", "attlas.demo", "attlas.huggingface", "attlas.view"}
    return [importlib.import_module(name) for name in names if name not in optional]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts every computation into many small blocks."""
    unused = set(SMALL)
    for module in attlas_modules():
        for name, value in SMALL.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
                unused.discard(name)
    assert not unused, f"{unused} are not in the source: mend SMALL, or blocks are not small"


@pytest.fixture
def poison():
    """Memory that nobody wrote holds NaN (or the largest integer), so that reading it shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
