"""Attention flow over layers: the most that can run from a position down to each input token.

flow[i, j] = max flow from node i of the top to node j of the input, in a network of one node for
each token before and after each layer, where an edge carries at most A_l[i, j]:
A_l = residual I + (1 - residual) mean over heads of W_l
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .matrix import LazyMatrix
from .rollout import check_residual, layers_of, positions_of
from .statistics import Dense

UNIT = 1 << 30  # what a capacity of 1 is as the int32 of scipy, in rows that sum to less than 2
EDGES = 1 << 24  # of one network, which takes about 1 GB


def flow(
    weights: Sequence[LazyMatrix],
    *,
    start: int | Sequence[int] | Tensor,
    residual: float = 0.5,
) -> Tensor:
    """The maximum flow from positions of the output to each position of the input, `[B, n, L]`.

    The weights of each layer, A_l = residual I + (1 - residual) W_l, are what the edges from its
    output to its input can carry, W_l being the mean over heads. `attlas.rollout` multiplies along
    a path and adds up the paths; here a path carries what its narrowest edge does, paths share
    edges, and each input position is asked for on its own: rows do not sum to 1. No gradient.

    A network has an edge for each weight that is not 0, so this takes **O(layers L²)** memory, and
    a maximum flow (Dinic's algorithm, of scipy) for each position asked and each of the input:
    for 12 layers of 128 tokens about a second for each position asked.

    Capacities are cut to multiples of 2^-30, so a flow is never too large, and too small by at
    most 2^-30 for each edge of the narrowest cut. Rows of dropped weights may sum to more than 1:
    where one sums to 2^n or more, n of at least 1, these are multiples of 2^(n-30).

    Args:
        weights: lazy weights of each layer, in the order in which the layers run, as in
            `attlas.rollout`.
        start: where the flow starts, a position of the output (0 for a class token in front, -1
            for the last token), or several.
        residual: the share of the residual connection, from 0 to 1.

    Returns:
        `[B, L]` for one position, else `[B, n, L]`. Divided by its sum, `flow / flow.sum(-1,
        keepdim=True)`, it is what the authors' code gives.

    Raises:
        ImportError: scipy is not installed.
        TypeError: weights is no sequence of lazy weights, or start no position.
        ValueError: shapes do not fit, residual is not from 0 to 1, or the network has more than
            2^24 edges.
        IndexError: a position is out of range.

    Example:
        >>> import torch, attlas
        >>> x = torch.zeros(1, 1, 4, 8)  # each of 4 tokens reads those before it, and itself
        >>> layers = [attlas.attention(x, x, x, is_causal=True).weights for _ in range(2)]
        >>> attlas.flow(layers, start=3)
        tensor([[0.5000, 0.3750, 0.2500, 0.6250]])

    References:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, section 3.
    """
    layers = layers_of(weights)
    check_residual(residual)
    batch, size = layers[0].shape[:-2].numel(), layers[0].shape[-1]
    positions, single = positions_of(start, size, "be a position or positions")
    if len(layers) * size**2 > EDGES:
        rule, got = f"have at most {EDGES} edges, layers x L x L", len(layers) * size**2
        checks.fail(ValueError, "weights", rule, got, "take attlas.rollout, which has no limit")
    carried = torch.stack([_carried(layer, residual) for layer in layers], dim=1)
    unit = _unit(carried)
    edges = carried.mul_(unit).to(torch.int32)
    found = [_max_flows(edges[item], positions) for item in range(batch)]
    like = layers[0]._like
    flows = torch.tensor(found, dtype=torch.float64, device=like.device) / unit
    flows = flows.to(like.dtype).view(*layers[0].lead, len(positions), size)
    return flows.squeeze(-2) if single else flows


def _carried(layer: LazyMatrix, residual: float) -> Tensor:
    """residual I + (1 - residual) W, float64 `[B, L, L]` on the CPU."""
    with torch.no_grad():
        carried = layer.evaluate(Dense(torch.float64)).cpu().mul_(1 - residual)
        carried.diagonal(dim1=-2, dim2=-1).add_(residual)
        return carried.view(-1, *layer.shape[-2:])


def _unit(carried: Tensor) -> int:
    """What a capacity of 1 is, so that the sum of no row is beyond int32, as no flow then is."""
    largest = float(carried.sum(-1).max()) if carried.numel() else 0.0
    return UNIT >> max(math.frexp(largest)[1] - 1, 0)


def _max_flows(edges: Tensor, positions: list[int]) -> list[list[int]]:
    """The flows of one network, `[n, L]` in units, for its edges `[layers, L, L]`."""
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError(
            "attlas.flow must have scipy, which is not installed; "
            "install it with pip install 'attlas[flow]'"
        ) from error
    depth, size, _ = edges.shape
    layer, row, column = edges.nonzero(as_tuple=True)
    ends = ((layer + 1) * size + row).numpy(), (layer * size + column).numpy()
    capacity = edges[layer, row, column].numpy()
    network = csr_array((capacity, ends), shape=((depth + 1) * size,) * 2)
    return [
        [maximum_flow(network, depth * size + i, j).flow_value for j in range(size)]
        for i in positions
    ]
