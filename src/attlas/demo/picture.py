"""One head's map as a picture: the whole of it, and the busiest part with every token named."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attlas import AttentionWeights

from .model import MODEL, Reading, Words
from .report import number_of_keys, shortened

PIXELS = 1000  # of the map along each side, about
TILE = 28  # tokens along each side of the part that is shown larger


def draw_map(reading: Reading, place: tuple[int, int], picture: Path) -> None:
    """Saves the whole map of one head, and beside it the tile that holds the most weight."""
    from matplotlib import rc_context
    from matplotlib.patches import Rectangle

    (layer, head), words, length = place, reading.words, len(reading.words.ids)
    weights, entropy = reading.layers[layer], reading.entropy[place]
    cell = -(-length // PIXELS)
    whole = weights.pool(cell)[0, head]
    style: dict[Any, Any] = {"font.size": 13, "axes.titlesize": 15, "figure.titlesize": 17}
    with rc_context({**style, "text.parse_math": False}):
        side = len(whole) * max(1, round(PIXELS / len(whole)))
        figure, (left, *others), bar = new_figure(side, panels=1 if length <= TILE else 2)
        image = draw_tile(left, whole, words, (0, 0), cell, every=-(-length // TILE))
        left.set_title(f"All {length} tokens", loc="left")
        for right in others:
            queries, keys = busiest_tile(weights, head)
            corner = (keys.start - 0.5, queries.start - 0.5)
            left.add_patch(Rectangle(corner, TILE, TILE, fill=False, color="white"))
            tile = weights[0, head, queries, keys]
            draw_tile(right, tile, words, (queries.start, keys.start), cell=1, every=1)
            right.set_title("The framed part", loc="left")
        figure.colorbar(image, cax=bar, label="weight", format="{x:g}")
        figure.suptitle(
            f"{MODEL}, layer {layer}, head {head}: entropy {entropy:.2f} nats, "
            f"{number_of_keys(entropy)} of {length} keys"
        )
        with warnings.catch_warnings():  # a letter that the font does not have is a box
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(picture)


def busiest_tile(weights: AttentionWeights, head: int) -> tuple[slice, slice]:
    """TILE x TILE tokens that hold the most weight, the first keys apart: all read [CLS]."""
    step = 4
    mass = weights.pool(step, how="mass")[:, head]
    mass[..., :1] = 0
    sums = torch.nn.functional.avg_pool2d(mass, TILE // step, stride=1)[0]
    first = divmod(int(sums.argmax()), sums.shape[1])
    starts = (
        min(index * step, length - TILE)
        for index, length in zip(first, weights.shape[2:], strict=True)
    )
    queries, keys = (slice(start, start + TILE) for start in starts)
    return queries, keys


def new_figure(side: int, panels: int) -> tuple[Any, list[Any], Any]:
    """Square panels of `side` pixels, so that all cells are equal, and a colour bar."""
    from matplotlib.figure import Figure

    dpi = 130
    widths = [190, *[side, 230] * panels]  # pixels: a margin, then a panel and a margin each
    widths[-1:] = [40, 30, 150]  # a gap, the bar, a margin
    below, above = 190, 130
    width, height = sum(widths), below + side + above
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    *axes, bar = (
        figure.add_axes(
            (sum(widths[:at]) / width, below / height, widths[at] / width, side / height)
        )
        for at in range(1, len(widths), 2)
    )
    return figure, axes, bar


def draw_tile(
    axes: Any, values: Tensor, words: Words, origin: tuple[int, int], cell: int, every: int
) -> Any:
    """Draws weights from a query and a key on, on a log scale, with tokens along the axes."""
    from matplotlib.colors import LogNorm

    length = len(words.ids)
    lowest = 10 ** math.floor(math.log10(0.5 / length))  # less than an even share of the weight
    (top, left), (rows, columns) = origin, values.shape
    bottom, right = top + rows * cell, left + columns * cell
    image = axes.imshow(
        values.numpy(),
        cmap="magma",
        norm=LogNorm(lowest, 1, clip=True),
        interpolation="nearest",
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
    )
    queries, keys = range(top, min(bottom, length), every), range(left, min(right, length), every)
    axes.set_yticks(queries, [shortened(words.pieces[i]) for i in queries])
    axes.set_xticks(keys, [shortened(words.pieces[i]) for i in keys], rotation=90)
    axes.tick_params(length=3, labelsize=12)
    axes.set(xlabel="key (is read)", ylabel="query (reads)")
    return image
