"""How attention is seen in a model that runs.

Every module of interest gets a `forward` of its own, which notes where the model is. The forwards
of torch's attention modules run as they are, fused "fast path" included, and what they attended
with is computed again from their inputs. In all other modules a TorchFunctionMode sees calls of
F.scaled_dot_product_attention and F.multi_head_attention_forward; it is off inside of torch's
modules, since they leave the fast path where a mode is on.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .captured import Captured
from .heads import Heads, fail, in_heads, of_attention
from .multihead import MultiheadAttention


class Recorder:
    """One open capture: what it wants, where the model is, and what was kept."""

    def __init__(
        self,
        names: dict[torch.nn.Module, str],
        is_chosen: Callable[[str, int], bool],
        heads: tuple[int, ...] | None,
    ) -> None:
        self.names, self.is_chosen, self.heads = names, is_chosen, heads
        self.captured = Captured()
        self.at: list[str | None] = []  # the modules that run now; None: the mode has no say
        self.entered = 0  # forwards so far
        self._met: dict[str, bool] = {}  # modules that attended: are they chosen?

    def keep(self, name: str, heads: Callable[[], Heads]) -> None:
        """Keeps a call of the module of this name, if that is chosen."""
        if name not in self._met:
            self._met[name] = self.is_chosen(name, len(self._met))
        if self._met[name]:
            found = heads()
            found = found if self.heads is None else found.select(self.heads)
            self.captured.keep(name, found)

    def open(self) -> None:
        """Begins to see the calls of this thread."""
        _here.recorders.append(self)
        for module in filter(_is_of_interest, self.names):
            _Forward.install(module)

    def close(self) -> None:
        """Ends; the modules are as they were, when no other capture is open."""
        for module in filter(_is_of_interest, self.names):
            _Forward.remove(module)
        _here.recorders.remove(self)


class _Here(threading.local):
    """The open captures of a thread."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_here = _Here()
_lock = threading.Lock()


class _Forward:
    """The forward of a module while captures are open: it says to them where the model is."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.own = vars(module).get("forward")
        self.beside = None if self.own else _BESIDE.get(type(module).forward)
        self.users = 0

    @staticmethod
    def install(module: torch.nn.Module) -> None:
        """One more capture of the module."""
        with _lock:
            if not isinstance(vars(module).get("forward"), _Forward):
                vars(module)["forward"] = _Forward(module)
            vars(module)["forward"].users += 1

    @staticmethod
    def remove(module: torch.nn.Module) -> None:
        """One less; the module is as it was after the last."""
        with _lock:
            forward = vars(module).get("forward")
            if not isinstance(forward, _Forward):
                return
            forward.users -= 1
            if not forward.users and forward.own is None:
                del vars(module)["forward"]
            elif not forward.users:
                vars(module)["forward"] = forward.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorders = [r for r in _here.recorders if self.module in r.names]
        if not recorders:
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            refuse_compiled(type(self.module).__name__)
        for recorder in recorders:
            recorder.entered += 1
            recorder.at.append(None if self.beside else recorder.names[self.module])
        entered = [recorder.entered for recorder in recorders]
        try:
            with _watching(self.beside is None):
                result = self.forward(*args, **kwargs)
        finally:
            for recorder in recorders:
                recorder.at.pop()
        if self.beside is not None:
            for recorder, before in zip(recorders, entered, strict=True):
                alone = recorder.entered == before
                self.beside(recorder, self.module, alone, *args, **kwargs)
        return result


@contextmanager
def _watching(wanted: bool) -> Iterator[None]:
    """With our mode on, or off if it is not wanted (and no mode of the user's is above)."""
    stack = _get_current_function_mode_stack()
    is_top = bool(stack) and isinstance(stack[-1], _Watch)
    if wanted and not any(isinstance(mode, _Watch) for mode in stack):
        with _Watch():
            yield
    elif is_top and not wanted:
        mode = stack[-1]
        mode.__exit__(None, None, None)
        try:
            yield
        finally:
            mode.__enter__()
    else:
        yield


class _Watch(TorchFunctionMode):
    """Sees the functions of attention that a forward calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            refuse_compiled("a compiled function in it")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _FUNCTIONS:
            heads = partial(_FUNCTIONS[func], *args, **kwargs)
            for recorder in _here.recorders:
                name = recorder.at[-1] if recorder.at else None
                if name is not None:
                    recorder.keep(name, heads)
        return result


def _multi_head(*args: Any, **kwargs: Any) -> Heads:
    """A call of F.multi_head_attention_forward."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    layer = SimpleNamespace(**bound.arguments)
    if layer.static_k is not None or layer.static_v is not None:
        mend = "choose layers without"
        fail(NotImplementedError, "static_k and static_v", "be None", "tensors", mend)
    layer.embed_dim = layer.embed_dim_to_check
    layer.kdim, layer.vdim = layer.key.shape[-1], layer.value.shape[-1]
    if layer.use_separate_proj_weight:
        layer.in_proj_weight = None
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "is_causal")
    return in_heads(layer, *(getattr(layer, name) for name in names), batch_first=False)


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_FUNCTIONS: dict[Any, Callable[..., Heads]] = {
    F.scaled_dot_product_attention: of_attention,
    F.multi_head_attention_forward: _multi_head,
}


