"""The house: who imports whom, sizes of files, public docstrings, a fresh `import attlas`."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import attlas
from attlas import cli, compute
from attlas.kernels import blocked, native

from . import helpers

SOURCE = Path(attlas.__file__).parent
ROOT = Path(__file__).parent.parent
FILES = sorted(SOURCE.rglob("*.py"))

# These stand on the public names; everything else is the core.
OUTSIDE = {"__main__", "cli", "demo", "nn", "huggingface", "distributed", "view"}
OPTIONAL = {
    "numpy",
    "scipy",
    "transformers",
    "matplotlib",
    "rich",
    "PIL",
    "huggingface_hub",
    "tokenizers",
}
# What a function of the core imports when it is called, from an extra that its error names.
EXTRA = {"attlas.flow": {"scipy"}}
# What a kernel may know. `statistics` and `fused` hold what a kernel computes, or calls.
KERNEL_MAY = {
    "spec",
    "blocks",
    "block_weights",
    "masks",
    "checks",
    "dropout",
    "fused",
    "statistics",
    "vjp",
}
# A file that is longer says here why.
# All rules of masks stand together, each beside its bounds.
LONGER = {"statistics.py": 500, "masks.py": 550}


def module_of(path: Path) -> str:
    """ "attlas.kernels.blocked", and "attlas.kernels" for its `__init__`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """The absolute names of what a file imports, modules of attlas as finely as possible."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(SOURCE.parent).parent.parts)
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{name}.{alias.name}"
                found.add(full if full in MODULES else name)
    return found


def is_outside(module: str) -> bool:
    return module.startswith("attlas.") and module.split(".")[1] in OUTSIDE


CORE = [name for name in MODULES if not is_outside(name)]

PUBLIC = {"attlas", "attlas.masks", "attlas.statistics"}
REPORTS = {
    "attlas.cli": {"attlas.kernels", "attlas.kernels.native"},  # `attlas info` tells of them
    "attlas.huggingface.saving": {"attlas.encoding"},  # a file holds what an operator takes
}


def test_the_parser_of_imports_sees_what_is_there():
    """The tests below would pass with a parser that sees nothing."""
    assert "attlas.kernels.blocked" in imports(SOURCE / "compute.py")
    assert "attlas.spec" in imports(SOURCE / "kernels" / "blocked.py")
    assert "torch" in imports(SOURCE / "spec.py")
    assert {"attlas.attention", "attlas.kernels.reference", "attlas.masks"} <= set(CORE)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("attlas.kernels.")])
def test_kernels_know_the_specification_and_never_each_other(module):
    own = ".".join(module.split(".")[:3])
    for name in imports(MODULES[module]):
        if name.split(".")[0] == "attlas" and not f"{name}.".startswith(f"{own}."):
            known = name.split(".")[1] if "." in name else name
            assert known in KERNEL_MAY, f"{module}: {name}"


def test_the_guide_says_which_functions_a_kernel_has():
    """Each signature in the section on kernels is that of the code, and no function is left out."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    section = guide.split("## Add a kernel")[1].split("\n## ")[0]
    told = dict(re.findall(r"^    (\w+)\((.*?)\) -> ", section, re.MULTILINE))
    assert set(told) == {"forward", "backward", "read", "read_backward", "unsupported_reason"}
    for name, parameters in told.items():
        function = getattr(native, name)
        assert parameters.split(", ") == list(inspect.signature(function).parameters), name
        assert hasattr(blocked, name) == (name != "unsupported_reason")
    for kernel in compute.KERNELS.values():
        assert set(kernel.DIFFERENTIATES) <= set(compute.FOUND)
    for name in ("forward", "backward"):  # `blocked` leaves the others to streaming
        assert told[name].split(", ") == list(inspect.signature(getattr(blocked, name)).parameters)
    for module, name in ((compute, "KERNELS"), (cli, "IMPLEMENTATIONS"), (helpers, "KERNELS")):
        assert f"{name}`" in section
        assert hasattr(module, name)


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_torch_alone(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        known = {"torch", "attlas", *sys.stdlib_module_names} | EXTRA.get(module, set())
        assert top in known, f"{module} imports {name}"
        assert top not in OPTIONAL or module in EXTRA
        # `attlas` itself is the list of all public names.
        above = is_outside(name) and module != "attlas"
        assert not above, f"{module} imports {name}, which stands on it"


@pytest.mark.parametrize("module", [m for m in MODULES if is_outside(m)] or [None])
def test_what_stands_on_attlas_uses_public_names_only(module):
    if module is None:
        return
    home = ".".join(module.split(".")[:2])
    path = MODULES[module]
    for name in imports(path):
        if name.split(".")[0] == "attlas" and not is_outside(name):
            assert name in PUBLIC | REPORTS.get(module, set()), f"{module}: {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not (node.value.id == "attlas" and private), f"{home}: attlas.{node.attr}"


def test_no_import_cycles():
    graph = {m: imports(p, top_level_only=True) & set(MODULES) - {m} for m, p in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                # A package that is imported for one of its modules is no edge back to itself.
                if not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_reference_is_short_enough_to_be_believed():
    assert lines(SOURCE / "kernels" / "reference.py") < 120


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_too_long(path):
    assert lines(path) < LONGER.get(path.name, 450)


def public() -> dict[str, object]:
    """Every public function, and every public method of a public class."""
    found: dict[str, object] = {}
    for owner in (attlas, attlas.masks, attlas.nn):
        for name, value in vars(owner).items():
            home = getattr(value, "__module__", "")
            ours = home == owner.__name__ or (
                owner is not attlas.masks and home.startswith(f"{owner.__name__}.")
            )
            if inspect.isfunction(value) and not name.startswith("_") and ours:
                found[f"{owner.__name__}.{name}"] = value
    for name, value in inspect.getmembers(attlas.AttentionWeights):
        if inspect.isfunction(value) and not name.startswith("_"):
            found[f"AttentionWeights.{name}"] = value
    return found


@pytest.mark.parametrize("name", public())
def test_a_public_function_says_what_it_takes_gives_and_refuses(name):
    function = public()[name]
    text = inspect.getdoc(function) or ""
    assert text.splitlines(), f"{name} has no docstring"
    assert text.splitlines()[0].rstrip().endswith((".", ":", ";", "`")), (
        "the first line is a sentence"
    )
    if not name.startswith("AttentionWeights"):
        parameters = inspect.signature(function).parameters
        mentioned = "Args:" in text or all(p in text for p in parameters)
        assert mentioned, f"{name}: Args is missing"
        assert "Raises:" in text or not parameters, f"{name}: Raises is missing"
    if function in (attlas.attention, attlas.scaled_dot_product_attention):
        assert "Returns:" in text
        assert "Example:" in text
        assert all(f"{p}:" in text for p in inspect.signature(function).parameters)


def test_torch_is_the_only_runtime_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [d.split(">")[0].strip() for d in project["dependencies"]] == ["torch"]


# --- fresh processes --------------------------------------------------------------------


def fresh(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_and_use_with_the_optional_packages_blocked():
    """torch itself warns when numpy is missing: that, and only that, is allowed."""
    assert (
        fresh(
            f"""
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*[Nn]um[Pp]y.*")
for name in {sorted(OPTIONAL)!r}:
    sys.modules[name] = None
import torch
import attlas
q = torch.randn(1, 2, 5, 4, requires_grad=True)
output, weights = attlas.attention(q, q, q, is_causal=True)
(output.sum() + weights.entropy().sum()).backward()
weights[0, 1, 2:4], weights.topk(2), weights.received(), weights @ q
attlas.scaled_dot_product_attention(q, q, q, torch.ones(5, 5))
print(sorted(set({sorted(OPTIONAL)!r}) & {{n for n, m in sys.modules.items() if m}}))
"""
        ).strip()
        == "[]"
    )


def test_importing_attlas_imports_nothing_optional():
    names = fresh(
        "import torch, sys; a = set(sys.modules); import attlas; print(*sys.modules.keys() - a)"
    )
    loaded = {name.split(".")[0] for name in names.split()}
    assert not loaded & (OPTIONAL | {"hypothesis", "pytest"})
    assert "attlas" in loaded


def test_import_takes_no_more_than_150_ms_over_torch():
    """In one of several processes, in processor time: a busy machine only adds to it."""
    code = """
import time, torch
start = time.process_time()
import attlas
print(time.process_time() - start)
"""
    fresh(code)  # writes the bytecode
    assert any(float(fresh(code)) <= 0.15 for _ in range(5))


SEEDED = '''
import torch

def draw():
    """
    >>> torch.initial_seed()
    0
    >>> first = torch.randn(3)
    """

def draw_again():
    """
    >>> torch.initial_seed(), torch.equal(torch.randn(3), torch.manual_seed(0) and torch.randn(3))
    (0, True)
    """
'''


def test_every_example_draws_from_a_fixed_seed(tmp_path):
    """In a process that was seeded otherwise, under the conftest of this repository."""
    (tmp_path / "examples.py").write_text(SEEDED)
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    other = "import sys, torch, pytest; torch.manual_seed(7); sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", other, "--doctest-modules", "-q", "examples.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
