"""The article's program as a baseline: what it computes in a training step, without its faults.

Everything is as long as --seq-len, samples are made one by one, every tensor is float32, dropout
also falls on attention weights and inside the feed-forward network, and the only mask is the
causal one. Layers, widths and task are those of train.py, so that both do the same work.

Shapes: B batch, H heads, T query and S key positions, D model width, K head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from transformer_scratch.digits import Digits
from transformer_scratch.model import positional_encoding
from transformer_scratch.task import Pair


class ArticleAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """x: (B, T, D), memory: (B, S, D) -> (B, T, D)."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T or S, K)
            for layer, tokens in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (B, H, T, S)
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        heads = self.dropout(scores.softmax(dim=-1)) @ value  # (B, H, T, K)
        return self.output(heads.transpose(1, 2).flatten(2))


class ArticleBlock(nn.Module):
    """A block of the encoder, or of the decoder: that one attends to the memory, too."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float, decoder: bool):
        super().__init__()
        self.decoder = decoder
        self.attentions = nn.ModuleList(
            ArticleAttention(dim, num_heads, dropout) for _ in range(1 + decoder)
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn_dim, dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 + decoder))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attentions[0](x, x, causal=self.decoder)))
        if self.decoder:
            x = self.norms[1](x + self.dropout(self.attentions[1](x, memory)))
        return self.norms[-1](x + self.dropout(self.feed_forward(x)))


class ArticleTransformer(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        ffn_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.source_embedding = nn.Embedding(vocab_size, dim)
        self.target_embedding = nn.Embedding(vocab_size, dim)
        self.register_buffer("positions", positional_encoding(512, dim))
        self.dropout = nn.Dropout(dropout)
        sizes = (dim, num_heads, ffn_dim, dropout)
        self.encoder = nn.ModuleList(ArticleBlock(*sizes, decoder=False) for _ in range(num_layers))
        self.decoder = nn.ModuleList(ArticleBlock(*sizes, decoder=True) for _ in range(num_layers))
        self.output = nn.Linear(dim, vocab_size)

    def embed(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        return self.dropout(embedding(ids) * self.scale + self.positions[: ids.size(1)])

    def encode(self, source: Tensor) -> Tensor:
        x = self.embed(source, self.source_embedding)
        for block in self.encoder:
            x = block(x)
        return x

    def decode(self, decoder_input: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(decoder_input, self.target_embedding)
        for block in self.decoder:
            x = block(x, memory)
        return self.output(x)

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """source: (B, S), decoder_input: (B, T) -> logits (B, T, V)."""
        return self.decode(decoder_input, self.encode(source))


class ItemDataset(Dataset):
    """One sample at a time, made when it is asked for and always seq_len long."""

    def __init__(self, task: Digits, pairs: list[Pair]):
        self.task, self.pairs = task, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        source = self.padded(self.task.encode_source(self.pairs[index]))
        target = self.padded(self.task.encode_target(self.pairs[index]))
        return source, target[:-1], target[1:]

    def padded(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids + [self.task.pad_id] * (self.task.seq_len - len(ids)))


def article_loader(task: Digits, pairs: list[Pair], batch_size: int) -> DataLoader:
    """Samples in random order, put together by PyTorch's default collate function."""
    return DataLoader(ItemDataset(task, pairs), batch_size, shuffle=True, drop_last=True)
