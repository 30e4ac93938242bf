"""Which models can run with attlas, and the refusal of those that cannot.

Models whose attention classes do not use the attention interface of transformers have mathematics
of their own: some fail on an unknown `attn_implementation`, some ignore it, and some add a mask
of True and False to their scores and go on, silently wrong. The interface leaves no room to
refuse them, so `refuse_bypassing_models` wraps the two methods that choose an implementation: the
one that is asked when a model is made, for each model inside of it, and `set_attn_implementation`.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

NAME = "attlas"
# What eager attention takes in the models whose attention attlas has.
TAKEN = {
    *("module", "query", "key", "value", "query_states", "key_states", "value_states"),
    *("attention_mask", "dropout", "scaling", "position_bias", "softcap", "sinks"),
    *("sliding_window", "kwargs"),  # a window is in the mask already
}


def _source(model: type[PreTrainedModel]) -> str:
    """The source of its module; nothing for one that was written in a shell."""
    try:
        return inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def bypasses(model: type[PreTrainedModel]) -> bool:
    """True for a class of models with attention of its own.

    Read off the source of its module: it defines classes of attention, and does not name the
    attention interface.
    """
    source = _source(model)
    own = re.search(r"^class \w*Attention\w*\(", source, re.MULTILINE)
    return own is not None and "ALL_ATTENTION_FUNCTIONS" not in source


def chooses_classes(model: type[PreTrainedModel]) -> bool:
    """True where a table of classes for each implementation is read when the model is made."""
    return re.search(r"_CLASSES\[[\w.]*attn_implementation\]", _source(model)) is not None


def unknown_arguments(model: type[PreTrainedModel]) -> list[str]:
    """What the eager attention of its module takes, and attlas knows nothing of."""
    module = vars(sys.modules.get(model.__module__, object))
    eager = (f for name, f in module.items() if name.endswith("eager_attention_forward"))
    return sorted({name for f in eager for name in inspect.signature(f).parameters} - TAKEN)


def refuse_bypassing_models() -> None:
    """Lets a model that bypasses the interface raise when it is made with attlas or set to it."""
    check = PreTrainedModel.get_correct_attn_implementation
    change = PreTrainedModel.set_attn_implementation
    if hasattr(check, "refuses"):
        return

    @wraps(check)
    def check_or_refuse(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kw: Any
    ) -> Any:
        if requested_attention == NAME:
            _refuse(self)
            made = kw.get("is_init_check", bool(args and args[0]))
            if made and chooses_classes(type(self)):
                raise NotImplementedError(
                    f"attn_implementation must be 'eager' for {type(self).__name__}, got {NAME!r}; "
                    "it has no class of attention for others: make it with 'eager', and set "
                    f"{NAME!r} then for the parts that use the attention interface"
                )
        return check(self, requested_attention, *args, **kw)

    @wraps(change)  # of itself it warns, and leaves such a model as it was
    def change_or_refuse(
        self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kw: Any
    ) -> Any:
        asked = _asked(attn_implementation, self.config)
        for part in self.modules():
            is_model = isinstance(part, PreTrainedModel)
            if is_model and asked.get(id(part.config), attn_implementation) == NAME:
                _refuse(part)
        return change(self, attn_implementation, *args, **kw)

    check_or_refuse.refuses = NAME  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = check_or_refuse  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = change_or_refuse  # type: ignore[method-assign]


def _refuse(model: PreTrainedModel) -> None:
    if bypasses(type(model)):
        raise NotImplementedError(
            f"attn_implementation must be 'eager' for {type(model).__name__}, got {NAME!r}; "
            "its attention does not use the attention interface of transformers"
        )
    unknown = unknown_arguments(type(model))
    if unknown:
        raise NotImplementedError(
            f"attn_implementation must be 'eager' for {type(model).__name__}, got {NAME!r}; "
            f"its attention takes {unknown[0]}, which attlas does not know"
        )


def _asked(asked: Any, config: PreTrainedConfig) -> dict[int, Any]:
    """What `asked`, a name or names by sub-config, asks for config and those in it, by their id."""
    found = {id(config): asked.get("") if isinstance(asked, dict) else asked}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            found |= _asked(asked.get(name) if isinstance(asked, dict) else asked, inner)
    return found
