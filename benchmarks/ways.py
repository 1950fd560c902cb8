"""The ways to train that throughput.py compares: each is a function that trains its model on the next batch."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.article_baseline import ArticleTransformer, article_loader
from transformer_scratch.blocks import Dropout
from transformer_scratch.data import Batch, BatchSampler, PairDataset, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer


class PaddedDataset(PairDataset):
    """The same batches, as long as seq_len allows."""

    def __getitem__(self, item: tuple[Tensor, int]) -> Batch:
        rows = self.rows[item[0]]
        target = self.target[rows]
        tokens = self.is_token[rows].flatten().nonzero().squeeze(1)
        return Batch(self.source[rows], target[:, :-1], target[:, 1:], tokens, len(tokens), item[1])


class TorchTransformer(nn.Module):
    """nn.Transformer between our embeddings and output matrix, with the masks that padding needs."""

    def __init__(self, ours: Transformer, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        self.ours = ours
        ffn_dim = ours.encoder[0].feed_forward[0].out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor")  # a word about inference
            self.stack = nn.Transformer(ours.dim, num_heads, num_layers, num_layers, ffn_dim, dropout, batch_first=True)
        del ours.encoder, ours.decoder

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        hidden = source == self.ours.pad_id
        x = self.stack(
            self.ours.embed(source, self.ours.source_embedding),
            self.ours.embed(decoder_input, self.ours.target_embedding),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(decoder_input.size(1)),
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
            tgt_is_causal=True,
        )
        return self.ours.output(x)


def padded_loss(model: nn.Module, batch: Batch, pad_id: int) -> Tensor:
    """The loss of a model that computes every position."""
    logits = model(batch.source, batch.decoder_input)
    return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=pad_id)


def packed_loss(model: nn.Module, batch: Batch, pad_id: int) -> Tensor:
    """train.py's own loss."""
    return F.cross_entropy(model(batch.source, batch.decoder_input, batch.tokens), batch.target.flatten()[batch.tokens])


def article_loss(model: nn.Module, batch: list[Tensor], pad_id: int) -> Tensor:
    """Padding counts."""
    source, decoder_input, target = batch
    return F.cross_entropy(model(source, decoder_input).flatten(0, 1), target.flatten())


def training_step(
    model: nn.Module,
    loader: DataLoader,
    loss_function: Callable,
    optimizer: torch.optim.Optimizer,
    pad_id: int,
    dtype: torch.dtype | None = None,
) -> Callable[[], None]:
    """-> what trains the model on the next batch."""
    model.train()
    parameters = list(model.parameters())
    batches = forever(loader)

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = loss_function(model, batch, pad_id)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def with_torch_dropout(model: Transformer) -> Transformer:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return model


class Ways:
    """All ways of one size."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, batch_size: int):
        self.dim, self.num_heads, self.num_layers, self.batch_size = dim, num_heads, num_layers, batch_size
        self.task = Task()
        splits = split_pairs(self.task, 0.2, 42)
        self.data = make_datasets(self.task, splits, 12_800, 42)[0]
        self.padded = PaddedDataset(self.task, splits.train, self.data.rows)

    def loader(self, data: PairDataset) -> DataLoader:
        return make_loader(BatchSampler(data, self.batch_size, True, 42))

    def model(self, dropout: float) -> Transformer:
        return Transformer(self.task.vocab_size, self.dim, self.num_heads, self.num_layers, dropout=dropout)

    def ours(
        self,
        loss_function: Callable = packed_loss,
        data: PairDataset | None = None,
        dropout: float = 0.1,
        torch_dropout: bool = False,
        fused: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Callable[[], None]:
        """train.py's step, or what it would be without one of its parts."""
        model = self.model(dropout)
        model = with_torch_dropout(model) if torch_dropout else model
        optimizer = make_optimizer(model, 1e-4, 0.1, fused)
        return training_step(model, self.loader(data or self.data), loss_function, optimizer, self.task.pad_id, dtype)

    def nn_transformer(self, dropout: float, dtype: torch.dtype | None = None) -> Callable[[], None]:
        model = TorchTransformer(self.model(dropout), self.num_heads, self.num_layers, dropout)
        optimizer = make_optimizer(model, 1e-4, 0.1, fused=True)
        return training_step(model, self.loader(self.data), padded_loss, optimizer, self.task.pad_id, dtype)

    def article(self, item_by_item: bool = True) -> Callable[[], None]:
        """item_by_item: with the article's data set too; otherwise its model on our batches, padded as its own."""
        sizes = (self.task.vocab_size, self.dim, self.num_heads, self.num_layers, 4 * self.dim, 0.1)
        model = ArticleTransformer(*sizes)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        if not item_by_item:
            return training_step(model, self.loader(self.padded), padded_loss, optimizer, self.task.pad_id)
        pairs = [self.data.pairs[row] for row in self.data.rows.tolist()]
        loader = article_loader(self.task, pairs, self.batch_size)
        return training_step(model, loader, article_loss, optimizer, self.task.pad_id)

    def useful_flops(self) -> float:
        """Multiplications and additions of one step on average, padding not counted; backward is twice forward."""
        source = 4  # start, two digits, end
        lengths = self.data.target_lengths[self.data.rows].double()
        target, target_squared = lengths.mean().item(), (lengths**2).mean().item()
        # In products of a vector and a D x D matrix: 4 in an attention (2 of them for its memory), 8 in a feed-forward.
        products = (4 + 8 + 2) * source + (4 + 2 + 8) * target
        attention = 2 * source**2 + 2 * target_squared + 2 * source * target  # scores and weighted sums, in units of D
        macs = self.num_layers * (products * self.dim**2 + attention * self.dim)
        macs += target * self.dim * self.task.vocab_size
        return 3 * 2 * macs * self.batch_size
