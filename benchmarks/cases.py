"""What is measured: named models, sweeps, and the cases of the project's goals. Data only.

A case is a problem (sizes, dtype, mask), the functions that are timed on it in turn, and those
whose memory is measured. The functions are in `peers` and `ours`, by these names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 256  # keys that a query of mask="window" sees, its own the last of them


@dataclass(frozen=True)
class Case:
    """One problem, `softmax(Q Kᵀ / sqrt(E)) V`, and what is measured on it."""

    group: str  # the table that shows it
    name: str
    functions: tuple[str, ...] = ()  # timed in turn
    memory: tuple[str, ...] = ()  # measured one by one, each in a fresh process
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    queries: int = 1024
    keys: int = 1024
    size: int = 64  # E, of queries, keys and values
    dtype: str = "float32"
    mask: str | None = None  # "causal", "padding" (the last half of the keys) or "window"
    grad: bool = False  # forward and backward
    reuse: bool = False  # malloc keeps what is freed, so that large results get used pages

    @property
    def scores(self) -> int:
        """The number of scores, and of weights."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, the same tensors for every function."""
        return _inputs(self)

    def allowed(self, rows: Tensor | None = None) -> Tensor | None:
        """True where a query may attend, `[L or 1, S]`; of some rows only, or of all."""
        key = torch.arange(self.keys)
        query = (torch.arange(self.queries) if rows is None else rows)[:, None]
        match self.mask:
            case "causal":
                return key <= query
            case "padding":
                return (key < self.keys // 2)[None]
            case "window":
                return (key <= query) & (key > query - WINDOW)
        return None

    def small(self) -> Case:
        """The same problem with few queries and keys, to warm up with."""
        return replace(self, queries=min(self.queries, 16), keys=min(self.keys, 16))


@lru_cache(1)
def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((case.heads, case.queries), *((case.kv_heads, case.keys),) * 2)
    shapes = [(case.batch, *size, case.size) for size in sizes]
    q, k, v = (torch.randn(s, generator=generator).to(case.torch_dtype) for s in shapes)
    return q.requires_grad_(case.grad), k.requires_grad_(case.grad), v.requires_grad_(case.grad)


PEERS = ("sdpa", "eager", "compiled", "mha", "jax", "onnx", "flex")
ALL = ("attention", "dense", *PEERS)
FEW = tuple(name for name in ALL if name != "flex")  # it takes 5 s to compile for each case
OURS = ("fresh", "statistics", "received")
LENGTHS = (4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096, 8192)


def square(group: str, length: int, functions: tuple[str, ...] = ALL, **options) -> Case:
    """A case with as many queries as keys."""
    name = options.pop("name", f"L {length}")
    return Case(group, name, functions, queries=length, keys=length, **options)


def sweep(length: int) -> Case:
    """A case of the sweep over L: what takes longest leaves out the peers beside the goals'."""
    match length:
        case 8192:
            functions = ("attention", "dense", "eager", "sdpa", "onnx", *OURS)
        case _ if length >= 512:
            functions = (*ALL, *OURS)
        case _:
            functions = FEW
    return square("length", length, functions, memory=ALL if length == 4096 else ())


MODELS = [
    square("models", 512, name="BERT-base, padded", heads=12, kv_heads=12, mask="padding"),
    square("models", 1024, name="GPT-2", heads=12, kv_heads=12, mask="causal", memory=ALL),
    square("models", 1024, name="Llama-3-8B", heads=32, size=128, mask="causal"),
    square("models", 1024, name="Llama-3-8B, bfloat16", heads=32, size=128, mask="causal",
           dtype="bfloat16"),
    square("models", 1500, name="Whisper large, encoder", heads=20, kv_heads=20),
    Case("models", "Whisper large, cross", ALL, heads=20, kv_heads=20, queries=448, keys=1500),
    square("models", 197, name="ViT-L/16", batch=8, heads=16, kv_heads=16),
]  # fmt: skip

SWEEPS = [
    *(sweep(length) for length in LENGTHS),
    *(square("head size", 1024, FEW, name=f"E {size}", size=size) for size in (32, 128, 256)),
    *(
        square("dtype", 1024, FEW, name=f"{dtype}, L 1024", dtype=dtype)
        for dtype in ("float64", "float16", "bfloat16")
    ),
    square("dtype", 4096, ("attention", "dense", "sdpa"), name="bfloat16, L 4096",
           dtype="bfloat16"),
    *(
        square("mask", 2048, (*ALL, "unmasked"), name=mask, mask=mask)
        for mask in ("causal", "padding", "window")
    ),
]  # fmt: skip

DECODED = (512, 2048, 4096, 8192, 16384, 32768)  # keys


def decode(keys: int, heads: int, size: int, dtype: str) -> Case:
    """One query, as in generation: keys and values are read once."""
    name = f"S {keys}, E {size}, {heads} heads on 8, {dtype}"
    options = {"heads": heads, "queries": 1, "keys": keys, "size": size, "dtype": dtype}
    return Case("decode", name, ("attention", "sdpa", "copy"), **options)


GOALS = [
    *(square("small, batch 32", length, FEW, batch=32) for length in (16, 32, 64)),
    *(
        square("reused buffers", length, ("dense", "sdpa", "eager"), reuse=True)
        for length in (512, 1024, 2048, 4096)
    ),
    Case("decode", "L 1, S 32768, E 128, 32 heads on 8", (*ALL, "copy"), heads=32, queries=1,
         keys=32768, size=128),
    *(
        decode(keys, heads, size, dtype)
        for dtype in ("float32", "bfloat16")
        for heads in (8, 32)
        for size in (64, 128)
        for keys in DECODED
    ),
    *(
        square("forward and backward", length, functions, grad=True)
        for length, functions in (
            (512, FEW), (1024, (*FEW, "train")),
            (2048, ("attention", "dense", "sdpa", "eager")), (4096, ("attention", "sdpa")),
        )
    ),
    *(
        square("backward alone", length, ("sdpa_backward", "received_backward"), grad=True)
        for length in (1024, 2048)
    ),
    square("memory", 16384, (), memory=("sdpa", "attention", "readouts", "dense", "eager")),
    square("memory", 16384, (), name="L 16384, with gradients", memory=("train",), grad=True),
    Case("memory", "L 64, S 1000000, 1 head", memory=("sdpa", "attention", "entropy_topk"),
         heads=1, kv_heads=1, queries=64, keys=1_000_000),
]  # fmt: skip

CASES = [*MODELS, *SWEEPS, *GOALS]
