"""Which models can run with attlas, and the refusal of those that cannot.

Models whose attention classes do not use the attention interface of transformers have mathematics
of their own: some fail on an unknown `attn_implementation`, some ignore it, and some add a mask
of True and False to their scores and go on, silently wrong. The interface leaves no room to
refuse them when they are loaded, so `refuse_bypassing_models` wraps the one method that
transformers asks about an implementation, for each model and each model inside of it.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

NAME = "attlas"


def bypasses(model: type[PreTrainedModel]) -> bool:
    """True for a class of models with attention of its own.

    Read off the source of its module: it defines classes of attention, and does not name the
    attention interface.
    """
    try:
        source = inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):  # written in a shell: nothing is known
        return False
    own = re.search(r"^class \w*Attention\w*\(", source, re.MULTILINE)
    return own is not None and "ALL_ATTENTION_FUNCTIONS" not in source


def refuse_bypassing_models() -> None:
    """Lets a model that bypasses the interface raise when it is made with attlas."""
    check = PreTrainedModel.get_correct_attn_implementation
    if hasattr(check, "refuses"):
        return

    @wraps(check)
    def refuse(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kw: Any
    ) -> Any:
        if requested_attention == NAME and bypasses(type(self)):
            raise NotImplementedError(
                f"attn_implementation must be 'eager' for {type(self).__name__}, got {NAME!r}; "
                "its attention does not use the attention interface of transformers"
            )
        return check(self, requested_attention, *args, **kw)

    refuse.refuses = NAME  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = refuse  # type: ignore[method-assign]
