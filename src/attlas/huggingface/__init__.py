"""Attention weights of Hugging Face models: `attn_implementation="attlas"`.

    import attlas.huggingface
    model = AutoModel.from_pretrained(name, attn_implementation="attlas")
    outputs = model(**inputs, output_attentions=True)
    outputs.attentions[3][0, 5].mean(0)

The model runs with fused attention in O(L) memory, and `outputs.attentions` (also those of
encoders, decoders and between them) hold `attlas.AttentionWeights`, which behave as the tensors
that they stand for. `capture` keeps weights, or statistics of them, of chosen layers and heads in
any run.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "attlas.huggingface must have transformers, which is not installed; "
        "install it with pip install 'attlas[hf]'"
    ) from error

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_forward
from .masks import attention_mask
from .models import NAME, refuse_bypassing_models
from .recording import Call as Call
from .recording import Capture as Capture
from .recording import capture as capture
from .saving import Saved as Saved
from .saving import load as load
from .saving import save as save
from .uses import best_matches as best_matches
from .uses import entropy_profile as entropy_profile
from .uses import heavy_hitters as heavy_hitters
from .uses import token_timestamps as token_timestamps
from .uses import window_scores as window_scores


def register() -> None:
    """Makes `attn_implementation="attlas"` known to transformers; importing this module does.

    A second call changes nothing.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    refuse_bypassing_models()


register()
