"""Every check that a user can meet, in one grammar of messages.

    "<argument> must <rule>, got <value>; <what to do>"

TypeError for the wrong kind of object, ValueError for a wrong shape, range, dtype or device,
NotImplementedError for a right call that an implementation cannot do. Checks run before
anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(kind: type[Exception], argument: str, rule: str, got: object, mend: str) -> NoReturn:
    """Raises `kind` with a message in the grammar of this module."""
    raise kind(f"{argument} must {rule}, got {got}; {mend}")


def shape_of(tensor: Tensor) -> str:
    """The shape as a user writes it, `[2, 3]`."""
    return str(list(tensor.shape))


def is_one_of(size: int, *sizes: int) -> bool:
    """`size in sizes`, also for the symbolic sizes of torch.compile, on which `in` is wrong."""
    return any(size == other for other in sizes)


def qkv(query: Any, key: Any, value: Any, enable_gqa: bool, names: Sequence[str]) -> None:
    """Checks the three inputs of attention: kind, dtype, device and shapes."""
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        alike = query.dtype == key.dtype == value.dtype and query.dtype in FLOATS
        cpu = query.is_cpu and key.is_cpu and value.is_cpu
        dense = query.layout == key.layout == value.layout == torch.strided
        dense = dense and not (query.is_nested or key.is_nested or value.is_nested)
        if alike and dense and (cpu or query.device == key.device == value.device):
            a, b, c = query.shape, key.shape, value.shape
            if a == b == c and len(a) > 1 and a[-1]:
                return  # the most common case, at once
            if len(a) > 1 and a[:-2] == b[:-2] and b[:-1] == c[:-1] and a[-1] == b[-1] > 0:
                return  # the common case, too
    q, k, v = names
    for name, tensor in zip(names, (query, key, value), strict=True):
        if not isinstance(tensor, Tensor):
            mend = f"convert it with torch.as_tensor({name})"
            fail(TypeError, name, "be a torch.Tensor", type(tensor).__name__, mend)
        if tensor.layout != torch.strided or tensor.is_nested:
            got = "a nested one" if tensor.is_nested else tensor.layout
            mend = f"convert it with {name}.to_dense(), or pad a nested one"
            fail(ValueError, name, "be a dense tensor", got, mend)
    if query.dtype not in FLOATS:
        mend = f"convert it with {q}.float()"
        fail(ValueError, q, "be float16, bfloat16, float32 or float64", query.dtype, mend)
    for name, tensor in ((k, key), (v, value)):
        if tensor.dtype != query.dtype:
            mend = f"convert it with {name}.to({q}.dtype)"
            fail(ValueError, name, f"have the dtype of {q}, {query.dtype}", tensor.dtype, mend)
        if tensor.device != query.device:
            mend = f"move it with {name}.to({q}.device)"
            fail(ValueError, name, f"be on the device of {q}, {query.device}", tensor.device, mend)
        if tensor.ndim != query.ndim:
            got = f"{tensor.ndim} ({shape_of(tensor)})"
            mend = "give query, key and value the same leading dimensions"
            fail(ValueError, name, f"have the {query.ndim} dimensions of {q}", got, mend)
    if query.ndim < 2:
        mend = f"add one with {q}.unsqueeze(0)"
        fail(ValueError, q, "have at least 2 dimensions, [L, E]", shape_of(query), mend)
    _sizes(query, key, value, enable_gqa, names)


def _sizes(query: Tensor, key: Tensor, value: Tensor, gqa: bool, names: Sequence[str]) -> None:
    q, k, v = names
    if query.shape[-1] == 0:
        fail(ValueError, q, "have a head size E of at least 1", shape_of(query), "check its shape")
    if key.shape[-1] != query.shape[-1]:
        rule = f"have the head size of {q}, E={query.shape[-1]}"
        mend = f"the last dimensions of {q} and {k} are multiplied: check the projections"
        fail(ValueError, k, rule, shape_of(key), mend)
    if value.shape[:-1] != key.shape[:-1]:
        rule = f"have one row for each key, {list(key.shape[:-1])} before the last dimension"
        mend = f"{k} and {v} must come from the same sequence"
        fail(ValueError, v, rule, shape_of(value), mend)
    if query.ndim > 3 and key.shape[-3] != query.shape[-3] and key.shape[:-3] == query.shape[:-3]:
        _groups(query, key, gqa, k)
    elif key.shape[:-2] != query.shape[:-2]:
        rule = f"have the leading dimensions of {q}, {list(query.shape[:-2])}"
        fail(ValueError, k, rule, shape_of(key), f"expand it with {k}.expand(...)")


def _groups(query: Tensor, key: Tensor, gqa: bool, name: str) -> None:
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if not gqa:
        call = "pass" if name == "key" else "call attlas.attention with"
        mend = f"{call} enable_gqa=True for grouped-query attention"
        fail(ValueError, name, f"have as many heads as query, {heads}", kv_heads, mend)
    if kv_heads == 0 or heads % kv_heads:
        mend = "each key head serves a whole group of query heads"
        fail(ValueError, name, f"have a number of heads that divides {heads}", kv_heads, mend)


def dimensions(query: Tensor) -> None:
    """Checks that `attention` got [B, H, L, E], [B, L, E] or [L, E]."""
    if query.ndim > 4:
        rule = "be [B, H, L, E], [B, L, E] or [L, E]"
        mend = "flatten the leading dimensions into B with query.flatten(0, -4)"
        fail(ValueError, "query", rule, shape_of(query), mend)


def zero_one(name: str, mask: Any) -> Tensor:
    """The mask as bool, after a check that each value is 0 or 1."""
    if not isinstance(mask, Tensor):
        mend = "pass torch.as_tensor(mask), or a rule from attlas.masks"
        fail(TypeError, name, "be a tensor or a mask of attlas.masks", type(mask).__name__, mend)
    if mask.layout != torch.strided:
        mend = f"convert it with {name}.to_dense()"
        fail(ValueError, name, "be a dense tensor", mask.layout, mend)
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        mend = f"convert it with {name} != 0"
        fail(ValueError, name, "be bool, integer or floating", mask.dtype, mend)
    allowed, rule = mask != 0, "hold only 1 (attend) and 0 (masked)"
    if mask.is_floating_point() and mask.numel():
        _no_additive_mask(name, allowed)
    if not later(name, rule, allowed.to(mask.dtype) == mask) and not torch.equal(
        allowed.to(mask.dtype), mask
    ):
        wrong = mask[(mask != 0) & (mask != 1)].flatten()[0].item()
        mend = "values that are added to the scores go in bias= of attlas.attention"
        fail(ValueError, name, rule, wrong, mend)
    return allowed


def _no_additive_mask(name: str, allowed: Tensor) -> None:
    """Checks that a floating mask is not 0 everywhere: added to the scores it would allow all."""
    rule = "hold a 1 (attend) where it is floating"
    if not later(name, rule, allowed.any()) and not bool(allowed.any()):
        mend = f"one that is added goes in bias=, and {name}.bool() allows nothing"
        fail(ValueError, name, rule, "zeros only", mend)


def later(name: str, rule: str, holds: Tensor) -> bool:
    """True under torch.compile, which knows no values yet: the graph itself checks all of `holds`.

    It raises RuntimeError there, on a GPU as an assertion of the device.
    """
    if not torch.compiler.is_compiling():
        return False
    torch.ops.aten._assert_async.msg(holds.all(), f"{name} must {rule}")
    return True


def mask_dimensions(name: str, shape: Sequence[int], ndim: int) -> None:
    """Checks that a mask has dimensions that can only be read in one way."""
    if len(shape) in (0, 1, 2, ndim):
        return
    got = f"{list(shape)}"
    if ndim == 4 and len(shape) == 3:
        rule = "have 2 or 4 dimensions, [L, S] or [B, H, L, S]"
        mend = f"write {name}.unsqueeze(1) for [B, L, S], {name}.unsqueeze(0) for [H, L, S]"
    else:
        rule = f"have 2 or {ndim} dimensions, as query has {ndim}"
        mend = "its last two dimensions are [L, S], those before as in query"
    fail(ValueError, name, rule, got, mend)


def broadcastable(name: str, shape: Sequence[int], full: Sequence[int]) -> None:
    """Checks that `shape` broadcasts to `full`, [..., L, S]."""
    pairs = zip(reversed(shape), reversed(full), strict=False)
    if all(is_one_of(size, 1, target) for size, target in pairs):
        return
    mend = "its last two dimensions are [L, S]: queries, then keys"
    batch, keys = full[0], full[-1]
    if full[-1] != full[-2] and list(shape[-2:]) == [full[-1], full[-2]]:
        mend = f"it looks transposed: write {name}.mT"
    elif list(shape) == [batch, keys] and len(full) > 2:
        view = ", ".join([":"] + ["None"] * (len(full) - 2) + [":"])
        mend = f"a padding mask [B, S] is {name}[{view}], or use attlas.masks.padding(lengths)"
    fail(ValueError, name, f"broadcast to [..., L, S] = {list(full)}", list(shape), mend)


def same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Checks that an option lies on the device of query."""
    if tensor.device != device:
        mend = f"move it with {name}.to(query.device)"
        fail(ValueError, name, f"be on the device of query, {device}", tensor.device, mend)


