"""Every benchmark prints its table, and all it compares do the same work. Nothing here is timed."""

import json

import pytest
import torch

from benchmarks import decoding, generalisation, scaling, throughput
from benchmarks.lib.article_baseline import ArticleTransformer, article_loader
from benchmarks.lib.measure import Timing, interleave
from benchmarks.lib.training_steps import (
    PaddedDataset,
    TorchTransformer,
    TrainingSteps,
    our_loss,
)
from transformer_scratch.batches import BatchIndices, PairDataset
from transformer_scratch.digits import Digits
from transformer_scratch.model import Transformer

TASK = Digits()


# ------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize(
    ("benchmark", "name", "in_table"),
    [
        (
            throughput,
            "throughput-dim16",
            ["| + fused optimizer |", "| nn.Transformer, dropout 0 |"],
        ),
        (decoding, "decoding", ["| 16 | cache |", "| 16 | article, fixed length |"]),
        pytest.param(scaling, "scaling", ["| processes | 2 |"], marks=pytest.mark.slow),
    ],
)
def test_prints_its_table_and_writes_its_files(benchmark, name, in_table, tmp_path, capsys):
    benchmark.main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in in_table), printed
    result = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert result["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_generalisation_counts_what_evaluate_found(monkeypatch, tmp_path, capsys):
    tiny = ["--dim", "16", "--num-layers", "1", "--num-datas", "256", "--max-epochs", "1"]
    monkeypatch.setitem(generalisation.FLAGS, "ten-digits", tiny)
    generalisation.main(["--seeds", "3", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"| 3 | {row['trained']:.1%} | {row['unseen']:.1%} |" in printed
    assert f"| mean | {row['trained']:.1%} | {row['unseen']:.1%} |" in printed
    right = 0.8 * row["trained"] + 0.2 * row["unseen"]
    assert len(row["wrong"]) == round(100 * (1 - right)) > 0, "two updates teach it little"


def test_contenders_take_turns():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "AB"}
    timings = interleave(contenders, rounds=3, description="")
    assert "".join(order) == "BA" + "ABBAAB", "the first round is a warm-up"
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_seconds_that_a_contender_returns_are_taken_and_the_warm_up_is_not():
    contenders = {"A": iter([9.0, 3.0, 1.0, 2.0]).__next__}
    given = interleave(contenders, rounds=3, description="")["A"]
    assert given.seconds == [3.0, 1.0, 2.0] and given.median == 2.0
    assert Timing([4.0, 1.0, 2.0, 3.0, 100.0]).quartiles == (2.0, 4.0)


# -------------------------------------------------------------- what is compared is the same work


def test_the_articles_way_is_padded_dropped_out_everywhere_and_causal():
    torch.manual_seed(0)
    model = ArticleTransformer(TASK.vocab_size, 16, 2, num_layers=2, ffn_dim=64, dropout=0.1)
    loader = article_loader(TASK, TASK.all_pairs(), batch_size=8)
    source, decoder_input, target = next(iter(loader))
    assert (source.shape, decoder_input.shape, target.shape) == ((8, 16), (8, 15), (8, 15))
    dropouts = sum(isinstance(module, torch.nn.Dropout) for module in model.modules())
    embeddings, encoder_block, decoder_block = 1, 1 + 1 + 1, 2 + 1 + 1
    assert dropouts == embeddings + 2 * encoder_block + 2 * decoder_block
    model.eval()
    logits, changed = model(source, decoder_input), decoder_input.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(model(source, changed)[:, :3], logits[:, :3])
    assert not torch.allclose(model(source, changed)[:, 3], logits[:, 3])


def test_every_way_trains_all_weights_of_its_model():
    steps = TrainingSteps(dim=16, num_heads=2, num_layers=1, batch_size=8)
    ways = throughput.from_article_to_ours(steps, torch.bfloat16)
    ways |= throughput.against_torch(steps, None)
    for name, step in ways.items():
        before = {key: weight.detach().clone() for key, weight in step.model.named_parameters()}
        step()
        unmoved = [
            key for key, weight in step.model.named_parameters() if torch.equal(weight, before[key])
        ]
        assert not unmoved, (name, unmoved)


def test_every_way_trains_on_the_same_samples():
    steps = TrainingSteps(dim=16, num_heads=1, num_layers=1, batch_size=32)

    def samples(step) -> list:
        """The answer of each sample; a target is the last or third part of a batch."""
        targets = [target for batch in step.loader for target in batch[2].tolist()]
        return sorted([token for token in target if token != TASK.pad_id] for target in targets)

    articles = samples(steps.article())
    assert len(articles) == 3 * 32
    for step in (steps.article(item_by_item=False), steps.ours(padded=True), steps.ours()):
        assert samples(step) == articles
    assert samples(steps.nn_transformer(0.1)) == articles


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TASK.vocab_size, 32, 2, 2, dropout=0.0).double()


def test_cutting_the_padding_off_changes_neither_loss_nor_gradients():
    indices = BatchIndices(torch.tensor([0, 3, 17, 58]), update_tokens=18, mean_update_tokens=18.0)
    results = []
    for dataset_class in (PairDataset, PaddedDataset):
        model, batch = make_model(), dataset_class(TASK, TASK.all_pairs())[indices]
        loss = our_loss(model, batch)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert batch.target.size(1) == TASK.max_target_len, "the second batch is as long as can be"
    for cut, padded in zip(*results, strict=True):
        torch.testing.assert_close(cut, padded)


def test_nn_transformer_attends_to_neither_padding_nor_later_tokens():
    model = TorchTransformer(make_model(), num_heads=2, num_layers=2, dropout=0.0).double().eval()
    indices = BatchIndices(torch.arange(100), update_tokens=530, mean_update_tokens=530.0)
    batch = PairDataset(TASK, TASK.all_pairs())[indices]
    logits = model(batch.source, batch.decoder_input, source_is_padded=False)

    padded = torch.nn.functional.pad(batch.source, (0, 3), value=TASK.pad_id)
    torch.testing.assert_close(model(padded, batch.decoder_input), logits)
    unmasked = model(padded, batch.decoder_input, source_is_padded=False)
    assert not torch.allclose(unmasked, logits), "without the mask padding would count"

    changed = batch.decoder_input.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(model(padded, changed)[:, :4], logits[:, :4])
