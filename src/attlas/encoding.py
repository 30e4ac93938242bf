"""A call as operators of torch.library take it: tensors, integers and floats.

    ScoreSpec  <->  tensors, code, scale, softcap, dropout_p, seed
    Statistic  <->  name, integers, floats, tensors

A mask is written in prefix notation: the place of its kind in RULES, its integers, and its
tensors on a list of their own, behind them the heads of a dropout that is about some of them; the
shape is read off query and key. What only Python can hold (a mask or a statistic of a function) is
a number that finds it while it lives; `without_objects` makes tensors of such masks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import checks, divergence, statistics
from .blocks import Shape, whole
from .divergence import Beside, CrossEntropy
from .dropout import Dropout
from .masks import (
    Band,
    Combined,
    Dense,
    Documents,
    Intervals,
    Inverted,
    Mask,
    OfHeads,
    Padding,
)
from .spec import ScoreSpec
from .statistics import OverHeads, Statistic

# Files that `attlas.huggingface.save` wrote hold places in this list: a new rule goes to its end.
RULES = (
    "band",
    "padding",
    "documents",
    "dense",
    "and",
    "or",
    "not",
    "heads",
    "object",
    "intervals",
)
UNLIMITED = -1  # a side of a window
ALIGNMENTS = ("upper_left", "lower_right")
OVER_HEADS = "OverHeads "  # before the name of a statistic of the mean of the heads
KINDS: dict[str, type[Any]] = {
    name: kind
    for module in (statistics, divergence)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Statistic)
}

_objects: WeakValueDictionary[int, object] = WeakValueDictionary()


class Encoded(NamedTuple):
    """A specification without its shape, and who computes, in the order of the schemas."""

    tensors: list[Tensor]  # of the masks, then the heads of dropout where it has some
    code: list[int]
    scale: float
    softcap: float | None
    impl: str
    dropout_p: float = 0.0
    seed: Tensor | None = None  # of dropout


def encode(spec: ScoreSpec, impl: str) -> Encoded:
    """The specification as tensors and numbers."""
    tensors: list[Tensor] = []
    code = [ALIGNMENTS.index(spec.alignment), len(spec.masks)]
    for mask in spec.masks:
        code += _write(mask, tensors)
    if spec.dropout is None:
        return Encoded(tensors, code, spec.scale, spec.softcap, impl)
    p, seed, heads = spec.dropout.p, spec.dropout.seed, spec.dropout.heads
    if heads is not None:
        tensors.append(heads)
    return Encoded(tensors, code, spec.scale, spec.softcap, impl, p, seed)


def decode(encoded: Encoded, query: Tensor, key: Tensor) -> ScoreSpec:
    """The specification of `encode`, for these query and key."""
    shape = Shape(query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2])
    numbers, tensors = iter(encoded.code), iter(encoded.tensors)
    alignment, count = ALIGNMENTS[next(numbers)], next(numbers)
    masks = tuple(_read(numbers, tensors) for _ in range(count))
    p, seed, heads = encoded.dropout_p, encoded.seed, next(tensors, None)
    dropout = None if seed is None else Dropout(p, seed, heads)
    return ScoreSpec(shape, encoded.scale, encoded.softcap, masks, alignment, dropout)


def without_objects(spec: ScoreSpec, device: torch.device) -> ScoreSpec:
    """The specification with masks that only Python can hold as intervals or dense tensors.

    A dense one takes what the mask gives: a function of query and key alone gives `[1, 1, L, S]`.
    """
    return replace(spec, masks=tuple(_as_tensors(m, spec.shape, device) for m in spec.masks))


def _as_tensors(mask: Mask, shape: Shape, device: torch.device) -> Mask:
    if _is_of_rules(mask):
        return mask
    start, stop, exact = mask.bounds(shape)
    if exact:
        return Intervals(start, stop)
    return Dense(mask.block(whole(shape), device))


def _is_of_rules(mask: Mask) -> bool:
    """True when the mask is made of tensors and numbers."""
    match mask:
        case Combined(_, _, left, right):
            return _is_of_rules(left) and _is_of_rules(right)
        case Inverted(inner) | OfHeads(inner, _):
            return _is_of_rules(inner)
        case _:
            return isinstance(mask, Band | Padding | Documents | Dense | Intervals)


def objects(args: Sequence[Any]) -> list[object]:
    """What only Python can hold among the arguments of a call, to be kept alive with them."""
    lists = (arg for arg in args if isinstance(arg, list) and _objects)
    return [_objects[n] for numbers in lists for n in numbers if n in _objects]


def holds_objects(args: Sequence[Any]) -> bool:
    """True when an argument of a call, of masks or of a statistic, is a number of `_number_of`."""
    lists = (arg for arg in args if isinstance(arg, list))
    return any(isinstance(n, int) and n < UNLIMITED for numbers in lists for n in numbers)


def _write(mask: Mask, tensors: list[Tensor]) -> list[int]:
    match mask:
        case Band(left, right, alignment):
            sides = [UNLIMITED if side is None else side for side in (left, right)]
            return [RULES.index("band"), *sides, ALIGNMENTS.index(alignment)]
        case Padding(lengths):
            tensors.append(lengths)
            return [RULES.index("padding")]
        case Documents(ids, key_ids):
            tensors.extend((ids, key_ids))
            return [RULES.index("documents")]
        case Dense(tensor):
            tensors.append(tensor)
            return [RULES.index("dense")]
        case Intervals(start, stop):
            tensors.extend((start, stop))
            return [RULES.index("intervals")]
        case Combined(_, symbol, left, right):
            name = "and" if symbol == "&" else "or"
            return [RULES.index(name), *_write(left, tensors), *_write(right, tensors)]
        case Inverted(inner):
            return [RULES.index("not"), *_write(inner, tensors)]
        case OfHeads(inner, heads):
            tensors.append(heads)
            return [RULES.index("heads"), *_write(inner, tensors)]
        case _:
            return [RULES.index("object"), _number_of(mask, "mask")]


def _read(numbers: Iterator[int], tensors: Iterator[Tensor]) -> Mask:
    match RULES[next(numbers)]:
        case "band":
            left, right = (None if side == UNLIMITED else side for side in _two(numbers))
            return Band(left, right, ALIGNMENTS[next(numbers)])
        case "padding":
            return Padding(next(tensors))
        case "documents":
            return Documents(next(tensors), next(tensors))
        case "dense":
            return Dense(next(tensors))
        case "intervals":
            return Intervals(next(tensors), next(tensors))
        case "and":
            left, right = _read(numbers, tensors), _read(numbers, tensors)
            return Combined(operator.and_, "&", left, right)
        case "or":
            left, right = _read(numbers, tensors), _read(numbers, tensors)
            return Combined(operator.or_, "|", left, right)
        case "not":
            return Inverted(_read(numbers, tensors))
        case "heads":
            heads = next(tensors)
            return OfHeads(_read(numbers, tensors), heads)
        case _:
            return _objects[next(numbers)]  # type: ignore[return-value]


def _two(numbers: Iterator[int]) -> tuple[int, int]:
    return next(numbers), next(numbers)


def name(statistic: Statistic) -> tuple[str, list[int], list[float], list[Tensor]]:
    """A statistic: the name of a class of ours, or "", its integers, floats and tensors."""
    kind, numbers, tensors = type(statistic), statistic.numbers(), list(statistic.operands)
    if isinstance(statistic, OverHeads):
        inner, integers, floats, operands = name(statistic.of)
        return OVER_HEADS + inner, integers, floats, operands
    if numbers is None or KINDS.get(kind.__name__) is not kind:
        return "", [_number_of(statistic, "statistic")], [], tensors
    if isinstance(statistic, CrossEntropy) and isinstance(statistic.other, Beside):
        other = statistic.other
        masks, code, scale, softcap, *_ = encode(other.spec, "")
        numbers = (scale, softcap or 0.0, int(other.mean), int(other.biased), *code)
        tensors += masks
    floats = [number for number in numbers if isinstance(number, float | torch.SymFloat)]
    integers: list[Any] = list(numbers[len(floats) :])
    return kind.__name__, integers, floats, tensors


def named(
    kind: str, integers: Sequence[Any], floats: Sequence[float], operands: Sequence[Tensor]
) -> Statistic:
    """The statistic of `name`."""
    if kind.startswith(OVER_HEADS):
        return OverHeads(named(kind.removeprefix(OVER_HEADS), integers, floats, operands))
    if not kind:
        return _objects[integers[0]]  # type: ignore[return-value]
    numbers: tuple[Any, ...] = (*floats, *integers)
    if numbers and issubclass(KINDS[kind], CrossEntropy):
        scale, softcap, mean, biased, *code = numbers
        (query, key, *bias, normaliser) = operands[: 3 + biased]
        masks = list(operands[3 + biased :])
        spec = decode(Encoded(masks, code, scale, softcap or None, ""), query, key)
        tensors = (query, key, bias[0] if bias else None, normaliser)
        return KINDS[kind](Beside(spec, tensors, bool(mean)))
    return KINDS[kind].again(numbers, operands)


def _number_of(thing: object, kind: str) -> int:
    """A number that finds an object while it lives, within this process; no other is below -1."""
    if torch.compiler.is_compiling():
        mend = f"call attlas outside of torch.compile, or use a {kind} that attlas has"
        checks.fail(
            NotImplementedError, kind, "be made of tensors and numbers", type(thing).__name__, mend
        )
    _objects[-id(thing)] = thing
    return -id(thing)
