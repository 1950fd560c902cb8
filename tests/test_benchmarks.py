"""Every benchmark prints its table, and all it compares do the same work. Nothing here is timed."""

import importlib.util
import json
import sys
import warnings

import pytest
import torch

from benchmarks import decoding, generalisation, gpu, scaling, throughput
from benchmarks.lib.article_baseline import ArticleTransformer, article_loader
from benchmarks.lib.measure import Timing, interleave
from benchmarks.lib.programs import quietly
from benchmarks.lib.training_steps import (
    PaddedDataset,
    TorchTransformer,
    TrainingSteps,
    our_loss,
)
from benchmarks.lib.waits import Waits
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


# ---------------------------------------------------------------------------- the page about a GPU


@pytest.mark.slow
def test_the_page_about_a_gpu_runs_through_on_the_cpu(tmp_path, capsys):
    gpu.main(["--quick", "--accelerator", "cpu", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    tables = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["tables"]
    with_twin = importlib.util.find_spec("pytorch_lightning") is not None
    assert len(tables) == 7 + with_twin
    for title, rows in tables.items():
        assert f"\n{title}\n" in printed and rows
    (article,) = tables["The article's command"]
    assert article["updates"] == "6" and 0 < article["s in steps"] < article["s in all"]


def test_without_a_gpu_the_page_is_refused_in_a_line(capsys):
    for flags in ([], ["--quick"], ["--accelerator", "cpu"]):
        with pytest.raises(SystemExit) as refused:
            gpu.main(flags)
        assert refused.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_table_that_fails_does_not_cost_the_others(capsys):
    page = gpu.Page(torch.device("cpu"), quick=True)
    page.add("fails", lambda page: 1 / 0)
    page.add("exits", lambda page: sys.exit(1))
    page.add("works", lambda page: [{"a": "1"}])
    assert page.missing == ["fails", "exits"] and list(page.tables) == ["works"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_waits_for_a_gpu_are_counted_by_line_also_while_warnings_are_hidden(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = Waits()
    with quietly(), waits.counting():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert waits.count == 3 and modes == ["warn", "default"]
    ((line, count),) = waits.by_line.items()
    assert line.startswith("test_benchmarks.py: warnings.warn(") and count == 3


def test_what_a_program_printed_is_shown_when_it_fails(capsys):
    with pytest.raises(SystemExit), quietly():
        print("why it failed")
        sys.exit(1)
    assert "why it failed" in capsys.readouterr().err


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
        assert not unmoved, f"{name} leaves weights of the model untrained: {unmoved}"


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