def float_tensor(name: str, value: Any, query: Tensor, mend: str) -> None:
    """Checks an option that is a floating tensor beside query."""
    if not isinstance(value, Tensor):
        fail(TypeError, name, "be a floating tensor", type(value).__name__, mend)
    if value.dtype not in FLOATS:
        fail(ValueError, name, "be a floating tensor", value.dtype, mend)
    if value.dtype == torch.float64 and query.dtype != torch.float64:
        cast = f"convert it with {name}.to(query.dtype)"
        fail(ValueError, name, f"not be wider than query, {query.dtype}", value.dtype, cast)
    same_device(name, value, query.device)


def at_least_zero(name: str, weights: Tensor) -> None:
    """Checks that weights, a tensor, are not negative."""
    rule, weights = "hold weights of at least 0", weights.detach()
    if later(name, rule, ~(weights < 0)):
        return
    least = weights.min().item() if weights.numel() else 0.0
    if least < 0:
        fail(ValueError, name, rule, least, "weights, not scores or logarithms, are meant")


def sinks(value: Any, query: Tensor, heads: int) -> None:
    """Checks sinks, one logit for each query head."""
    mend = "pass one logit for each query head"
    float_tensor("sinks", value, query, mend)
    if value.shape != (heads,):
        fail(ValueError, "sinks", f"have shape [Hq] = [{heads}]", shape_of(value), mend)


