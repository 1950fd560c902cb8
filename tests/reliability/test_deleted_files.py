"""Files of a run that somebody deletes, to make room or by mistake: a warning, and it goes on.

best.pt never becomes a worse one in silence; what is computed does not change.
"""

import functools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plants import act_at_step, chain, signal_at_step
from trainings import NEW, RESUME, SMALL, fingerprint

import evaluate as evaluate_script
from transformer_scratch import output
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.config import Config
from transformer_scratch.processes import ALONE
from transformer_scratch.run_folder import RunFolder

RUN = Path("run")
BEST = RUN / "best.pt"
# Epoch 0 has the lowest validation loss of the first three.
# Epochs get worse, the first is the best.
WORSE = [*SMALL, "--lr=0.3", "--warmup-steps=0", "--average=0", "--seed=2"]
WORSE += ["--label-smoothing=0", "--weight-decay=0.1"]
ONE = ["--save-top-k", "1"]
slow = pytest.mark.slow


# ----------------------------------------------------------------------- the ranking and best.pt


class Epochs:
    """A run folder in which epochs end as in train.py; the weights of an epoch are its number."""

    def __init__(self, top_k: int, *losses: float):
        output.warned_of.clear()
        self.run, self.top_k = RunFolder(Config(run_dir="run"), ALONE, None), top_k
        self.ranking, self.count = [], 0
        for loss in losses:
            self.end(loss)

    def end(self, loss: float) -> None:
        self.ranking = sorted([*self.ranking, [loss, self.count]])[: self.top_k]
        weights = {"weight": torch.tensor([float(self.count)])}
        self.run.save_best(self.ranking, self.count, step=0, model=weights)
        self.count += 1


def delete(*names: str) -> None:
    for name in names:
        for file in RUN.glob(name):
            file.unlink()


