"""Each fault of the article's code: planted here, seen by a check, and absent from this project.

Every test has the faulty variant and the check side by side: the check must tell them apart, or it
shows nothing.
"""

import json
import math

import pytest
import torch
from conftest import TINY
from metrics import read_metrics
from samples import Counting, batch_of, padded_batch
from torch.nn import functional as F

import evaluate as evaluate_script
import transformer_scratch.model as model_module
from train import token_loss
from transformer_scratch.attention import padding_mask
from transformer_scratch.batches import PairDataset
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.config import Config
from transformer_scratch.digits import split_pairs
from transformer_scratch.evaluation import Prediction
from transformer_scratch.model import Transformer, positional_encoding
from transformer_scratch.task_of_run import make_task

TASK = make_task(Config())  # the program's
COUNTING = Counting()
PAIRS = [(8, 4), (3, 6), (0, 9), (5, 5)]


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TASK.vocab_size, dim=32, num_heads=1, num_layers=2).double().eval()


def padded(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """source, decoder_input and target, padded to the article's lengths 16, 15 and 15."""
    return padded_batch(TASK, pairs)


class PositionsAlongTheBatch(Transformer):
    """The article's fault: a (max_len, 1, dim) table, cut to the size of axis 0, which is the
    batch."""

    def embed(self, ids, embedding, start=0):
        table = positional_encoding(512, self.dim).to(embedding.weight)[:, None]
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + table[: ids.size(0)])


@pytest.fixture
def faulty(model) -> Transformer:
    faulty = (
        PositionsAlongTheBatch(TASK.vocab_size, dim=32, num_heads=1, num_layers=2).double().eval()
    )
    faulty.load_state_dict(model.state_dict())
    return faulty


def effect_of_swapping_the_source(model: Transformer) -> float:
    """How much the first logits care whether the source says 8 4 or 4 8. With no position in
    time: not at all."""
    source, decoder_input, _ = padded([(8, 4)])
    swapped, _, _ = padded([(4, 8)])
    first = decoder_input[:, :1]
    return (model(source, first) - model(swapped, first)).abs().max().item()


def effect_of_the_row(model: Transformer) -> float:
    """How much a sample's logits change with its place in the batch."""
    source, decoder_input, _ = padded(PAIRS)
    logits, flipped = (
        model(source, decoder_input),
        model(source.flip(0), decoder_input.flip(0)).flip(0),
    )
    return (logits - flipped).abs().max().item()


def test_positions_run_along_time(model, faulty):
    assert effect_of_swapping_the_source(model) > 1e-2
    assert effect_of_swapping_the_source(faulty) < 1e-9, "the fault: order is invisible"
    assert effect_of_the_row(model) < 1e-9
    assert effect_of_the_row(faulty) > 1e-2, "the fault: the row in the batch is visible"


def test_the_softmax_runs_over_the_vocabulary():
    """cross_entropy takes the classes on axis 1.

    Given (batch, time, vocab) and targets as probabilities, it silently takes the times for
    classes.
    """
    batch = batch_of(PairDataset(TASK, PAIRS))
    torch.manual_seed(0)
    logits = torch.randn(*batch.target.shape, TASK.vocab_size, dtype=torch.float64)
    probabilities = logits.exp() / logits.exp().sum(dim=2, keepdim=True)
    right = probabilities.gather(2, batch.target[..., None]).squeeze(2)
    expected = -right[batch.target != TASK.pad_id].log().mean().item()

    def network(source, decoder_input, source_is_padded):
        return logits

    assert token_loss(network, batch, TASK.pad_id).item() == pytest.approx(expected, rel=1e-9)
    faulty = F.cross_entropy(logits, F.one_hot(batch.target, TASK.vocab_size).double()).item()
    assert faulty != pytest.approx(expected, rel=0.05)


def test_padding_is_no_key(model, monkeypatch):
    """The padding behind a source must not change what is read from it."""
    source, decoder_input, _ = padded(PAIRS)

    def effect_of_padding() -> float:
        return (
            (model(source, decoder_input) - model(source[:, :4], decoder_input)).abs().max().item()
        )

    assert effect_of_padding() < 1e-9
    monkeypatch.setattr(
        model_module, "padding_mask", lambda ids, pad_id: torch.ones_like(padding_mask(ids, pad_id))
    )
    assert effect_of_padding() > 1e-2, "the fault: every key counts"


