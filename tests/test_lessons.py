"""Every lesson shows what its page says. The pages' own commands are run, and their output compared with the pages."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT

import train
from docs.lessons import change_task, leave_one_out, many_processes, mistakes, mixed_precision, one_step
from docs.lessons.small_training import exact, small_model, token_loss, train_small
from transformer_scratch.data import BatchSampler, PairDataset, Task, split_pairs

PAGES = sorted((PROJECT / "docs" / "lessons").glob("[1-9]-*.md"))


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def without_numbers(text: str) -> list[str]:
    """The lines, with # for every number: another processor rounds differently."""
    return [" ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?", "#", line).split()) for line in text.splitlines()]


def test_there_are_seven_pages_and_the_index_names_them():
    assert [page.name[0] for page in PAGES] == list("1234567")
    index = (PROJECT / "docs" / "lessons" / "README.md").read_text()
    for page in PAGES:
        assert f"]({page.name})" in index
        assert len(page.read_text().splitlines()) <= 80, f"{page.name} is not short"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_of_the_page_shows_what_the_page_says(page, tmp_path):
    command, *_ = blocks(page, "bash")[0].splitlines()
    assert command.startswith("python -m docs.lessons.")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, *command.split()[1:]], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 0, finished.stderr
    # A minute on two idle cores; beside other work the same instructions take up to twice the time.
    assert after.ru_utime - before.ru_utime < 120

    output = iter(without_numbers(finished.stdout))
    for line in without_numbers(blocks(page, "text")[0]):
        assert line == "..." or line in output, f"{line!r} is not in the output, or not in this order"


# ------------------------------------------------------------------------------------------------ 1: one step


def test_one_step_is_the_first_step_of_train_py(tiny, tmp_path, capsys):
    loss, grad_norm = one_step.main(tiny)
    train.main([*tiny, "--max-epochs", "1", "--wandb", "disabled", "--run-dir", "run"])
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["train/loss_step"], first["grad_norm"]) == (loss, grad_norm)
    told = capsys.readouterr().out
    for tag in one_step.LIGHTNING_HOOKS:
        assert one_step.line_of_train(tag) in told


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
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def watched(name):
        original = getattr(Step, name)

        def call(self, *arguments, **options):
            calls.append(name)
            return original(self, *arguments, **options)

        return call

    hooks = ("on_", "optimizer_", "configure_gradient", "lr_scheduler_step", "training_step", "transfer_", "backward")
    for name in dir(pl.LightningModule):
        if name.startswith(hooks) and callable(getattr(pl.LightningModule, name)):
            setattr(Step, name, watched(name))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 2)), batch_size=4)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", enable_model_summary=False, **silent).fit(
        Step(), loader
    )
    first, last = calls.index("on_train_epoch_start"), calls.index("on_train_batch_end")
    assert calls[first : last + 1] == expected


# -------------------------------------------------------------------------------------------- 2: the mistakes


@pytest.fixture
def one_batch():
    task = Task()
    data = PairDataset(task, task.all_pairs())
    return data[next(iter(BatchSampler(data, batch_size=100)))]


def test_positions_along_the_batch_cannot_tell_8_4_from_4_8():
    for kind, tells in ((mistakes.Transformer, True), (mistakes.PositionsAlongBatch, False)):
        model = small_model(Task(), kind=kind).eval()
        logits = [model(torch.tensor([[11, *pair, 12]]), torch.tensor([[11]])) for pair in ((8, 4), (4, 8))]
        assert ((logits[0] - logits[1]).abs().max() > 1e-3) == tells


def test_softmax_along_time_is_another_loss(one_batch):
    model = small_model(Task()).eval()
    right = token_loss(model, one_batch)
    assert right.item() == pytest.approx(train.token_loss(model, one_batch).item(), rel=1e-6)
    assert abs(mistakes.softmax_along_time(model, one_batch).item() - right.item()) > 0.1


