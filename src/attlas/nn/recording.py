"""`capture`: lazy weights of what a model computes with torch's own attention.

    with attlas.nn.capture(model) as captured:
        model(x)
    captured["encoder.layers.3.self_attn"][0].entropy()

The model runs torch's kernels, and its output has the bits that it has without. Query and key of
each call are kept, and the weights are computed beside, when they are first read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch

from .captured import Captured
from .heads import fail
from .watching import Recorder, refuse_compiled


@contextmanager
def capture(
    module: torch.nn.Module,
    layers: int | str | Sequence[int | str] | None = None,
    heads: int | Sequence[int] | None = None,
) -> Iterator[Captured]:
    """Keeps the lazy weights of a model's `torch.nn` attention while the block runs.

    Seen are `F.scaled_dot_product_attention` and `F.multi_head_attention_forward` in the forward
    of any module that is called, `nn.MultiheadAttention` (torch's and ours), and with it
    `nn.TransformerEncoder`, `nn.TransformerDecoder` and `nn.Transformer`, fast path or not.

    Outputs are torch's, bit for bit, and so are random numbers. A call costs the memory of its
    query and key, and for `nn.MultiheadAttention` their projection again; the log-sum-exp is
    computed when weights are first read. What the model had written to before (a cache) is copied;
    what it writes to only after the call, and masks, are not. Weights are those before dropout,
    and have gradients where the model had at the call. Fully masked rows are 0. Of a padded batch
    that `nn.TransformerEncoder` makes a nested tensor of, weights end with the longest sequence,
    and the rows of padding are 0.

    Calls of the thread that opened the block are kept, after it too; blocks can be nested, and
    when one ends, by an error as well, the modules are as they were. A forward that is run again
    (checkpointing) is kept again.

    Args:
        module: the model, in eager mode.
        layers: names of modules, as in `module.named_modules()`, with wildcards as of fnmatch
            ("encoder.layers.*"; a name stands for all inside of it), or numbers of those that
            attend, counted from 0 in the order of their first calls. None for all.
        heads: which heads to keep, counted from 0; None for all.

    Yields:
        A `Captured`: by name of the module, a sequence of `AttentionWeights` `[B, H, L, S]`,
        one for each call (without B where the call had none). F.scaled_dot_product_attention
        has the name of the module whose forward calls it, "" for the model itself.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a name fits no module, or a number is negative.
        NotImplementedError: the model was compiled, or gives nested tensors to
            F.scaled_dot_product_attention.

    Example:
        >>> import torch, attlas
        >>> layer = torch.nn.TransformerEncoderLayer(32, nhead=4, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=3).eval()
        >>> with torch.no_grad(), attlas.nn.capture(model, layers=[0, 2], heads=[1]) as captured:
        ...     output = model(torch.randn(2, 10, 32))
        >>> captured
        Captured(2 modules)
          'layers.0.self_attn': Calls([2, 1, 10, 10]; lazy)
          'layers.2.self_attn': Calls([2, 1, 10, 10]; lazy)
        >>> captured["layers.2.self_attn"][0].entropy().shape
        torch.Size([2, 1, 10])
    """
    recorder = Recorder(_names(module), _chooser(module, layers), _heads(heads))
    try:
        recorder.open()
        yield recorder.captured
    finally:
        recorder.close()


# --- arguments --------------------------------------------------------------------------------


def _names(module: Any) -> dict[torch.nn.Module, str]:
    if not isinstance(module, torch.nn.Module):
        mend = "pass the model itself"
        fail(TypeError, "module", "be a torch.nn.Module", type(module).__name__, mend)
    for part in module.modules():
        compiled = hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
        if compiled or isinstance(part, torch.jit.ScriptModule):
            refuse_compiled(type(part).__name__)
    return {part: name for name, part in module.named_modules()}


def _chooser(module: torch.nn.Module, layers: Any) -> Callable[[str, int], bool]:
    """Says of a module, by its name and its number, whether it is chosen."""
    if layers is None:
        return lambda name, number: True
    chosen = (layers,) if isinstance(layers, int | str) else tuple(layers)
    names = [name for name, _ in module.named_modules()]
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            rule = "be names, patterns or numbers of modules"
            fail(TypeError, "layers", rule, type(layer).__name__, "pass None for all")
        if isinstance(layer, int) and layer < 0:
            fail(ValueError, "layers", "be at least 0", layer, "count from the first, or name it")
        if isinstance(layer, str) and not any(fnmatchcase(name, layer) for name in names):
            mend = "names are those of module.named_modules()"
            fail(ValueError, "layers", "be names of modules, or fit some", repr(layer), mend)

    def is_chosen(name: str, number: int) -> bool:
        parts = name.split(".")
        around = {".".join(parts[: n + 1]) for n in range(len(parts))}  # and the name itself
        return any(
            layer == number
            if isinstance(layer, int)
            else any(fnmatchcase(one, layer) for one in around)
            for layer in chosen
        )

    return is_chosen


def _heads(heads: Any) -> tuple[int, ...] | None:
    if heads is None:
        return None
    chosen = (heads,) if isinstance(heads, int) else tuple(heads)
    for head in chosen:
        if isinstance(head, bool) or not isinstance(head, int):
            fail(TypeError, "heads", "be ints", type(head).__name__, "pass None for all")
        if head < 0:
            fail(ValueError, "heads", "be at least 0", head, "count from the first")
    return chosen