# --- torch's own modules: weights beside -------------------------------------------------------


def _beside_multihead(
    recorder: Recorder,
    layer: torch.nn.MultiheadAttention,
    alone: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **_: Any,
) -> None:
    """The weights of a call of nn.MultiheadAttention."""

    def heads() -> Heads:
        if not query.is_nested:
            ours = isinstance(layer, MultiheadAttention)  # torch reads no hint without a mask
            causal = is_causal and (ours or attn_mask is not None)
            masks = key_padding_mask, need_weights and not ours, attn_mask, causal
            return in_heads(layer, query, key, value, *masks, batch_first=layer.batch_first)
        x = query.to_padded_tensor(0.0)
        lengths = torch.tensor([len(t) for t in query.unbind()], device=x.device)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        allowed = (real[:, None, None, :], real[:, None, :, None])
        return in_heads(layer, x, x, x, batch_first=True)._replace(allowed=allowed)

    recorder.keep(recorder.names[layer], heads)


def _beside_encoder_layer(
    recorder: Recorder,
    layer: torch.nn.TransformerEncoderLayer,
    alone: bool,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> None:
    """The weights of a call of nn.TransformerEncoderLayer on its fast path: no module ran in it."""
    if alone:
        x = layer.norm1(src) if layer.norm_first else src
        masks = src_key_padding_mask, False, src_mask, True, is_causal
        _beside_multihead(recorder, layer.self_attn, alone, x, x, x, *masks)


def _nothing_beside(
    recorder: Recorder, layer: torch.nn.Module, alone: bool, *_: Any, **__: Any
) -> None:
    """nn.TransformerEncoder: its layers say it all, but it may only see them without a mode."""


# The forwards that are run as they are. A subclass with its own is seen by the mode.
_BESIDE: dict[Callable[..., Any], Callable[..., None]] = {
    torch.nn.MultiheadAttention.forward: _beside_multihead,
    MultiheadAttention.forward: _beside_multihead,
    torch.nn.TransformerEncoderLayer.forward: _beside_encoder_layer,
    torch.nn.TransformerEncoder.forward: _nothing_beside,
}


def refuse_compiled(what: str) -> None:
    """Raises, when the code that was compiled runs, and not already while dynamo reads it."""
    mend = "capture it before torch.compile or torch.jit"
    fail(NotImplementedError, "module", "be in eager mode", what, mend)


refuse_compiled._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable


def _is_of_interest(module: torch.nn.Module) -> bool:
    """False for the modules of torch that do not attend themselves."""
    ours = type(module).__module__.startswith("torch.nn.modules.")
    return not ours or type(module).forward in _BESIDE
