"""The ways to train that throughput.py and gpu.py compare, all of them on the same pairs.

Batches differ in length, so no single step is typical. What is timed is one window of the sampler:
its short, its middling and its long batches, whose mean is a step of a training.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.lib.article_baseline import ArticleTransformer, article_loader
from benchmarks.lib.measure import clock
from train import token_loss
from transformer_scratch.attention import padding_mask
from transformer_scratch.batches import (
    UPDATES_PER_WINDOW,
    Batch,
    BatchIndices,
    BatchSampler,
    PairDataset,
    make_loader,
)
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer
from transformer_scratch.task import Pair

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0
CPU = torch.device("cpu")


class PaddedDataset(PairDataset):
    """Batches fetched whole but never cut: every sequence is seq_len long."""

    def __init__(self, task: Digits, pairs: list[Pair], sample_pairs: Tensor | None = None):
        super().__init__(task, pairs, sample_pairs)
        everything = torch.arange(len(pairs))
        self.sources, self.targets = (
            pad_to(sequences.padded(everything, task.pad_id), task.seq_len, task.pad_id)
            for sequences in (self.source, self.target)
        )

    def __getitem__(self, indices: BatchIndices) -> Batch:
        pairs = self.sample_pairs[indices.samples]
        source, target = self.sources[pairs], self.targets[pairs]
        num_tokens = int(self.target_tokens[indices.samples].sum())
        return Batch(source, target[:, :-1], target[:, 1:], True, num_tokens, *indices[1:])


def pad_to(ids: Tensor, length: int, pad_id: int) -> Tensor:
    """(B, T) ids -> (B, length)"""
    return nn.functional.pad(ids, (0, length - ids.size(1)), value=pad_id)


class TorchTransformer(nn.Module):
    """nn.Transformer between the embeddings and the output matrix of our model."""

    def __init__(self, ours: Transformer, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        self.ours, self.pad_id = ours, ours.pad_id
        ffn_dim = ours.encoder[0].feed_forward[0].out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor")  # about inference
            self.stack = nn.Transformer(
                ours.dim, num_heads, num_layers, num_layers, ffn_dim, dropout, batch_first=True
            )
        del ours.encoder, ours.decoder

    def forward(
        self, source: Tensor, decoder_input: Tensor, source_is_padded: bool = True
    ) -> Tensor:
        """source: (B, S), decoder_input: (B, T) -> logits (B, T, V)."""
        # Its masks are True where ours are False. Like ours, it gets one only if there is padding.
        hidden = ~padding_mask(source, self.pad_id)[:, 0, 0] if source_is_padded else None  # (B, S)
        x = self.stack(
            self.ours.embed(source, self.ours.source_embedding),
            self.ours.embed(decoder_input, self.ours.target_embedding),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(
                decoder_input.size(1), source.device
            ),
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        return self.ours.output(x)


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What train.py minimises: padding left out, every token of the epoch weighted the same."""
    return token_loss(model, batch, model.pad_id) * (batch.num_tokens / batch.mean_update_tokens)


def article_loss(model: nn.Module, batch: list[Tensor] | Batch) -> Tensor:
    """Padding counts."""
    source, decoder_input, target = batch[:3]
    return F.cross_entropy(model(source, decoder_input).flatten(0, 1), target.flatten())


class TrainingStep:
    """Trains its model on so many windows of batches when it is called. -> seconds a step."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable,
        loss_function: Callable[[nn.Module, Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        windows: int = 1,
    ):
        self.model, self.loader = model.train(), loader
        self.loss_function, self.optimizer = loss_function, optimizer
        self.windows, self.device = windows, next(model.parameters()).device
        kind = self.device.type
        self.autocast = torch.amp.autocast(kind, dtype=dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def __call__(self) -> float:
        started = clock(self.device)
        for _ in range(self.windows):
            self.train_on_a_window()
        return (clock(self.device) - started) / (self.windows * UPDATES_PER_WINDOW)

    def train_on_a_window(self) -> None:
        for batch in self.loader:
            with self.autocast:
                loss = self.loss_function(self.model, to_device(batch, self.device))
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()


def to_device(batch: list[Tensor] | Batch, device: torch.device) -> list[Tensor] | Batch:
    """A batch of ours, or one that PyTorch's default collate function has made."""
    if isinstance(batch, Batch):
        return batch.to(device)
    return [tensor.to(device, non_blocking=True) for tensor in batch]


class TrainingSteps:
    """Makes all ways to train a model of one size on one device."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        batch_size: int,
        device: torch.device = CPU,
        windows: int = 1,
    ):
        """windows: how many are timed at once; one may be too short on a GPU."""
        self.dim, self.num_heads, self.num_layers = dim, num_heads, num_layers
        self.batch_size, self.device, self.windows = batch_size, device, windows
        self.task = Digits()
        self.pairs = split_pairs(self.task, holdout=0.2, seed=42).train
        # Each pair as often as any other: the lengths are those of a training, not of a few draws.
        order = torch.randperm(len(self.pairs))
        self.samples = order[torch.arange(UPDATES_PER_WINDOW * batch_size) % len(order)]

    def loader(self, dataset_class: type[PairDataset] = PairDataset) -> DataLoader:
        data = dataset_class(self.task, self.pairs, self.samples)
        sampler = BatchSampler(data, self.batch_size, shuffle=True, seed=42)
        return make_loader(sampler, pin_memory=self.device.type == "cuda")

    def our_model(self, dropout: float) -> Transformer:
        sizes = (self.task.vocab_size, self.dim, self.num_heads, self.num_layers)
        model = Transformer(*sizes, dropout=dropout, pad_id=self.task.pad_id)
        return model.to(self.device)

    def article(self, item_by_item: bool = True) -> TrainingStep:
        """item_by_item: with the article's data set; otherwise its model on batches of ours."""
        model = ArticleTransformer(
            self.task.vocab_size, self.dim, self.num_heads, self.num_layers, 4 * self.dim, 0.1
        ).to(self.device)
        loader = self.loader(PaddedDataset)
        if item_by_item:
            pairs = [self.pairs[index] for index in self.samples.tolist()]
            loader = article_loader(self.task, pairs, self.batch_size)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        return TrainingStep(model, loader, article_loss, optimizer, windows=self.windows)

    def ours(
        self,
        dropout: float = 0.1,
        padded: bool = False,
        fused: bool = True,
        dtype: torch.dtype | None = None,
    ) -> TrainingStep:
        """train.py's step; padded or not fused: what it would be without a part of it."""
        model = self.our_model(dropout)
        loader = self.loader(PaddedDataset if padded else PairDataset)
        optimizer = make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY, fused)
        return TrainingStep(model, loader, our_loss, optimizer, dtype, self.windows)

    def nn_transformer(self, dropout: float, dtype: torch.dtype | None = None) -> TrainingStep:
        """The same batches, loss and optimizer."""
        model = TorchTransformer(self.our_model(dropout), self.num_heads, self.num_layers, dropout)
        model = model.to(self.device)
        optimizer = make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
        return TrainingStep(model, self.loader(), our_loss, optimizer, dtype, self.windows)
