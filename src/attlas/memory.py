"""Memory that attlas keeps for its next call."""

from __future__ import annotations

from .kernels import native


def empty_cache() -> int:
    """Gives the memory that attlas keeps on the CPU back to the system.

    The system clears memory when it is first touched, which for dense weights takes about as long
    as computing them. So, as PyTorch does on CUDA, attlas keeps what is freed for its next call:
    dense weights up to an eighth of the machine's memory, or of the control group's limit (on
    Linux, where the system takes them whenever it runs short of memory, though they count as used
    until then), and up to 256 MB of workspace. Nothing is kept where addresses are limited, by
    `ulimit -v`, `ulimit -d` or strict overcommit. Tensors that are still in use are not touched.

    Returns:
        The bytes that were given back.

    Example:
        >>> import torch, attlas
        >>> q = torch.randn(8, 1024, 64)
        >>> output, weights = attlas.scaled_dot_product_attention(q, q, q)
        >>> del weights  # 32 MB
        >>> _ = attlas.empty_cache()
        >>> attlas.empty_cache()
        0
    """
    return native.release()
