"""A pretrained model that reads a text, and its attention computed again with attlas.

Each layer's own projections give query, key and value. The model computes its attention in
plain PyTorch, dense; attlas reads the same weights lazily, and both are compared.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attlas

MODEL = "all-MiniLM-L6-v2"
LONGEST = 512  # tokens that the model reads


class Difference(NamedTuple):
    """The largest absolute differences between attlas and the model's own attention."""

    output: float
    weights: float


@dataclass(frozen=True)
class Words:
    """The words of a text: the pieces that the model reads, merged again, as they are spelt."""

    labels: list[str]  # one for each word, [CLS] and [SEP] among them
    pieces: list[str]  # one for each token
    ids: Tensor  # [L], the vocabulary entry of each token
    word_of: Tensor  # [L], the word that each token is a piece of
    dropped: int  # tokens of the text beyond what the model reads

    def tokens(self, word: int) -> Tensor:
        """The positions of the pieces of a word."""
        return (self.word_of == word).nonzero()[:, 0]

    def frequent(self, count: int) -> list[int]:
        """The last occurrences of the most frequent words, words of 5 letters and more first."""
        spelt = [label.lower() for label in self.labels[1:-1]]
        last = {label: word for word, label in enumerate(spelt, start=1)}
        ranked = [label for label, _ in Counter(spelt).most_common()]
        ranked.sort(key=lambda label: not (label.isalpha() and len(label) > 4))
        return [last[label] for label in ranked[:count]]


@dataclass(frozen=True)
class Reading:
    """The attention of every layer of the model on one text."""

    words: Words
    layers: list[attlas.AttentionWeights]  # [1, heads, L, L] each, lazy
    differences: list[Difference]

    @cached_property
    def entropy(self) -> Tensor:
        """The mean over the queries of each head's entropy, `[layers, heads]`, in nats."""
        return torch.stack([weights.entropy()[0].mean(-1) for weights in self.layers])


def size(directory: Path) -> tuple[int, int]:
    """How many layers the model has, and how many heads each of them."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    return config["num_hidden_layers"], config["num_attention_heads"]


def load(directory: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, from their files alone and without a word."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = BertModel.from_pretrained(
            directory, attn_implementation="eager", local_files_only=True
        )
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    return model.eval(), tokenizer


def encode(tokenizer: Any, text: str) -> Words:
    """The tokens of a text and the words that they are pieces of."""
    tokenizer.no_truncation()
    length = len(tokenizer.encode(text))
    tokenizer.enable_truncation(LONGEST)
    encoding = tokenizer.encode(text)
    labels: list[str] = []
    pieces: list[str] = []
    word_of: list[int] = []
    begun = None  # the word that the last token is a piece of; None for [CLS] and [SEP]
    for token, word, span in zip(encoding.tokens, encoding.word_ids, encoding.offsets, strict=True):
        piece = token if word is None else printable(text[slice(*span)]) or token
        if word is not None and word == begun:
            labels[-1] += piece
        else:
            labels.append(piece)
        begun = word
        pieces.append(piece)
        word_of.append(len(labels) - 1)
    ids = torch.tensor(encoding.ids)
    return Words(labels, pieces, ids, torch.tensor(word_of), dropped=length - len(ids))


def printable(text: str) -> str:
    """The text without what a terminal or a font cannot show."""
    return "".join(filter(str.isprintable, text))


def read(model: Any, words: Words, starts: Callable[[int], None]) -> Reading:
    """Runs the model and computes the attention of each layer again, with attlas."""
    reading = Reading(words, [], [])

    def record(module: Any, inputs: Any, named: Any, result: tuple[Tensor, Tensor]) -> None:
        starts(len(reading.layers))
        hidden = inputs[0] if inputs else named["hidden_states"]
        query, key, value = (
            project(hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
            for project in (module.query, module.key, module.value)
        )
        output, weights = attlas.attention(query, key, value)
        reading.layers.append(weights)
        merged = output.transpose(1, 2).flatten(2)
        pairs = ((merged, result[0]), (weights.to_dense(), result[1]))
        reading.differences.append(Difference(*(float((a - b).abs().max()) for a, b in pairs)))

    hooks = [
        layer.attention.self.register_forward_hook(record, with_kwargs=True)
        for layer in model.encoder.layer
    ]
    with torch.no_grad():
        model(input_ids=words.ids[None])
    for hook in hooks:
        hook.remove()
    return reading
