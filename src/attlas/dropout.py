"""Dropout of attention weights by a counter-based generator.

    dropped = weights * keep / (1 - p)        keep_ij = word(b, h, i, j) >= p 2³²

The word of a weight depends on the seed of the call and on the position of the weight alone: it
is word j % 4 of Philox4x32-10 at the counter (j // 4, i, h, b), with the low and the high half of
the seed as the key. So the same weights are dropped in the forward and the backward, whatever
the blocks, the threads and the implementation (`kernels/native/random.h` draws them in C++), and
nothing of size L x S is kept.

References:
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    Srivastava et al., Dropout, 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import Block

LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round
ROUNDS, WORDS = 10, 4


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The four random words of a counter of four words and a key of two, all in int64."""
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        x, y = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits, the highest of them as the sign
        a, b, c, d = (y >> 32 & LOW) ^ b ^ low, y & LOW, (x >> 32 & LOW) ^ d ^ high, x & LOW
        low, high = (low + STEPS[0]) & LOW, (high + STEPS[1]) & LOW
    return a, b, c, d


@dataclass(frozen=True)
class Dropout:
    """Which weights of a call are dropped."""

    p: float
    seed: Tensor  # int64 []
    heads: Tensor | None = None  # those of the call, where it is about some of them

    @classmethod
    def draw(cls, p: float, device: torch.device) -> Dropout:
        """A dropout with the next seed of torch's default generator of the device."""
        return cls(float(p), torch.randint(2**63 - 1, (), device=device))

    def of_heads(self, chosen: Tensor) -> Dropout:
        """The dropout of some heads."""
        return replace(self, heads=chosen if self.heads is None else self.heads[chosen])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Dropout:
        """The dropout with `fn` of each tensor that it holds."""
        heads = None if self.heads is None else fn(self.heads)
        return replace(self, seed=fn(self.seed), heads=heads)

    @property
    def scale(self) -> float:
        """What a weight that is kept is multiplied with."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def keep(self, block: Block) -> Tensor:
        """bool `[b, h, q, k]`: the weights of a block that are kept."""
        first = block.keys.start // WORDS
        groups = slice(first, -(-block.keys.stop // WORDS))
        axes = (block.batch, block.heads, block.queries, groups)
        at = (torch.arange(a.start, a.stop, device=self.seed.device) for a in axes)
        b, h, q, group = (t.view([-1 if i == d else 1 for i in range(4)]) for d, t in enumerate(at))
        words = self._words(b, h, q, group).flatten(-2)
        return self._kept(words.narrow(-1, block.keys.start - first * WORDS, block.sizes("k")[0]))

    def keep_at(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """bool: whether the weights at some positions, tensors of one shape, are kept."""
        words = self._words(b, h, q, k // WORDS)
        return self._kept(words.gather(-1, (k % WORDS).unsqueeze(-1)).squeeze(-1))

    def apply(self, tensor: Tensor, keep: Tensor) -> Tensor:
        """What is kept of the tensor, scaled, and 0 for what is dropped."""
        return torch.where(keep, tensor * self.scale, 0.0)

    def _words(self, b: Tensor, h: Tensor, q: Tensor, group: Tensor) -> Tensor:
        h = h if self.heads is None else self.heads.to(h.device)[h]
        key = self.seed & LOW, self.seed >> 32 & LOW
        return torch.stack(philox((group, q, h, b), key), dim=-1)

    def _kept(self, words: Tensor) -> Tensor:
        return words >= int(self.p * 2**32)
