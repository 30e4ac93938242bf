"""`torch.nn`'s attention with lazy weights: a drop-in module, and a capture of any model.

    attlas.nn.MultiheadAttention    torch.nn.MultiheadAttention, and return_weights="lazy"
    attlas.nn.capture(model)        keeps the weights of what a model computes with torch's own

Both stand on `attlas.attention` alone.
"""

from .captured import Calls as Calls
from .captured import Captured as Captured
from .multihead import MultiheadAttention as MultiheadAttention
from .recording import capture as capture
