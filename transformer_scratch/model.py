"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017), figure 1, put together from its blocks.

Shapes: B batch, S source positions, T target positions, D model width (dim), V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from transformer_scratch.attention import Packing, pack, padding_mask
from transformer_scratch.blocks import DecoderBlock, Dropout, EncoderBlock, KeyValueCache


def positional_encoding(length: int, dim: int) -> Tensor:
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) = cos(pos / 10000^(2i/dim)).

    -> (length, dim): one row a position *in time*, the same for every sample of a batch.
    """
    position = torch.arange(length, dtype=torch.float32)[:, None]  # (length, 1)
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))  # (ceil(dim/2),)
    angle = position * frequency  # (length, ceil(dim/2))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


class Transformer(nn.Module):
    """Encoder, decoder and the projection to the vocabulary; batch first, int64 ids in, logits out.

    tie_embeddings shares one weight matrix between both embeddings and the output projection (section 3.4): a digit
    that the encoder reads and the digit that the decoder writes are then the same vector.

    Positions are computed for max_len tokens and grow by themselves when a longer sequence comes.
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
        self.target_embedding = self.source_embedding if tie_embeddings else nn.Embedding(vocab_size, dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.register_buffer("positions", positional_encoding(max_len, dim), persistent=False)
        self.dropout = Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderBlock(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderBlock(dim, num_heads, ffn_dim, dropout) for _ in range(num_layers))
        if tie_embeddings:
            self.output.weight = self.source_embedding.weight
        self.initialise()

    def initialise(self) -> None:
        """Draw the embeddings and the output matrix from N(0, 1/dim); every other layer keeps PyTorch's own start.

        After the multiplication by sqrt(dim) (section 3.4) an embedding then has the scale of the encoding added to it,
        and the logits start small: without a shared matrix their variance is about one and the first loss close to
        ln(vocab_size). With one, the token just read starts ahead of the others, so the first loss is higher, the
        more so the wider the model. docs/results.md measures what PyTorch's N(0, 1) does instead.
        """
        weights = [self.source_embedding.weight, self.target_embedding.weight, self.output.weight]
        for weight in dict.fromkeys(weights):  # a shared one is drawn once
            nn.init.normal_(weight, std=self.dim**-0.5)

    def embed(self, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """Embedding times sqrt(dim) plus position, sections 3.4 and 3.5. ids: (B, T) -> (B, T, D).

        start is the position of ids[:, 0].
        """
        end = start + ids.size(1)
        if end > len(self.positions):
            self.positions = positional_encoding(2 * end, self.dim).to(self.positions)
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + self.positions[start:end])

    def source_mask(self, source: Tensor) -> Tensor | None:
        """source: (B, S) ids -> (B, 1, 1, S) bool, or None where nothing is padding, so that there is nothing to hide.

        Only a CPU is asked that: a GPU's answer would have to be waited for.
        """
        mask = padding_mask(source, self.pad_id)
        return None if mask.device.type == "cpu" and mask.all() else mask

    def encode(self, source: Tensor) -> Tensor:
        """source: (B, S) ids -> memory: (B, S, D). Padding is masked as a key."""
        mask = self.source_mask(source)
        x = self.embed(source, self.source_embedding)
        for block in self.encoder:
            x = block(x, mask)
        return x

    def decode(
        self,
        decoder_input: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """decoder_input: (B, T) ids, memory: (B, S, D) -> logits: (B, T, V).

        memory_mask: (B, 1, 1, S) bool, which of the memory's positions are tokens; None when all are.
        tokens: see forward.
        """
        packing = None if tokens is None else Packing(tokens, *decoder_input.shape)
        x = pack(self.embed(decoder_input, self.target_embedding), packing)
        for block in self.decoder:
            x = block(x, memory, memory_mask, packing)
        return self.output(x)

    def start_caches(self, memory: Tensor) -> list[KeyValueCache]:
        """One cache a decoder block, with the source's keys and values in it already. memory: (B, S, D)."""
        return [KeyValueCache(block.cross_attention.keys_and_values(memory)) for block in self.decoder]

    def decode_step(
        self, token: Tensor, position: int, caches: list[KeyValueCache], memory_mask: Tensor | None = None
    ) -> Tensor:
        """The logits after one more token, at the cost of one token. token: (B, 1) ids -> (B, V)."""
        x = self.embed(token, self.target_embedding, start=position)
        for block, cache in zip(self.decoder, caches, strict=True):
            x = block.step(x, cache, memory_mask)
        return self.output(x).squeeze(1)

    def forward(self, source: Tensor, decoder_input: Tensor, tokens: Tensor | None = None) -> Tensor:
        """source: (B, S) ids, decoder_input: (B, T) ids -> logits: (B, T, V), one prediction after each input token.

        tokens: (N,) int64, which of the B * T positions are wanted -> (N, V). The others must be padding or come after
        what is wanted in their row: then leaving them out changes nothing, and they cost next to nothing.
        """
        return self.decode(decoder_input, self.encode(source), self.source_mask(source), tokens)
