"""What the heads of a model read, as tables in 80 columns."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attlas import AttentionWeights

from .inputs import Text
from .model import MODEL, Reading, Words

if TYPE_CHECKING:
    from rich.table import Table


def top_words(weights: AttentionWeights, words: Words, head: int, word: int, count: int) -> str:
    """The words that a word reads the most, and the weight on each, its pieces together."""
    row = weights[0, head, words.tokens(word)].mean(0)  # of several pieces, the mean
    merged = torch.zeros(len(words.labels)).index_add(0, words.word_of, row)
    values, found = merged.topk(min(count, len(merged)))
    names = ["itself" if at == word else quoted(words.labels[at]) for at in found.tolist()]
    return ", ".join(f"{name} {w:.2f}" for name, w in zip(names, values.tolist(), strict=True))


def most_read(
    weights: AttentionWeights, words: Words, head: int, count: int
) -> list[tuple[str, float]]:
    """The words, in all their places together, that are given the most of all weight."""
    spelt = list(dict.fromkeys(words.labels))
    index = torch.tensor([spelt.index(words.labels[word]) for word in words.word_of.tolist()])
    received = weights.received()[0, head] / len(words.ids)
    shares = torch.zeros(len(spelt)).index_add(0, index, received)
    values, found = shares.topk(min(count, len(spelt)))
    return [(spelt[at], share) for at, share in zip(found.tolist(), values.tolist(), strict=True)]


def habits(weights: AttentionWeights, words: Words) -> list[str]:
    """For each head, where the largest weight of a row falls most often, and how often."""
    length = len(words.ids)
    first = weights.topk(1).keys[0, :, :, 0]
    distance = first - torch.arange(length)
    places = {
        "[CLS]": first == 0,
        "[SEP]": first == length - 1,
        "itself": distance == 0,
        "the token before": distance == -1,
        "the token after": distance == 1,
        "2 tokens before": distance == -2,
        "2 tokens after": distance == 2,
        "its word elsewhere": (words.ids[first] == words.ids) & (distance != 0),
    }
    shares, best = torch.stack(list(places.values())).float().mean(-1).max(0)
    names = [list(places)[place] for place in best.tolist()]
    return [f"{name} {share:.0%}" for name, share in zip(names, shares.tolist(), strict=True)]


def shortened(label: str) -> str:
    """A label of at most 12 letters."""
    return label if len(label) <= 12 else label[:11] + "…"


def quoted(label: str) -> str:
    """A label as it stands in a list: signs in quotation marks, long words cut."""
    known = label.isalnum() or label in ("[CLS]", "[SEP]")
    return shortened(label) if known else f"‘{shortened(label)}’"


def number_of_keys(entropy: Tensor | float) -> str:
    """exp(H): as many keys, read evenly, have this entropy."""
    keys = math.exp(entropy)
    return f"{keys:.1f}" if keys < 9.95 else f"{keys:.0f}"


def overview_table(reading: Reading) -> Table:
    """The effective number of keys of every head."""
    layers, heads = reading.entropy.shape
    table = new_table("layer", *(f"h{head}" for head in range(heads)), numbers=heads + 1)
    for layer in range(layers):
        table.add_row(str(layer), *map(number_of_keys, reading.entropy[layer]))
    return table


def extremes_table(reading: Reading, count: int = 4) -> Table:
    """The heads with the lowest and the highest entropy."""
    words = reading.words
    (example,) = words.frequent(1)
    name = f"{quoted(words.labels[example])} reads"
    table = new_table("layer", "head", "entropy", "keys", "top key", name, numbers=4)
    order = reading.entropy.flatten().argsort().tolist()
    for rank, place in enumerate(order[:count] + order[-count:], start=1):
        layer, head = divmod(place, reading.entropy.shape[1])
        entropy, weights = reading.entropy[layer, head], reading.layers[layer]
        table.add_row(
            str(layer),
            str(head),
            f"{entropy:.2f}",
            number_of_keys(entropy),
            habits(weights, words)[head],
            top_words(weights, words, head, example, count=2),
            end_section=rank == count,
        )
    return table


def detail_table(reading: Reading, place: tuple[int, int], count: int = 6) -> Table:
    """What some words read in one head."""
    weights, words, head = reading.layers[place[0]], reading.words, place[1]
    entropy = weights.entropy()[0, head]
    table = new_table("keys", "query", "reads", numbers=1)
    for word in words.frequent(count):
        keys = number_of_keys(entropy[words.tokens(word)].mean())
        reads = top_words(weights, words, head, word, count=4)
        table.add_row(keys, quoted(words.labels[word]), reads)
    return table


def new_table(*columns: str, numbers: int) -> Table:
    """A table whose first columns hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index < numbers else "left")
    return table


def print_reading(text: Text, reading: Reading, place: tuple[int, int]) -> None:
    """Prints what was read, then the tables from the whole model down to one head."""
    from rich.console import Console

    width = min(80, shutil.get_terminal_size().columns)  # 80 where there is no terminal
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as printed:
        for part in report(text, reading, place):
            console.print(part)
    print("\n".join(line.rstrip() for line in printed.get().split("\n")))


def report(text: Text, reading: Reading, place: tuple[int, int]) -> Iterator[str | Table]:
    """The paragraphs and the tables of `print_reading`."""
    words, (layers, heads), (layer, head) = reading.words, reading.entropy.shape, place
    yield f"\n{MODEL} reads {len(words.ids)} tokens of\n{text.source}\n"
    if words.dropped:
        yield f"The model reads no more than that: {words.dropped} further tokens are left out.\n"
    output, weights = map(max, zip(*reading.differences, strict=True))
    yield (
        f"attlas against the model's own attention, {layers} layers of {heads} heads:\n"
        f"outputs differ by at most {output:.1e}, weights by at most {weights:.1e}.\n"
    )
    yield "How many keys a head reads: exp of its entropy, the mean over all queries.\n"
    yield overview_table(reading)
    yield "\nThe most focused heads and the most diffuse. Entropy is in nats; the top key is"
    yield "where the largest weight of a row falls most often, and in how many rows.\n"
    yield extremes_table(reading)
    entropy = reading.entropy[place]
    yield (
        f"\nLayer {layer}, head {head} in detail: entropy {entropy:.2f} nats, "
        f"{number_of_keys(entropy)} keys.\n"
    )
    yield detail_table(reading, place)
    most = most_read(reading.layers[layer], words, head, count=5)
    named = ", ".join(f"{quoted(label)} {share:.0%}" for label, share in most)
    yield f"\nOf all weight it gives {named}."