def number(name: str, value: Any, *, positive: bool, mend: str) -> None:
    """Checks a finite (and positive) Python number; `mend` says which one to pass instead."""
    rule = "be a positive finite number" if positive else "be a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(TypeError, name, rule, type(value).__name__, "pass a Python float")
    if not abs(value) < math.inf or (positive and value <= 0):
        fail(ValueError, name, rule, value, mend)


def in_range(name: str, value: float, query: Tensor, *, positive: bool) -> None:
    """Checks that a number has a value in the dtype of sums, float32 or float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    limits, size = torch.finfo(dtype), abs(value)
    if size > limits.max or (positive and size < limits.tiny):
        rule, mend = (
            f"be within the range of {dtype}",
            "pass None for the default, or float64 inputs",
        )
        fail(ValueError, name, rule, value, mend)


def probability(name: str, value: Any) -> None:
    """Checks a Python number from 0 to 1."""
    rule, mend = "be a number from 0 to 1", "it is the chance that a weight is dropped"
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(TypeError, name, rule, type(value).__name__, mend)
    if not 0 <= value <= 1:
        fail(ValueError, name, rule, value, mend)


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> None:
    """Checks a Python int in a range."""
    kind = not isinstance(value, bool) and isinstance(value, int)
    if kind and value >= least and (most is None or value <= most):
        return  # before the limits are written, which fixes the symbolic sizes of torch.compile
    limits = f"at least {least}" if most is None else f"from {least} to {most}"
    if not kind:
        fail(TypeError, name, f"be an int {limits}", type(value).__name__, "pass a Python int")
    fail(ValueError, name, f"be {limits}", value, "choose a value in that range")


def flag(name: str, value: Any) -> None:
    """Checks a bool."""
    if not isinstance(value, bool):
        kind = type(value)
        got = (
            kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        )
        fail(TypeError, name, "be True or False", got, f"pass bool({name})")


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    """Checks a word out of a few."""
    options = tuple(options)
    if value not in options:
        words = ", ".join(map(repr, options[:-1])) + f" or {options[-1]!r}"
        fail(ValueError, name, f"be {words}", repr(value), "choose one of these")


def window(name: str, value: Any) -> None:
    """Checks a (left, right) window of keys beyond the own position."""
    rule, mend = "be (left, right), each an int >= 0 or None", "None means unlimited"
    if not isinstance(value, tuple | list) or len(value) != 2:
        fail(TypeError, name, rule, repr(value), mend)
    for side in value:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            fail(TypeError, name, rule, repr(value), mend)
        if side is not None and side < 0:
            fail(ValueError, name, rule, repr(value), mend)


def integers(
    name: str, value: Any, *, ndim: int | tuple[int, ...], shape: str, least: int | None = None
) -> None:
    """Checks an integer tensor of given dimensions."""
    rule = f"be an integer tensor {shape}"
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        fail(TypeError, name, rule, got, f"pass torch.tensor(...) of dtype int64 as {name}")
    if value.ndim not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        fail(ValueError, name, rule, shape_of(value), "check its dimensions")
    if least is None or later(name, f"be at least {least}", value >= least):
        return
    if value.numel() and int(value.min()) < least:
        fail(ValueError, name, f"be at least {least}", int(value.min()), "check its values")


def batch_size(name: str, size: int, batch: int) -> None:
    """Checks that a mask has one entry for each batch item, or one for all."""
    if not is_one_of(size, 1, batch):
        mend = "pass one for each sequence of the batch"
        fail(ValueError, name, f"have {batch} (the batch size) or 1 entries", size, mend)


def callable_(name: str, value: Any) -> None:
    """Checks a function."""
    if not callable(value):
        fail(TypeError, name, "be callable", type(value).__name__, "pass a function")
