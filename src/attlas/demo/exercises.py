"""The two textbook exercises, as notebook cells."""

from __future__ import annotations

from typing import Any

EXERCISES = (
    """\
import torch
from attlas import scaled_dot_product_attention

torch.manual_seed(0)
Q = torch.randn(2, 3, 4)  # (batch, block_size, head_size)
K = torch.randn(2, 3, 4)
V = torch.randn(2, 3, 4)
output, attention_weights = scaled_dot_product_attention(Q, K, V)
print(output)
print(attention_weights)""",
    """\
mask = torch.ones_like(Q[:, :, 0]).unsqueeze(1)
mask[1, 0, 2:] = 0  # (batch, 1, block_size): a padded token is not read
output, attention_weights = scaled_dot_product_attention(Q, K, V, mask)
print(output)
print(attention_weights)""",
)


def print_exercises() -> None:
    """Prints each exercise as a notebook cell, by running what it shows."""
    print("Scaled dot-product attention: softmax(Q Kᵀ / √E) V")
    names: dict[str, Any] = {}
    for number, source in enumerate(EXERCISES, start=1):
        first, *rest = source.split("\n")
        print(f"\nIn [{number}]: {first}")
        for line in rest:
            print(f"   ...: {line}".rstrip())
        print()
        exec(source, names)
