"""What attlas offers: its two functions, and readouts of lazy weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attlas

from .cases import WINDOW, Case
from .peers import DENSE, Call, Function, Unsupported, maybe_backward


def options(case: Case) -> dict[str, Any]:
    """The arguments of `attlas.attention` beside the inputs."""
    chosen: dict[str, Any] = {"enable_gqa": case.kv_heads != case.heads}
    match case.mask:
        case "causal":
            chosen["is_causal"] = True
        case "padding":
            chosen["mask"] = case.allowed()
        case "window":
            chosen["window_size"] = (WINDOW - 1, 0)
    return chosen


def attention(case: Case) -> Call:
    inputs, chosen = case.inputs(), options(case)
    return maybe_backward(case, inputs, lambda: attlas.attention(*inputs, **chosen))


def unmasked(case: Case) -> Call:
    inputs = case.inputs()
    return lambda: attlas.attention(*inputs, enable_gqa=case.kv_heads != case.heads)


def dense(case: Case) -> Call:
    """The teaching function; keys that query heads share are repeated, as it has no option."""
    q, k, v = inputs = case.inputs()
    group, mask = case.heads // case.kv_heads, case.allowed()

    def forward() -> tuple[Tensor, Tensor]:
        if group == 1:
            return attlas.scaled_dot_product_attention(q, k, v, mask)
        key, value = (t.repeat_interleave(group, dim=1) for t in (k, v))
        return attlas.scaled_dot_product_attention(q, key, value, mask)

    return maybe_backward(case, inputs, forward)


def fresh(case: Case) -> Call:
    """As `dense`, in memory that the system has to clear first."""
    call = dense(case)

    def forward() -> tuple[Tensor, Tensor]:
        attlas.empty_cache()
        return call()

    return forward


def statistics(case: Case) -> Call:
    if not hasattr(attlas, "attention_statistics"):
        raise Unsupported("this version of attlas has no attention_statistics")
    inputs, chosen = case.inputs(), options(case)
    asked = ("entropy", "max", "received")
    return lambda: attlas.attention_statistics(*inputs, statistics=asked, **chosen)


def received(case: Case) -> Call:
    return attlas.attention(*case.inputs(), **options(case)).weights.received


def received_backward(case: Case) -> Call:
    q, k, v = case.inputs()
    loss = attlas.attention(q, k, v).weights.received().var()
    return lambda: torch.autograd.grad(loss, (q, k), retain_graph=True)


def readouts(case: Case) -> Call:
    inputs, chosen = case.inputs(), options(case)

    def call() -> Any:
        weights = attlas.attention(*inputs, **chosen).weights
        return weights.entropy(), weights.received(), weights.topk(8)

    return call


def entropy_topk(case: Case) -> Call:
    inputs, chosen = case.inputs(), options(case)

    def call() -> Any:
        weights = attlas.attention(*inputs, **chosen).weights
        return weights.entropy(), weights.topk(8)

    return call


def train(case: Case) -> Call:
    """A step that trains on the weights: two readouts and their gradients."""
    q, k, v = case.inputs()

    def call() -> Any:
        weights = attlas.attention(q, k, v).weights
        return torch.autograd.grad(weights.entropy().mean() + weights.received().var(), (q, k))

    return call


OURS = {
    "attention": Function("attlas attention", attention),
    "dense": Function("attlas scaled_dot_product_attention", dense, DENSE, matrices=2),
    "fresh": Function(
        "attlas scaled_dot_product_attention, fresh memory", fresh, DENSE, matrices=2
    ),
    "statistics": Function("attlas attention_statistics", statistics),
    "unmasked": Function("attlas attention, unmasked", unmasked, "other"),
    "received": Function("received() alone", received, "other"),
    "readouts": Function("attention, entropy(), received(), topk(8)", readouts, "other"),
    "entropy_topk": Function("attention, entropy(), topk(8)", entropy_topk, "other"),
    "train": Function("gradients of entropy().mean() + received().var()", train, "other"),
    "received_backward": Function("backward of received().var() alone", received_backward, "other"),
}
