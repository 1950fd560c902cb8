"""Which folders a new run may take, and which run is the newest."""

import os
import shutil
import time
from pathlib import Path

import numpy
import pytest
import torch
from conftest import TINY

import evaluate as evaluate_script
import train as train_script
from transformer_scratch.config import Config
from transformer_scratch.errors import BadInput, TrainingFault
from transformer_scratch.processes import ALONE
from transformer_scratch.run_folder import RunFolder, create_folder, newest_run, read_metrics

# --------------------------------------------------------- a folder that never got a state


def folder_with(*names: str) -> Path:
    folder = Path("folder")
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock"],
        [".lock", "metrics.jsonl", "config.json.tmp"],
        [".lock", "metrics.jsonl", "config.json"],
        [".lock", "metrics.jsonl", "config.json", "last.pt.4711.tmp"],
    ],
)
def test_what_ended_before_its_first_state_gives_its_folder_back(names):
    folder = folder_with(*names)
    assert create_folder(Config(run_dir=str(folder))) == folder


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["metrics.jsonl"],
        ["config.json", "metrics.jsonl"],
        [".lock", "notes.txt"],
        [".lock", "config.json", "metrics.jsonl", "last.pt"],
        [".lock", "config.json", "metrics.jsonl", "previous.pt"],
        [".lock", "config.json", "metrics.jsonl", "best.pt"],
    ],
)
def test_what_holds_anything_else_is_refused_and_left_alone(names):
    folder = folder_with(*names)
    with pytest.raises(BadInput, match="--run-dir folder is not an empty folder"):
        create_folder(Config(run_dir=str(folder)))
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_ended_before_its_first_state_can_be_begun_again(monkeypatch, capsys, error):
    flags = [*TINY, "--max-epochs", "1", "--wandb", "disabled", "--run-dir", "run"]

    def interrupted(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", interrupted)
        with pytest.raises(SystemExit):
            train_script.main(flags)
    assert Path("run/config.json").exists() and not Path("run/last.pt").exists()
    train_script.main(flags)
    with pytest.raises(SystemExit) as end:
        train_script.main(flags)
    assert end.value.code == 2
    assert "or --resume run" in capsys.readouterr().err


# ------------------------------------------------------------------- numbers of your own


def test_a_tensor_of_any_name_is_fetched_with_the_others():
    """Of an update together with those before it, of an epoch at once; what W&B gets is numbers."""
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    for step in (1, 2):
        loss, mine = torch.tensor(1.0 / step), torch.tensor(step)
        run.record({"step": step, "train/loss_step": loss, "mine": mine})
    assert read_metrics(run.path) == [], "nothing is read before it is asked for"
    newest = run.flush()
    epoch = {"step": 2, "epoch": 0, "mine": torch.tensor(4.0)}
    run.write(epoch)
    assert read_metrics(run.path) == [
        {"step": 1, "train/loss_step": 1.0, "mine": 1},
        newest,
        epoch,
    ]
    assert newest == {"step": 2, "train/loss_step": 0.5, "mine": 2}
    assert epoch == {"step": 2, "epoch": 0, "mine": 4.0}


def test_tensors_of_any_type_and_shape_keep_their_number():
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    odd = 2**24 + 1  # no float32
    mine = {"a": torch.tensor(odd), "b": torch.tensor([[0.5]]), "c": torch.tensor(0.1).double()}
    run.record({"step": 1, "train/loss_step": torch.tensor(1.0), **mine})
    newest = run.flush()
    assert (newest["a"], newest["b"], newest["c"]) == (odd, 0.5, torch.tensor(0.1).item())
    assert isinstance(newest["a"], int)


def test_a_weight_is_noted_as_it_was():
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    weight = torch.nn.Parameter(torch.zeros(2))
    for step in (1, 2):
        with torch.no_grad():
            weight += 1
        loss = torch.tensor(1.0)
        run.record({"step": step, "train/loss_step": loss, "weight": weight[0]})
    run.flush()
    assert [row["weight"] for row in read_metrics(run.path)] == [1.0, 2.0]


def test_in_a_skipped_update_what_is_not_finite_is_left_open():
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    loss, norm, mine = torch.tensor(1.0), torch.tensor(torch.inf), torch.tensor(torch.nan)
    row = {"step": 1, "train/loss_step": loss, "grad_norm": norm, "mine": mine, "fine": 1.0}
    run.record({**row, "skipped": True})
    written = {"step": 1, "train/loss_step": 1.0, "grad_norm": None, "mine": None, "fine": 1.0}
    assert run.flush() == {**written, "skipped": True}
    run.record({**row, "train/loss_step": torch.tensor(torch.inf), "skipped": True})
    with pytest.raises(TrainingFault, match="train/loss_step is inf"):
        run.flush()


@pytest.mark.parametrize("value", [1j, b"1", [1.0], numpy.float32(1)])
def test_what_is_no_number_is_named(value):
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    with pytest.raises(TypeError, match="mine must be a number, or a tensor that holds one"):
        run.write({"step": 1, "mine": value})


def test_a_tensor_of_many_numbers_is_named():
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    with pytest.raises(ValueError, match=r"mine must hold one number, not a tensor of \(2,\)"):
        run.write({"step": 1, "mine": torch.zeros(2)})


def test_a_tensor_of_your_own_that_is_not_finite_ends_the_run():
    run = RunFolder(Config(run_dir="run"), ALONE, None)
    with pytest.raises(TrainingFault, match="bad numbers at step 3: mine is nan"):
        run.write({"step": 3, "mine": torch.tensor(torch.nan)})


# ---------------------------------------------------------------------------- the newest run

HOUR = 3600


@pytest.fixture
def runs():
    """Write runs whose state was saved so many hours ago. -> their folders."""

    def runs(**hours_ago: float | None) -> list[Path]:
        for name, hours in hours_ago.items():
            folder = Path("runs") / name
            folder.mkdir(parents=True, exist_ok=True)
            content = {"model": {"weight": torch.zeros(3)}}
            if hours is not None:
                content["saved_at"] = time.time() - hours * HOUR
            torch.save(content, folder / "last.pt")
        return [Path("runs") / name for name in hours_ago]

    return runs


def date(file: Path, hours_ago: float) -> None:
    when = time.time() - hours_ago * HOUR
    os.utime(file, (when, when))


def test_a_copy_of_an_old_run_is_not_the_newest(runs):
    old, new = runs(b_old=2, a_new=1)
    shutil.copytree(old, "runs/c-copy", copy_function=shutil.copyfile)
    assert newest_run() == new


def test_files_that_were_touched_do_not_count(runs):
    old, new = runs(old=2, new=1)
    date(old / "last.pt", 0)
    date(new / "last.pt", 100)
    assert newest_run() == new


def test_a_run_of_a_clock_that_ran_ahead_is_not_the_newest_for_ever(runs):
    _, new, _ = runs(ahead=-5, new=1, old=2)
    assert newest_run() == new


def test_where_all_clocks_ran_ahead_there_is_a_newest_all_the_same(runs):
    runs(a=-5, b=-6)
    assert newest_run() in (Path("runs/a"), Path("runs/b"))


def test_a_damaged_state_does_not_hide_the_others(runs):
    damaged, new, _ = runs(damaged=0.5, new=1, old=2)
    os.truncate(damaged / "last.pt", 100)
    assert newest_run() == new


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 100), os.remove])
def test_where_last_is_damaged_or_gone_its_previous_counts(runs, damage):
    run, _ = runs(run=0.5, other=1)
    shutil.copy(run / "last.pt", run / "previous.pt")
    damage(run / "last.pt")
    assert newest_run() == run


def test_runs_of_an_older_version_come_after_those_with_a_clock(runs):
    _, new = runs(older_version=None, new=100)
    assert newest_run() == new


def test_among_runs_of_an_older_version_the_file_tells(runs):
    for name, hours in {"a": 3, "b": 2, "c": 4}.items():
        (run,) = runs(**{name: None})
        date(run / "last.pt", hours)
    assert newest_run() == Path("runs/b")


def test_no_run_at_all(runs):
    Path("runs/empty").mkdir(parents=True)
    with pytest.raises(BadInput, match="there is no trained run in runs/"):
        newest_run()


def test_evaluate_takes_the_newest_by_the_clock_in_its_state(train, capsys):
    old, new = (train(*TINY, "--seed", seed, "--max-epochs", 1) for seed in (1, 2))
    shutil.copytree(old, "runs/copied-last", copy_function=shutil.copyfile)
    evaluate_script.main(["--no-pictures"])
    assert f"{new / 'best.pt'}" in capsys.readouterr().out