def damage(file: Path) -> None:
    """As a file of its own: best.pt and the epoch's are one otherwise."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


def epoch_in_best() -> int:
    return int(load_checkpoint(BEST)["model"]["weight"])


KEPT, REPLACED = "best.pt still holds its weights", "the next best takes its place as best.pt"


@pytest.mark.parametrize(
    ("top_k", "losses", "deleted", "next_loss", "best", "said"),
    # said: the files in the warnings, and what becomes of best.pt
    [
        pytest.param(1, [0.1], ["epoch=*"], 0.2, 0, {"epoch=0": KEPT}, id="the only one"),
        pytest.param(1, [0.1], ["epoch=*"], 0.05, 1, {}, id="one that is beaten"),
        pytest.param(
            1, [0.1], ["*"], 0.2, 1, {"epoch=0": REPLACED}, id="all, and nothing else is ranked"
        ),
        pytest.param(10, [0.3, 0.1, 0.2], ["epoch=1.pt"], 0.4, 1, {"epoch=1": KEPT}, id="the best"),
        pytest.param(
            10,
            [0.3, 0.1, 0.2],
            ["epoch=1.pt", "best.pt"],
            0.4,
            2,
            {"epoch=1": REPLACED},
            id="the best and best.pt",
        ),
        pytest.param(
            10,
            [0.3, 0.1, 0.2],
            ["*.pt"],
            0.25,
            3,
            {"epoch=1": REPLACED, "epoch=2": REPLACED},
            id="all",
        ),
        pytest.param(10, [0.3, 0.1, 0.2], ["epoch=2.pt"], 0.4, 1, {}, id="one that is not best"),
        pytest.param(10, [0.3, 0.1, 0.2], ["best.pt"], 0.4, 1, {}, id="best.pt"),
        pytest.param(10, [0.1], ["config.json", ".lock"], 0.4, 0, {}, id="what nobody reads"),
    ],
)
def test_a_deleted_file_costs_a_warning(capsys, top_k, losses, deleted, next_loss, best, said):
    epochs = Epochs(top_k, *losses)
    delete(*deleted)
    epochs.end(next_loss)
    assert epoch_in_best() == best
    wanted = [f"warning: run/{file}.pt is gone; {what}" for file, what in said.items()]
    assert capsys.readouterr().err.splitlines() == wanted


def test_a_damaged_best_is_mended_from_its_epoch(capsys):
    epochs = Epochs(10, 0.1)
    damage(BEST)
    epochs.end(0.2)
    assert epoch_in_best() == 0


def test_a_damaged_best_does_not_count_for_a_deleted_epoch(capsys):
    epochs = Epochs(10, 0.3, 0.1)
    delete("epoch=1.pt")
    damage(BEST)
    epochs.end(0.2)
    assert epoch_in_best() == 2
    assert f"run/epoch=1.pt is gone; {REPLACED}" in capsys.readouterr().err


def test_a_second_loss_of_the_same_weights_is_said_too(capsys):
    """Once a warning has said that best.pt still holds them, best.pt is deleted as well."""
    epochs = Epochs(10, 0.1, 0.2)
    delete("epoch=0.pt")
    epochs.end(0.3)
    epochs.end(0.4)
    assert capsys.readouterr().err.count(KEPT) == 1
    delete("best.pt")
    epochs.end(0.5)
    assert epoch_in_best() == 1
    assert capsys.readouterr().err == f"warning: run/epoch=0.pt is gone; {REPLACED}\n"


@pytest.mark.parametrize(("deleted", "tested"), [(["best.pt"], 0), (["best.pt", "epoch=0.pt"], 1)])
def test_what_is_deleted_before_the_test_is_said_there(capsys, deleted, tested):
    epochs = Epochs(10, 0.1, 0.2)
    delete(*deleted)
    content = epochs.run.load_best(epochs.ranking)
    assert int(content["model"]["weight"]) == tested
    said = capsys.readouterr().err
    assert f"warning: run/best.pt: no such file; using epoch={tested}.pt instead" in said


# ---------------------------------------------------------------------------------- whole trainings


def without_epochs(prints: dict) -> dict:
    """A fingerprint without the files of single epochs."""
    return {key: value for key, value in prints.items() if "epoch=" not in key}


@slow
def test_all_epochs_deleted_and_trained_on(run, undisturbed):
    """The only ranked one is gone, best.pt is whole, and no later epoch is better."""
    assert run(*WORSE, *NEW, *ONE)[0] == 0
    assert load_checkpoint(BEST)["epoch"] == 0
    delete("epoch=*.pt")
    code, said = run(*RESUME, "--max-epochs", "3")
    assert code == 0, said
    assert said.count(f"warning: run/epoch=0.pt is gone; {KEPT}") == 1
    wanted = undisturbed(*WORSE, *ONE, "--max-epochs", "3")
    assert without_epochs(fingerprint(RUN)) == without_epochs(wanted)


@slow
def test_the_best_epoch_deleted_and_trained_on(run, undisturbed):
    """Ten are kept, the best is gone: best.pt must not become the second best in silence."""
    assert run(*WORSE, *NEW)[0] == 0
    delete("epoch=0.pt")
    code, said = run(*RESUME, "--max-epochs", "3")
    assert code == 0, said
    assert said.count(f"warning: run/epoch=0.pt is gone; {KEPT}") == 1
    wanted = undisturbed(*WORSE, "--max-epochs", "3")
    assert without_epochs(fingerprint(RUN)) == without_epochs(wanted)
    assert fingerprint(RUN)["best.pt"] == wanted["epoch=0.pt"]


def delete_while_training(*names: str):
    """In the middle of the second epoch."""
    return functools.partial(act_at_step, 9, functools.partial(delete, *names))


@slow
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["last.pt"], []),
        (["config.json", ".lock", "previous.pt"], []),
        (["metrics.jsonl"], ["run/metrics.jsonl was gone; its rows are written anew"]),
        (["*"], ["run/metrics.jsonl was gone; its rows are written anew"]),
    ],
)
def test_what_is_deleted_while_training_changes_no_number(run, undisturbed, names, said):
    code, text = run(*SMALL, *NEW, plant=delete_while_training(*names))
    assert code == 0, text
    assert text.count("warning: ") == len(said) and all(part in text for part in said)
    assert without_epochs(fingerprint(RUN)) == without_epochs(undisturbed(*SMALL))


@slow
def test_metrics_deleted_before_a_stop_are_there_for_the_resume(run, undisturbed):
    stop = functools.partial(signal_at_step, 10, signal.SIGTERM)
    plant = chain(delete_while_training("metrics.jsonl"), stop)
    assert run(*SMALL, *NEW, plant=plant)[0] == 143
    code, said = run(*RESUME)
    assert code == 0 and "warning" not in said
    assert fingerprint(RUN) == undisturbed(*SMALL)


@slow
def test_a_folder_that_gets_another_name_ends_the_run_where_it_can_be_resumed(run, undisturbed):
    plant = functools.partial(act_at_step, 9, functools.partial(os.rename, "run", "elsewhere"))
    code, said = run(*SMALL, *NEW, plant=plant)
    assert code == 1
    assert "Traceback" not in said
    assert "could not be written" in said and "The folder is gone" in said
    assert run("--resume", "elsewhere")[0] == 0
    assert fingerprint(Path("elsewhere")) == undisturbed(*SMALL)


@slow
def test_a_folder_that_is_deleted_ends_the_run_with_one_line(run):
    plant = functools.partial(act_at_step, 9, functools.partial(shutil.rmtree, "run"))
    code, said = run(*SMALL, *NEW, plant=plant)
    assert code == 1
    assert "Traceback" not in said
    assert "could not be written" in said and "The folder is gone" in said


@slow
def test_evaluation_needs_neither_config_nor_metrics_nor_best(run, capsys):
    assert run(*SMALL, *NEW)[0] == 0
    delete("config.json", "metrics.jsonl", "best.pt")
    evaluate_script.main(["--run", "run", "--no-pictures"])
    said = capsys.readouterr()
    assert "warning: run/best.pt: no such file; using epoch=" in said.err
    assert "run/evaluation.json" in said.out
