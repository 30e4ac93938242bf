"""The peers: what others offer for the same problem, each as they offer it.

A `Function` prepares a case (inputs, graphs and compilation, none of which is timed) and gives
a callable of no arguments. Where it cannot, it raises `Unsupported` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import WINDOW, Case

Call = Callable[[], Any]


class Unsupported(Exception):
    """Why a function cannot do a case."""


@dataclass(frozen=True)
class Function:
    """A way to compute a case, or a part of it."""

    label: str
    prepare: Callable[[Case], Call]
    gives: str = "output"  # or "output and weights", or "other", which is not compared
    matrices: int = 3  # L x S, that one with dense weights holds at once, at most
    compiles: bool = False  # at the first call, for these sizes
    to_torch: Callable[[Any], Tensor] = lambda result: result

    @property
    def dense(self) -> bool:
        """Whether it gives dense weights."""
        return self.gives == "output and weights"


def additive(case: Case) -> Tensor | None:
    """The mask as 0 and -inf, to be added to scores."""
    allowed = case.allowed()
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=case.torch_dtype).masked_fill(~allowed, -math.inf)


def maybe_backward(case: Case, inputs: tuple[Tensor, ...], forward: Call) -> Call:
    """The forward; with a backward from its output where the case asks for one."""
    if not case.grad:
        return forward
    gradient = torch.ones_like(inputs[0])

    def both() -> Any:
        result = forward()
        output = result if isinstance(result, Tensor) else result[0]
        torch.autograd.grad(output, inputs, gradient)
        return result

    return both


def three_lines(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
    """What everybody writes: scores, softmax, product."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights


def eager(case: Case) -> Call:
    inputs, mask = case.inputs(), additive(case)
    return maybe_backward(case, inputs, lambda: three_lines(*inputs, mask))


def compiled(case: Case) -> Call:
    torch._dynamo.reset()
    inputs, mask = case.inputs(), additive(case)
    fast = torch.compile(three_lines, dynamic=False)
    return maybe_backward(case, inputs, lambda: fast(*inputs, mask))


def sdpa(case: Case) -> Call:
    q, k, v = inputs = case.inputs()
    causal, gqa = case.mask == "causal", case.kv_heads != case.heads
    mask = None if causal else case.allowed()

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )

    return maybe_backward(case, inputs, forward)


def sdpa_backward(case: Case) -> Call:
    inputs = case.inputs()
    output = F.scaled_dot_product_attention(*inputs)
    gradient = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def mha(case: Case) -> Call:
    """The operators of nn.MultiheadAttention(need_weights=True), without its projections."""
    if case.kv_heads != case.heads:
        raise Unsupported("nn.MultiheadAttention has as many key heads as query heads")
    inputs, mask = case.inputs(), additive(case)

    def forward() -> tuple[Tensor, Tensor]:
        q, k, v = (t.flatten(0, 1) for t in inputs)
        scaled, transposed = q * case.size**-0.5, k.transpose(-2, -1)
        if mask is None:
            scores = torch.bmm(scaled, transposed)
        else:
            scores = torch.baddbmm(mask, scaled, transposed)
        weights = torch.softmax(scores, dim=-1)
        output, lead = torch.bmm(weights, v), inputs[0].shape[:2]
        return output.unflatten(0, lead), weights.unflatten(0, lead)

    return maybe_backward(case, inputs, forward)


def flex(case: Case) -> Call:
    if case.grad:
        raise Unsupported("flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, k, v = case.inputs()
    rules = {
        "causal": lambda b, h, query, key: key <= query,
        "padding": lambda b, h, query, key: key < case.keys // 2,
        "window": lambda b, h, query, key: (key <= query) & (key > query - WINDOW),
    }
    mask = None
    if case.mask:
        mask = create_block_mask(
            rules[case.mask], None, None, case.queries, case.keys, device="cpu"
        )
    fast, gqa = torch.compile(flex_attention, dynamic=False), case.kv_heads != case.heads
    return lambda: fast(q, k, v, block_mask=mask, enable_gqa=gqa)


def jax_jit(case: Case) -> Call:
    try:
        import jax
        from jax import numpy as jnp
    except ImportError as error:
        raise Unsupported("jax is not installed") from error
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    jax.config.update("jax_platforms", "cpu")
    q, k, v = (jnp.from_dlpack(t.detach()) for t in case.inputs())
    mask = additive(case)
    mask = None if mask is None else jnp.from_dlpack(mask)

    def three_lines(q: Any, k: Any, v: Any) -> Any:
        if case.kv_heads != case.heads:
            k, v = (jnp.repeat(t, case.heads // case.kv_heads, axis=1) for t in (k, v))
        scores = q @ jnp.swapaxes(k, -2, -1) / math.sqrt(case.size)
        weights = jax.nn.softmax(scores if mask is None else scores + mask, axis=-1)
        return weights @ v, weights

    def both(q: Any, k: Any, v: Any) -> Any:
        output, backward, weights = jax.vjp(three_lines, q, k, v, has_aux=True)
        return output, weights, backward(jnp.ones_like(output))

    fast = jax.jit(both if case.grad else three_lines)
    return lambda: jax.block_until_ready(fast(q, k, v))


def onnx(case: Case) -> Call:
    """The Attention operator of ONNX; qk_matmul_output_mode=3 are the weights."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        raise Unsupported(f"{error.name} is not installed") from error
    if case.grad:
        raise Unsupported("ONNX Runtime runs inference only")
    types = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16"}
    if case.dtype not in types:
        raise Unsupported(f"ONNX Runtime computes no Attention of {case.dtype} on a CPU")
    feeds = dict(zip("qkv", case.inputs(), strict=True))
    if case.mask and case.mask != "causal":
        feeds["mask"] = case.allowed().expand(case.queries, case.keys).contiguous()
    kind = getattr(TensorProto, types[case.dtype])
    node = helper.make_node(
        "Attention", list(feeds), ["output", "", "", "weights"],
        qk_matmul_output_mode=3, is_causal=int(case.mask == "causal"),
    )  # fmt: skip
    kinds = [(name, TensorProto.BOOL if name == "mask" else kind) for name in feeds]
    sizes = {name: list(tensor.shape) for name, tensor in feeds.items()}
    lead = [case.batch, case.heads, case.queries]
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, sizes[name]) for name, kind in kinds],
        [
            helper.make_tensor_value_info("output", kind, [*lead, case.size]),
            helper.make_tensor_value_info("weights", kind, [*lead, case.keys]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on after a call, in the time of whoever is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in feeds.items()}
    return lambda: session.run_with_ort_values(["output", "weights"], values)


def copy(case: Case) -> Call:
    """Copies the keys: as many bytes read and written as reading keys and values once is."""
    key = case.inputs()[1]
    target = torch.empty_like(key)
    return lambda: target.copy_(key)


DENSE = "output and weights"
PEERS = {
    "sdpa": Function("torch SDPA", sdpa),
    "eager": Function("eager, three lines", eager, DENSE),
    "compiled": Function("torch.compile of eager", compiled, DENSE, compiles=True),
    "mha": Function("MultiheadAttention core", mha, DENSE),
    "jax": Function("JAX jit", jax_jit, DENSE, compiles=True, to_torch=torch.from_dlpack),
    "onnx": Function(
        "ONNX Runtime Attention",
        onnx,
        DENSE,
        to_torch=lambda value: torch.from_numpy(value.numpy()),
    ),
    "flex": Function("flex_attention", flex, compiles=True),
    "sdpa_backward": Function("torch SDPA, backward alone", sdpa_backward, "other"),
    "copy": Function("copy of the keys", copy, "other"),
}
