"""`capture`: the weights, or statistics of them, of chosen layers and heads, in any run.

    with attlas.huggingface.capture(model, layers=[3], heads=[5], reduce="entropy") as run:
        model.generate(...)
    run.calls[0].statistics["entropy"]

While it is open the model runs with `attn_implementation="attlas"`, whatever it was loaded with.
Each call of attention has a stack (its module's name, with * for numbers) and is counted inside
of it, as `outputs.attentions` counts layers: shared modules too, which have one name.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import attlas

from .models import NAME, bypasses

Statistic = Callable[[attlas.AttentionWeights], Any]

TOP = 8  # keys of "topk"

STATISTICS: dict[str, Statistic] = {
    "entropy": lambda weights: weights.entropy(),
    "max": lambda weights: weights.max(),
    "mean_distance": lambda weights: weights.mean_distance(),
    "received": lambda weights: weights.received(),
    "sink_mass": lambda weights: weights.sink_mass(),
    "topk": lambda weights: weights.topk(min(TOP, weights.shape[-1])),
}


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Attributes:
        name: the name of the module in the model.
        stack: the name with * for numbers, the same for all layers of a stack.
        layer: the position among the calls of the stack in one forward.
        step: the forward of the stack that it belongs to, 0 for the first.
        weights: `[B, heads, L, S]`, lazy (a tensor where L is 1); None where they were reduced.
        statistics: what they were reduced to, by name.
    """

    name: str
    stack: str
    layer: int
    step: int
    weights: attlas.AttentionWeights | Tensor | None
    statistics: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it keeps."""
        kept = tree_leaves(self.statistics)
        weights = self.weights
        if isinstance(weights, attlas.AttentionWeights):
            kept += [weights.query, weights.key, weights.bias, weights.sinks, weights.normaliser]
        else:
            kept.append(weights)
        return [tensor for tensor in kept if isinstance(tensor, Tensor)]


@dataclass(eq=False)
class Capture:
    """What `capture` gives: the calls of attention of a run, in order."""

    model: PreTrainedModel
    layers: frozenset[int] | None
    heads: Mapping[int, int | Sequence[int]] | int | Sequence[int] | None
    reduce: dict[str, Statistic]
    within: str
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._counts: Counter[str] = Counter()  # calls of a stack in this forward
        self._steps: Counter[str] = Counter()  # forwards of a stack
        self._depth = 0  # of models in the forward of models
        self._seen: set[int] = set()  # layers
        self._close: list[Callable[[], Any]] = []

    # --- results ------------------------------------------------------------------------

    def of(
        self, layer: int | None = None, stack: str | None = None, step: int | None = None
    ) -> list[Call]:
        """The calls of a layer, of the stacks whose names contain `stack`, of a step."""
        return [
            call
            for call in self.calls
            if layer in (None, call.layer)
            and step in (None, call.step)
            and (stack is None or stack in call.stack)
        ]

    @property
    def stacks(self) -> list[str]:
        """The names of the stacks, in the order of their first calls."""
        return list(dict.fromkeys(call.stack for call in self.calls))

    @property
    def nbytes(self) -> int:
        """The memory that the calls keep, in bytes: each storage once, all of it."""
        kept = (tensor.untyped_storage() for call in self.calls for tensor in call.tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        return f"Capture({len(self.calls)} calls of {self.stacks}, {self.nbytes / 1e6:.3g} MB)"

    # --- the run ------------------------------------------------------------------------

    def __enter__(self) -> Capture:
        config = self.model.config
        parts = {name: getattr(config, name, None) for name in config.sub_configs}
        before = {n: part._attn_implementation for n, part in parts.items() if part is not None}
        before[""] = config._attn_implementation
        if set(before.values()) != {NAME}:
            self.model.set_attn_implementation(NAME)
            self._close.append(lambda: self.model.set_attn_implementation(before))
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                self._close.append(_Forward.install(module, self))
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        while self._close:
            self._close.pop()()
        absent = sorted((self.layers or set()) - self._seen)
        if absent and self._seen:
            warnings.warn(
                f"layers must be from 0 to {max(self._seen)}, got {absent}; nothing was kept of "
                "those, which did not run",
                stacklevel=2,
            )

    def start(self) -> None:
        """The forward of a model begins."""
        if not self._depth:
            self._counts.clear()
        self._depth += 1

    def stop(self) -> None:
        """The forward of a model has ended."""
        self._depth -= 1

    def add(self, module: torch.nn.Module, weights: attlas.AttentionWeights) -> None:
        """Keeps what is wanted of a call; one outside of a forward (recomputed) is not counted."""
        name = self._names.get(id(module))
        if name is None or not self._depth:
            return
        stack = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        layer = self._counts[stack]
        self._counts[stack] += 1
        self._steps[stack] += layer == 0
        if self.within not in name:
            return
        self._seen.add(layer)
        if self.layers is not None and layer not in self.layers:
            return
        heads = self.heads.get(layer) if isinstance(self.heads, Mapping) else self.heads
        if heads is not None:
            weights = weights.select_heads(heads if isinstance(heads, int) else list(heads))
        found = {what: fn(weights) for what, fn in self.reduce.items()}
        kept = None if found else lasting(weights)
        self.calls.append(Call(name, stack, layer, self._steps[stack] - 1, kept, found))


_open: list[Capture] = []
_lock = threading.Lock()


class _Forward:
    """The forward of a model while captures are open: it tells them when it begins and ends.

    Hooks do not run where `model.forward` is called by its name, as in sentence-transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        update_wrapper(self, model.forward)  # transformers reads its signature
        self.own, self.forward = vars(model).get("forward"), model.forward
        self.runs: list[Capture] = []

    @staticmethod
    def install(model: PreTrainedModel, run: Capture) -> Callable[[], None]:
        """One more run of the model; returns what makes it one less, after the last as it was."""
        with _lock:
            forward = vars(model).get("forward")
            if not isinstance(forward, _Forward):
                forward = vars(model)["forward"] = _Forward(model)
            forward.runs.append(run)

        def remove() -> None:
            with _lock:
                forward.runs.remove(run)
                if forward.runs or vars(model).get("forward") is not forward:
                    return
                del vars(model)["forward"]
                if forward.own is not None:
                    vars(model)["forward"] = forward.own

        return remove

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs = list(self.runs)
        for run in runs:
            run.start()
        try:
            return self.forward(*args, **kwargs)
        finally:
            for run in runs:
                run.stop()


