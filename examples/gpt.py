"""A small GPT (Radford et al., 2019) as one nn.Sequential: blocks of attention. Plain torch."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Module):
    """Each token as a vector: of the token itself, plus one of its place in the text.

    Of a longer text only the last `context` tokens are taken.
    """

    def __init__(self, n_tokens: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(n_tokens, width)
        self.place = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens[:, -self.place.num_embeddings :]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.token(tokens) + self.place(places))


class Block(nn.Module):
    """Attention to the tokens so far, then two linear layers; each is added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.joined(self.attention(self.norm1(x))))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)))))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """For every token a mean of those up to it, weighted by how well they match."""
        samples, length, width = x.shape
        split = self.query_key_value(x).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(samples, length, width)


def gpt(
    n_tokens: int,
    context: int = 64,
    width: int = 128,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
) -> nn.Sequential:
    """A GPT: embedding, block1 and so on, norm, head. Its output scores every next token.

    Parameters
    ----------
    n_tokens
        How many different tokens there are.
    context
        How many tokens it looks back.
    width
        Numbers for each token between the blocks.
    blocks
        How many blocks.
    heads
        Parts of each block's attention; they divide the width.
    dropout
        The share of numbers that are set to zero while training.
    """
    embedding = Embedding(n_tokens, context, width, dropout)
    head = nn.Linear(width, n_tokens, bias=False)
    parts: OrderedDict[str, nn.Module] = OrderedDict(embedding=embedding)
    for number in range(1, blocks + 1):
        parts[f"block{number}"] = Block(width, heads, dropout)
    parts["norm"] = nn.LayerNorm(width)
    parts["head"] = head
    model = nn.Sequential(parts)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            last = name.endswith(("joined.weight", "narrow.weight"))  # their outputs add up
            nn.init.normal_(parameter, std=0.02 / (2 * blocks) ** 0.5 if last else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    head.weight = embedding.token.weight  # what a token is, and what it takes to say it: tied
    return model