def test_padding_changes_the_answer_without_a_mask(one_batch):
    source = torch.nn.functional.pad(one_batch.source, (0, 4), value=13)
    for kind, changes in ((mistakes.Transformer, False), (mistakes.NoPaddingMask, True)):
        model = small_model(Task(), kind=kind).eval()
        difference = model(source, one_batch.decoder_input) - model(one_batch.source, one_batch.decoder_input)
        assert (difference.abs().max() > 1e-3) == changes


def test_accumulation_counted_by_batches_is_another_gradient(capsys):
    mistakes.accumulation()
    right, faulty = map(float, capsys.readouterr().out.splitlines()[-1].split()[-2:])
    assert right < 1e-5 and faulty > 1e-2


@pytest.mark.slow
def test_the_mistakes_cost_what_the_page_says(capsys):
    def shares(lesson) -> list[tuple[float, float]]:
        lesson()
        percents = [re.findall(r"([\d.]+)%", line) for line in capsys.readouterr().out.splitlines()]
        return [tuple(map(float, found)) for found in percents if found]

    [(right, faulty)] = shares(mistakes.positions)
    assert right >= 95 and faulty < right - 20
    [(right, faulty)] = shares(mistakes.softmax)
    assert right >= 95 and faulty < right - 10
    unpadded, *padded = shares(mistakes.padding)
    assert unpadded == (100, 100) and all(right == 100 and faulty < 99 for right, faulty in padded)
    attempts = shares(mistakes.evaluation)
    assert len({right for right, _ in attempts}) == 1 and any(faulty < right for right, faulty in attempts)
    [(right, faulty)] = shares(mistakes.leak)
    assert faulty > right + 30


# ------------------------------------------------------------------------------------- 3 to 7, in the same order


def test_the_small_training_learns():
    task = Task()
    splits = split_pairs(task, 0.2, seed=1)
    model = small_model(task, dim=16, num_layers=1)
    assert train_small(model, task, splits.train, steps=60) < 2.64  # what a guess costs
    assert not model.training and 0 <= exact(model, task, splits.val) <= 1


def test_the_scaler_halves_skips_and_grows():
    history = mixed_precision.train_through_an_overflow()
    assert history[0] == (2.0**20, False), "the first step overflows"
    for (scale, moved), (next_scale, _) in itertools.pairwise(history):
        assert next_scale in ((scale, scale * 2) if moved else (scale / 2,))
    assert any(moved for _, moved in history), "some step must succeed"
    assert any(b > a for (a, _), (b, _) in itertools.pairwise(history)), "the scale must grow again"


@pytest.mark.slow
def test_only_a_whole_checkpoint_goes_on_as_before():
    differences = leave_one_out.main()
    assert differences.pop(None) == 0
    assert set(differences) == set(leave_one_out.PARTS) and all(value > 1e-4 for value in differences.values())


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    assert many_processes.main() < 1e-5


@pytest.mark.parametrize(
    ("kind", "digits", "answer"),
    [(change_task.Sort, (3, 1, 2), [1, 2, 3]), (change_task.Reverse, (3, 1, 2), [2, 1, 3]),
     (change_task.Add, (7, 8, 9), [2, 4])],
)  # fmt: skip
def test_other_tasks(kind, digits, answer):
    task = kind()
    assert task.answer(digits) == answer and len(task.all_pairs()) == 1000
    splits = split_pairs(task, 0.2, seed=1)
    assert len(splits.train) == 800 and not set(splits.train) & {*splits.val, *splits.test}
    assert task.encode_source(digits)[:5] == [task.start_id, *digits, task.end_id]


def test_a_task_takes_less_than_thirty_lines():
    lines = (PROJECT / "docs" / "lessons" / "change_task.py").read_text().split('"""')[2].splitlines()
    assert len([line for line in lines if line.strip()]) < 30


def test_the_package_knows_nothing_of_the_lessons():
    for file in [*(PROJECT / "transformer_scratch").glob("*.py"), PROJECT / "train.py", PROJECT / "evaluate.py"]:
        assert "lessons" not in file.read_text() and "exercises" not in file.read_text(), file.name