def test_padding_is_not_in_the_loss(model):
    """A pair's loss must not change with the longer pairs beside it, which decide how much
    padding it gets."""
    data = PairDataset(COUNTING, PAIRS)
    rows = range(len(PAIRS))

    def alone_and_together(loss_sum) -> tuple[float, float]:
        together = loss_sum(batch_of(data))
        return sum(loss_sum(batch_of(data, [row])) for row in rows), together

    def ours(batch) -> float:
        return token_loss(model, batch, COUNTING.pad_id).item() * batch.num_tokens

    def faulty(batch) -> float:
        logits = model(batch.source, batch.decoder_input)
        return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="sum").item()

    alone, together = alone_and_together(ours)
    assert together == pytest.approx(alone, rel=1e-9)
    alone, together = alone_and_together(faulty)
    assert together != pytest.approx(alone, rel=0.05), "the fault: padding is learned too"


def test_padding_is_not_in_the_accuracy(capsys):
    """An answer that is wrong from its first token to its last gets 0, not a point for every
    pad behind it."""
    target = [*COUNTING.answer((8, 4)), COUNTING.end_id]
    wrong = Prediction((8, 4), [0, 0, 0, 0, 0, 0, COUNTING.end_id], [target])
    evaluate_script.print_article_block(COUNTING, wrong)
    assert "accuracy    : 0\n" in capsys.readouterr().out
    padding = [TASK.pad_id] * TASK.seq_len
    with_padding = zip((wrong.tokens + padding)[:16], (target + padding)[:16], strict=True)
    assert sum(got == expected for got, expected in with_padding) / 16 > 0.5, (
        "what the fault would print"
    )


def test_evaluation_is_in_eval_mode(train, monkeypatch):
    """What train.py and evaluate.py report is what the weights give without dropout."""

    def reported_and_true() -> list[tuple[float, float]]:
        run = train(*TINY, "--dropout", 0.5, "--max-epochs", 1)
        evaluate_script.main(["--run", str(run), "--no-pictures"])
        weights = load_checkpoint(run / "best.pt")["model"]
        network = Transformer(TASK.vocab_size, dim=16, num_layers=1)
        network.load_state_dict(weights)
        network.train(False)

        def true_loss(pairs) -> float:
            with torch.no_grad():
                batch = batch_of(PairDataset(TASK, pairs))
                return token_loss(network, batch, TASK.pad_id).item()

        splits = split_pairs(TASK, 0.2, 42)
        return [
            (read_metrics(run)[-2]["val/loss_epoch"], true_loss(splits.val)),
            (read_metrics(run)[-1]["test/loss_epoch"], true_loss(splits.test)),
            (
                json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["loss"],
                true_loss(TASK.all_pairs()),
            ),
        ]

    for reported, true in reported_and_true():
        assert reported == pytest.approx(true, rel=1e-5)
    monkeypatch.setattr(Transformer, "eval", lambda self: self.train())
    for reported, true in reported_and_true():
        assert reported != pytest.approx(true, rel=1e-3), "the fault: dropout stays on"


def test_no_held_out_pair_is_ever_trained_on(train, monkeypatch):
    """All batches that a training really fetches, looked at."""
    getitem = PairDataset.__getitem__
    fetched = []

    def watched(dataset, item):
        batch = getitem(dataset, item)
        fetched.append((dataset, [tuple(pair) for pair in batch.source[:, 1:3].tolist()]))
        return batch

    monkeypatch.setattr(PairDataset, "__getitem__", watched)

    def trained_pairs(*flags) -> set:
        fetched.clear()
        train(*TINY, "--batch-size", 160, *flags)
        training_data = fetched[0][0]
        return {pair for dataset, pairs in fetched for pair in pairs if dataset is training_data}

    splits = split_pairs(TASK, 0.2, 42)
    held_out = {*splits.val, *splits.test}
    trained = trained_pairs()
    assert len(held_out) == 20 and len(trained) > 60 and not trained & held_out
    assert len(trained_pairs("--holdout", 0) & held_out) > 10, (
        "the article's way: all splits share all pairs"
    )


def test_the_chance_rate_is_that_of_a_token(capsys, train):
    """One token of 14, not 1 / seq_len."""
    run = train(*TINY, "--max-epochs", 1)
    assert "right one time in 14" in capsys.readouterr().out
    evaluate_script.main(["--run", str(run), "--no-pictures"])
    assert "chance rate : 0.07143\n" in capsys.readouterr().out
    assert f"{1 / TASK.seq_len:.4g}" == "0.0625", "what the article prints"


def test_the_checkpoint_carries_its_settings(train, capsys):
    """No flag of the training is repeated, whatever they were."""
    flags = "--dim 24 --num-heads 3 --num-layers 2 --ffn-dim 40 --num-categories 6 --seq-len 11"
    flags += " --holdout 0.1 --no-tie-embeddings --batch-size 32 --num-datas 64 --max-epochs 1"
    run = train(*flags.split())
    evaluate_script.main(["--no-pictures"])
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert len(result["predictions"]) == 36
    assert "chance rate : 0.1\n" in capsys.readouterr().out
