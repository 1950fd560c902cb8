"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), figure 1.

Shapes: B batch, S source positions, T target positions, D model width (dim), V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from transformer_scratch.attention import padding_mask
from transformer_scratch.blocks import DecoderBlock, EncoderBlock


def positional_encoding(length: int, dim: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) = cos(same), section 3.5.

    -> (length, dim): one row for each position in time, the same for every sample of a batch.
    """
    position = torch.arange(length, dtype=torch.float32)[:, None]  # (length, 1)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim  # (ceil(dim / 2),)
    angle = position * torch.exp(-math.log(10000.0) * exponent)  # (length, ceil(dim / 2))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]  # (length, dim)


class Transformer(nn.Module):
    """Encoder, decoder and the projection to the vocabulary: int64 ids in, logits out, batch first.

    tie_embeddings: one weight matrix for both embeddings and the output projection (section 3.4).
    A digit that the encoder reads and the same digit written by the decoder are then one vector.
    max_len: positions computed in advance; those of a longer sequence are computed when needed.
    Raises ValueError when dim is not divisible by num_heads.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 32,
        num_heads: int = 1,
        num_layers: int = 6,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        tie_embeddings: bool = True,
        pad_id: int = 13,
        max_len: int = 512,
    ):
        super().__init__()
        ffn_dim = ffn_dim or 4 * dim  # the paper's ratio: 2048 for dim 512
        self.dim, self.pad_id = dim, pad_id
        self.source_embedding = nn.Embedding(vocab_size, dim)
        self.target_embedding = nn.Embedding(vocab_size, dim)
        self.register_buffer("positions", positional_encoding(max_len, dim), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            EncoderBlock(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.output = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.target_embedding.weight = self.output.weight = self.source_embedding.weight
        self.initialise()

    @classmethod
    def from_config(cls, config, task) -> "Transformer":
        """The model that a Config describes, for the vocabulary of a task."""
        return cls(
            vocab_size=task.vocab_size,
            dim=config.dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            tie_embeddings=config.tie_embeddings,
            pad_id=task.pad_id,
            max_len=config.seq_len,
        )

    def initialise(self) -> None:
        """Draw embeddings and output matrix from N(0, 1/dim); the rest keeps PyTorch's default.

        Multiplied by sqrt(dim) (section 3.4), an embedding then has the scale of the positional
        encoding that is added to it, and the first logits are small. With PyTorch's own N(0, 1)
        they would be sqrt(dim) times too large, and the first loss far above ln(vocab_size).
        """
        nn.init.normal_(self.source_embedding.weight, std=self.dim**-0.5)
        if self.target_embedding.weight is not self.source_embedding.weight:
            nn.init.normal_(self.target_embedding.weight, std=self.dim**-0.5)
            nn.init.normal_(self.output.weight, std=self.dim**-0.5)

    def forward(
        self, source: Tensor, decoder_input: Tensor, source_is_padded: bool = True
    ) -> Tensor:
        """source: (B, S) ids, decoder_input: (B, T) ids -> logits: (B, T, V).

        The logits at a position predict the token after it. source_is_padded=False promises that
        the source has no padding, so no mask is needed.
        """
        memory = self.encode(source, source_is_padded)
        memory_mask = padding_mask(source, self.pad_id) if source_is_padded else None
        return self.decode(decoder_input, memory, memory_mask)

    def encode(self, source: Tensor, source_is_padded: bool = True) -> Tensor:
        """source: (B, S) ids -> memory: (B, S, D). No position attends to padding."""
        mask = padding_mask(source, self.pad_id) if source_is_padded else None
        x = self.embed(source, self.source_embedding)
        for block in self.encoder:
            x = block(x, mask)
        return x

    def decode(
        self, decoder_input: Tensor, memory: Tensor, memory_mask: Tensor | None = None
    ) -> Tensor:
        """decoder_input: (B, T) ids, memory: (B, S, D) -> logits: (B, T, V).

        memory_mask: (B, 1, 1, S) bool, which of the memory's positions are tokens; None: all.
        """
        x = self.embed(decoder_input, self.target_embedding)
        for block in self.decoder:
            x = block(x, memory, memory_mask)
        return self.output(x)

    def embed(self, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """Embedding times sqrt(dim) plus position, then dropout: sections 3.4, 3.5 and 5.4.

        ids: (B, T), the first column at position start -> (B, T, D).
        """
        end = start + ids.size(1)
        positions = self.positions
        if end > len(positions):
            positions = positional_encoding(end, self.dim).to(positions)
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + positions[start:end])
