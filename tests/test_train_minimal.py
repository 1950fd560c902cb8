"""The loop for the whiteboard computes what train.py computes with its features off, to the last
bit."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from metrics import read_metrics, step_losses

import train_minimal
from transformer_scratch.checkpoint import load_checkpoint

FEATURES_OFF = shlex.split(
    "--label-smoothing 0 --clip-norm 0 --warmup-steps 0 --average 0 --amp off"
)
SETTINGS = {
    "SEED": 7,
    "DIM": 16,
    "NUM_HEADS": 2,
    "NUM_LAYERS": 1,
    "DROPOUT": 0.2,
    "NUM_DATAS": 330,
    "BATCH_SIZE": 32,
    "NUM_EPOCHS": 3,
    "LEARNING_RATE": 0.01,
    "WEIGHT_DECAY": 0.05,
}
FLAGS = {"NUM_EPOCHS": "max-epochs", "LEARNING_RATE": "lr"}


@pytest.fixture
def both(train, monkeypatch, capsys):
    """-> a function that trains with train.py and these flags, and with the minimal loop."""
    for name, value in SETTINGS.items():
        monkeypatch.setattr(train_minimal, name, value)
    settings = [
        part
        for name, value in SETTINGS.items()
        for part in ("--" + FLAGS.get(name, name.lower()), value)
    ]

    def run(*flags):
        folder = train(*settings, *FEATURES_OFF, *flags)
        capsys.readouterr()
        return folder, *train_minimal.main(), capsys.readouterr().out

    return run


def test_same_losses_and_weights_to_the_last_bit(both):
    folder, model, losses, printed = both()
    assert losses == step_losses(folder), "train_minimal.py and train.py train different things"
    assert len(losses) == 30
    weights = load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    expected = [
        f"{row['val/loss_epoch']:.4f}" for row in read_metrics(folder) if "val/loss_epoch" in row
    ]
    assert re.findall(r": validation loss ([\d.]+),", printed) == expected


@pytest.mark.slow
def test_the_commands_as_typed_give_the_same_losses(tmp_path):
    """Without the one thread that all other tests are held to."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = "import train_minimal as m; m.NUM_DATAS, m.NUM_EPOCHS = 1024, 1; print(m.main()[1])"
    minimal = [sys.executable, "-c", code]
    flags = ["--accelerator=cpu", "--num-datas=1024", "--max-epochs=1", "--wandb=disabled"]
    full = [sys.executable, "train.py", *FEATURES_OFF, *flags, "--run-dir", str(tmp_path / "run")]
    printed, _ = (
        subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, encoding="utf-8", check=True
        ).stdout
        for command in (minimal, full)
    )
    assert json.loads(printed.splitlines()[-1]) == step_losses(tmp_path / "run")


@pytest.mark.parametrize(
    "flags", [["--clip-norm", "0.5"], ["--warmup-steps", "10"], ["--accumulate", "2"]]
)
def test_a_feature_that_is_on_makes_a_difference(both, flags):
    folder, _, losses, _ = both(*flags)
    assert losses != step_losses(folder)


def test_its_settings_are_those_of_the_default_training():
    from transformer_scratch.config import load_config

    config, _, _, _ = load_config([])
    names = {name: FLAGS.get(name, name.lower()).replace("-", "_") for name in SETTINGS}
    text = (PROJECT / "train_minimal.py").read_text(encoding="utf-8")
    written = {}
    for line in re.findall(r"^([A-Z_, ]+) = (.+)$", text, re.MULTILINE):
        written |= dict(
            zip(line[0].split(", "), [float(value) for value in line[1].split(", ")], strict=True)
        )
    assert written == {name: getattr(config, field) for name, field in names.items()}
    assert len(text.splitlines()) <= 80, "one screen"
