"""Executes notebooks of this folder, in place: `python -m examples.execute [name ...]`.

What depends on the machine and the hour is left out: times, versions, paths.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where there are no widgets
    "TRANSFORMERS_VERBOSITY": "error",  # its report of loading has paths
}


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run; the first error of a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        path = FOLDER / f"{name.removesuffix('.ipynb')}.ipynb"
        print(f"executing {path.name}", flush=True)
        nbformat.write(execute(path), path)