def capture(
    model: PreTrainedModel,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | Mapping[int, int | Sequence[int]] | None = None,
    reduce: str | Sequence[str] | Mapping[str, Statistic] | None = None,
    *,
    within: str = "",
) -> Capture:
    """A context in which attention weights of the model are kept, in any run.

    Whether the run is a forward, `generate` or training, and whatever `output_attentions` says; in
    any thread, but one run at a time, or their calls are counted as those of one.
    Without `reduce` the memory is that of query, key and log-sum-exp of the chosen heads,
    2·E + 1 numbers for each position and head (less where heads share keys); with it, that of the
    statistics. `Capture.nbytes` says how much it was.

    Args:
        model: a model of transformers that uses its attention interface, loaded with any
            implementation; inside of the context it has attlas.
        layers: which calls of each stack, counted from 0 as in `outputs.attentions`; None for
            all.
        heads: which heads; or those of each layer, which then are the layers.
        reduce: names out of "entropy", "max", "mean_distance", "received", "sink_mass" and
            "topk" (8 keys), or functions of the weights by name, to keep their results in
            place of the weights.
        within: only modules whose name contains this, such as "encoder_attn".

    Returns:
        A context manager that gives a `Capture`.

    Raises:
        TypeError: model is not a model of transformers, or reduce is a function without a name.
        NotImplementedError: the model, or a model inside of it, bypasses the interface.
        ValueError: a layer is negative, or reduce has an unknown name.

    Warns:
        UserWarning: at the end, when a chosen layer did not run.

    Example:
        >>> import torch, transformers, attlas.huggingface
        >>> config = transformers.BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=4,
        ...     intermediate_size=8)
        >>> model = transformers.BertModel(config).eval()
        >>> with attlas.huggingface.capture(model, layers=[1], heads=[0, 3]) as run:
        ...     _ = model(torch.tensor([[1, 2, 3, 4, 5]]))
        >>> run.calls[0].weights
        AttentionWeights(shape=[1, 2, 5, 5], dtype=torch.float32, lazy, 200 B if dense)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; "
            "pass the model itself, not a pipeline or a wrapper"
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and bypasses(type(part)):
            raise NotImplementedError(
                f"model must use the attention interface of transformers, got "
                f"{type(part).__name__}, which does not; capture another part of it, or load "
                "it with attn_implementation='eager' and read outputs.attentions"
            )
    if isinstance(heads, Mapping) and layers is None:
        layers = list(heads)
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and min(layers, default=0) < 0:
        raise ValueError(
            f"layers must be at least 0, got {min(layers)}; how many there are is known after "
            "the run: count from the first"
        )
    if callable(reduce):
        raise TypeError(
            f"reduce must be names, or functions by name, got {type(reduce).__name__}; name it: "
            "reduce={'mine': fn}"
        )
    names = (reduce,) if isinstance(reduce, str) else () if reduce is None else reduce
    if not isinstance(names, Mapping):
        for name in names:
            if name not in STATISTICS:
                raise ValueError(
                    f"reduce must be out of {sorted(STATISTICS)}, got {name!r}; pass "
                    "{name: function of the weights} for one of your own"
                )
        names = {name: STATISTICS[name] for name in names}
    chosen = None if layers is None else frozenset(layers)
    return Capture(model, chosen, heads, dict(names), within)


def record(module: torch.nn.Module, weights: attlas.AttentionWeights) -> None:
    """Gives the weights of a call to every open capture."""
    for run in _open:
        run.add(module, weights)


def lasting(weights: attlas.AttentionWeights) -> attlas.AttentionWeights | Tensor:
    """The weights in a form that the next steps of a generation leave as it is."""
    if weights.shape[2] == 1:  # one row is smaller than the key that it is read from
        return weights.to_dense()
    query, key = weights.query, weights.key
    if torch.compiler.is_compiling():  # a graph does not tell what will be written to
        return replace(weights, key=key.clone())
    # A static cache gives its own memory as the key, and writes to it again. Inference mode does
    # not tell what was written to.
    changes = key.is_inference() or key._version > 0
    if changes or (_is_part(key) and not key.requires_grad):
        key = key.clone()
    if _is_part(query) and not query.requires_grad:
        query = query.clone()
    return replace(weights, query=query, key=key)


def _is_part(tensor: Tensor) -> bool:
    """True where a tensor keeps more memory than its own, as one of a joint q, k, v does."""
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
