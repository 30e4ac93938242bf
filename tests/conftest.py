"""Fixtures for every test: each compiled library, small blocks, poisoned memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import pytest
import torch
from benchmarks import libraries

from attlas.kernels.native import library

pytest.register_assert_rewrite("tests.helpers")

# The tests' tensors are small: a second thread gains nothing, and costs much on a busy machine.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "attlas", deadline=None, max_examples=50, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile(
    "short", hypothesis.settings.get_profile("attlas"), max_examples=20
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("attlas")  # another one: pytest --hypothesis-profile=long

# Every budget by which the source cuts a computation into blocks, so small that the tests'
# matrices need several of each kind. A name that is imported by value is set in each module.
SMALL = {"ELEMENTS": 192, "SPAN": 16, "ROWS": 8, "TILE": 4, "MASK_ELEMENTS": 256}


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "the compiled kernels to test (those of `make sanitize`); default: the installed ones"
    parser.addoption("--kernels", type=Path, metavar="FOLDER", help=about)


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--kernels")
    if folder is not None:
        library.FOLDER = folder.resolve()
        library.load.cache_clear()
        if library.load()[0] is None:
            pytest.exit(f"--kernels {folder}: {library.load()[1]}", returncode=1)
    if library.missing() is not None:  # the tests of the rest run all the same
        config.addinivalue_line("filterwarnings", f"ignore:{library.SLOWER}:RuntimeWarning")


def tested() -> list[str]:
    """The libraries for the tests of numbers: the one that is loaded, and those for less."""
    usable, loaded = libraries.usable(), library.load()[1]
    return usable[usable.index(loaded) :] if loaded in usable else []


def pytest_report_header() -> list[str]:
    names = tested()
    left_out = [
        f"{n} ({libraries.left_out(n) or 'torch is held to less'})"
        for n in libraries.NEEDS
        if n not in names
    ]
    numbers = f"numbers are tested with: {', '.join(names) or 'none'}"
    return [
        f"kernels: {library.FOLDER}, {library.load()[1]}",
        f"{numbers}; left out: {', '.join(left_out)}" if left_out else numbers,
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that is marked `numeric` runs with each library."""
    names = tested()
    if names and metafunc.definition.get_closest_marker("numeric"):
        metafunc.parametrize("compiled", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a second library goes only what runs it, and what is not slow."""
    kept, left = [], []
    for item in items:
        (left if _again(item) and (_slow(item) or _elsewhere(item)) else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _again(item: pytest.Item) -> bool:
    return _parameters(item).get("compiled") in tested()[1:]


def _slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _elsewhere(item: pytest.Item) -> bool:
    return _parameters(item).get("impl") in ("reference", "blocked")


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """The library that attlas uses: the one of its parameter, else the one for this processor."""
    with libraries.use(request.param) if hasattr(request, "param") else nullcontext():
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts every computation into many small blocks."""
    unused = set(SMALL)
    for module in [m for name, m in sys.modules.items() if name.startswith("attlas.")]:
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
