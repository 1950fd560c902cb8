"""The programs of the lessons show what their pages say; test_pages.py types their commands."""

import itertools
import re
import runpy
import sys
import textwrap

import pytest
import torch
from conftest import PROJECT

import train
from docs.lessons import (
    leave_one_out,
    many_processes,
    mistakes,
    mixed_precision,
    one_step,
    unseen_pairs,
)
from docs.lessons.small_training import exact, one_batch, small_model, token_loss, train_small
from transformer_scratch.batches import PairDataset
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import read_metrics

LESSONS = PROJECT / "docs" / "lessons"
PAGES = sorted(LESSONS.glob("[1-9]-*.md"))
PROGRAMS = [
    file.stem for file in LESSONS.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")
]


def blocks(page, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_index_names_every_page():
    index = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert PAGES
    for page in PAGES:
        assert f"]({page.name})" in index


def test_the_index_names_programs_that_are_there():
    index = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"python -m docs\.lessons\.(\w+)", index)) == set(PROGRAMS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_argument_ends_the_program_with_exit_code_2(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "bogus"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"docs.lessons.{name}", run_name="__main__")
    output = capsys.readouterr()
    assert ended.value.code == 2 and "bogus" in output.err and not output.out


# ----------------------------------------------------------------------------------- 1: one step


def test_one_step_is_the_first_step_of_train_py(tiny, tmp_path, capsys):
    loss, grad_norm = one_step.main(tiny)
    train.main([*tiny, "--max-epochs", "1", "--wandb", "disabled", "--run-dir", "run"])
    first = read_metrics(tmp_path / "run")[0]
    assert (first["train/loss_step"], first["grad_norm"]) == (loss, grad_norm)
    output = capsys.readouterr().out
    for tag in one_step.LIGHTNING_HOOKS:
        assert one_step.line_of_train(tag) in output


def test_one_step_refuses_bad_input_as_train_py_does(capsys):
    with pytest.raises(SystemExit) as ended:
        one_step.main(["--dim", "30", "--num-heads", "4"])
    assert ended.value.code == 2 and "not divisible" in capsys.readouterr().err


@pytest.mark.comparison
def test_lightning_calls_these_hooks_in_this_order():
    import pytorch_lightning as pl

    expected = [name for names in one_step.LIGHTNING_HOOKS.values() for name in names]
    calls = []

    class Step(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    def watched(name):
        original = getattr(Step, name)

        def call(self, *arguments, **options):
            calls.append(name)
            return original(self, *arguments, **options)

        return call

    hooks = ("on_", "optimizer_", "configure_gradient", "lr_scheduler_step", "training_step")
    hooks += ("transfer_", "backward")
    for name in dir(pl.LightningModule):
        if name.startswith(hooks) and callable(getattr(pl.LightningModule, name)):
            setattr(Step, name, watched(name))
    dataset = torch.utils.data.TensorDataset(torch.randn(4, 2))
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Step(), torch.utils.data.DataLoader(dataset, batch_size=4))
    first, last = calls.index("on_train_epoch_start"), calls.index("on_train_batch_end")
    assert calls[first : last + 1] == expected


# ------------------------------------------------------------------------------- 2: the mistakes


@pytest.fixture
def batch():
    task = Digits()
    return one_batch(PairDataset(task, task.all_pairs()))


def test_positions_along_the_batch_cannot_tell_8_4_from_4_8():
    for kind, tells in ((mistakes.Transformer, True), (mistakes.PositionsAlongBatch, False)):
        model = small_model(Digits(), kind=kind).eval()
        start = torch.tensor([[11]])
        logits, swapped = (
            model(torch.tensor([[11, *pair, 12]]), start) for pair in ((8, 4), (4, 8))
        )
        assert ((logits - swapped).abs().max() > 1e-3) == tells


def test_softmax_along_time_is_another_loss(batch):
    model = small_model(Digits()).eval()
    right = token_loss(model, batch)
    assert right.item() == pytest.approx(train.token_loss(model, batch, 13).item(), rel=1e-6)
    assert abs(mistakes.softmax_along_time(model, batch).item() - right.item()) > 0.1


def test_padding_changes_the_answer_without_a_mask(batch):
    padded = torch.nn.functional.pad(batch.source, (0, 4), value=13)
    for kind, changes in ((mistakes.Transformer, False), (mistakes.NoPaddingMask, True)):
        model = small_model(Digits(), kind=kind).eval()
        logits, of_padded = (
            model(source, batch.decoder_input) for source in (batch.source, padded)
        )
        assert ((logits - of_padded).abs().max() > 1e-3) == changes


def test_accumulation_counted_by_batches_is_another_gradient(capsys):
    mistakes.accumulation(mistakes.Arguments())
    right, faulty = map(float, capsys.readouterr().out.splitlines()[-1].split()[-2:])
    assert right < 1e-5
    assert faulty > 1e-2, "the lesson's batches have equal numbers of tokens: nothing is shown"


@pytest.mark.slow
def test_the_mistakes_cost_what_the_page_says(capsys):
    def shares(lesson) -> list[tuple[float, float]]:
        lesson(mistakes.Arguments())
        percents = [re.findall(r"([\d.]+)%", line) for line in capsys.readouterr().out.splitlines()]
        return [tuple(map(float, found)) for found in percents if found]

    [(right, faulty)] = shares(mistakes.positions)
    assert right >= 95 and faulty < right - 20
    [(right, faulty)] = shares(mistakes.softmax)
    assert right >= 95 and faulty < right - 10
    unpadded, *padded = shares(mistakes.padding)
    assert unpadded == (100, 100) and all(right == 100 and faulty < 99 for right, faulty in padded)
    attempts = shares(mistakes.evaluation)
    assert len({right for right, _ in attempts}) == 1
    assert any(faulty < right for right, faulty in attempts)
    [(right, faulty)] = shares(mistakes.leak)
    assert faulty > right + 30


# ------------------------------------------------------------------- 3 to 7, in the same order


def test_the_small_training_learns():
    task = Digits()
    splits = split_pairs(task, 0.2, seed=1)
    model = small_model(task, dim=16, num_layers=1)
    assert train_small(model, task, splits.train, steps=100) < 2.64  # what a guess costs
    assert not model.training and 0 <= exact(model, task, splits.val) <= 1


def test_a_longer_training_starts_as_a_shorter_one():
    task, seen = Digits(), {}

    def note(step):
        seen.setdefault(step, []).append(model.output.weight.detach().clone())

    for steps in (3, 5):
        model = small_model(task, dim=16, num_layers=1)
        train_small(model, task, task.all_pairs(), steps, after_step=note)
    assert sorted(seen) == [1, 2, 3, 4, 5]
    for step in (1, 2, 3):
        short, long = seen[step]
        assert short.equal(long)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--seeds"], "--seeds"),
        (["--holdout", "0"], "no unseen pair"),
        (["--holdout", "0.9"], "0.68 or less"),
    ],
)
def test_unseen_pairs_refuses_what_it_cannot_measure(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        unseen_pairs.main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_first_the_pairs_then_the_rule_and_better_first_weights_sooner():
    (trained, unseen), later = unseen_pairs.train_and_ask(
        unseen_pairs.PyTorchStart, (900, 1800), 0.2, seed=1
    )
    assert trained >= 0.8 and unseen <= trained - 0.2, "at 900 steps it has learned by heart"
    assert later[1] >= unseen + 0.2, "at 1,800 it has found the rule"
    [(trained, unseen)] = unseen_pairs.train_and_ask(Transformer, (300,), 0.2, seed=1)
    assert trained >= 0.95 and unseen >= 0.8


def test_the_scaler_halves_skips_and_grows():
    history = mixed_precision.train_through_an_overflow()
    assert history[0] == (2.0**20, False), "the first step overflows"
    for (scale, moved), (next_scale, _) in itertools.pairwise(history):
        assert next_scale in ((scale, scale * 2) if moved else (scale / 2,))
    assert any(moved for _, moved in history), "some step must succeed"
    scales = [scale for scale, _ in history]
    assert any(b > a for a, b in itertools.pairwise(scales)), "the scale must grow again"


def test_from_the_scale_that_pytorch_starts_with_no_step_is_skipped():
    assert all(moved for _, moved in mixed_precision.train_through_an_overflow(start=16))


def test_a_skipped_update_of_train_py_leaves_the_learning_rate():
    rows = mixed_precision.watch_train_py(start=20)
    assert rows[0].get("skipped") and not rows[-1].get("skipped")
    for row, after in itertools.pairwise(rows):
        assert (after["lr"] == row["lr"]) == bool(row.get("skipped"))


@pytest.mark.slow
def test_only_a_complete_checkpoint_resumes_the_same_run():
    differences = leave_one_out.main()
    assert differences.pop(None) == 0
    assert set(differences) == set(leave_one_out.PARTS)
    assert all(value > 1e-4 for value in differences.values())


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    assert many_processes.main() < 1e-5


def test_the_page_shows_the_lines_that_write_the_file():
    [page] = [page for page in PAGES if "your-own" in page.name]
    code = (LESSONS / "sorted_letters.py").read_text(encoding="utf-8")
    [shown] = blocks(page, "python")
    assert len(shown.splitlines()) == 3 and textwrap.indent(shown, "    ") in code


def test_the_program_knows_nothing_of_the_lessons():
    scripts = [PROJECT / name for name in ("train.py", "train_minimal.py", "evaluate.py")]
    for file in [*(PROJECT / "transformer_scratch").glob("*.py"), *scripts]:
        text = file.read_text(encoding="utf-8")
        assert "lessons" not in text and "exercises" not in text, file.name
