"""A text to learn from that is on every machine: the source code of Python's standard library."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

EVERY = 20  # one file of so many is kept for validation
# A line break with the indent after it, a word with the blank before it, underscores, quotes of
# three, else one character.
PIECE = re.compile(r'\n *| ?[A-Za-z]+|_+|"""|.', re.DOTALL)


@dataclass(frozen=True)
class Sources:
    """The tokens of a text, split into those to train on and those to validate with.

    A token is a frequent piece of the text, or a single character.
    """

    train: torch.Tensor
    validation: torch.Tensor
    vocabulary: list[str]


def load_texts() -> tuple[list[str], list[str]]:
    """The modules of the standard library: those to train on, and those to validate with."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    texts = [text for text in texts if text.isascii()]
    return [text for i, text in enumerate(texts) if i % EVERY], texts[::EVERY]


def load_sources(n_tokens: int) -> Sources:
    """The modules of the standard library, in `n_tokens` different tokens."""
    train, held_out = load_texts()
    characters = sorted(set("".join(train + held_out)))
    counts = Counter(piece for text in train for piece in PIECE.findall(text))
    frequent = [piece for piece, _ in counts.most_common() if len(piece) > 1]
    vocabulary = (characters + frequent)[:n_tokens]
    return Sources(
        encode("\n".join(train), vocabulary), encode("\n".join(held_out), vocabulary), vocabulary
    )


def encode(text: str, vocabulary: list[str]) -> torch.Tensor:
    """The numbers of a text's tokens; a piece that is no token goes character by character."""
    number = {token: i for i, token in enumerate(vocabulary)}
    numbers: list[int] = []
    for piece in PIECE.findall(text):
        numbers += [number[piece]] if piece in number else [number[c] for c in piece]
    return torch.tensor(numbers)


def decode(tokens: torch.Tensor, vocabulary: list[str]) -> str:
    """The text of some tokens."""
    return "".join(vocabulary[i] for i in tokens.tolist())
