"""What a lab finds in W&B, read back from an offline run with W&B's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from transformer_scratch import plots, tracking
from transformer_scratch.config import Config
from transformer_scratch.digits import Digits
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import read_metrics
from transformer_scratch.task_of_run import make_task


@pytest.fixture
def offline_run(script, tiny, tmp_path, monkeypatch) -> SimpleNamespace:
    """A tiny training, tracked offline. -> its records, W&B's summary of it, and its files.

    It is started from a program that uses W&B itself, as a notebook may. A child finds its parent's
    W&B process in the environment, and that one works in the parent's folder.
    """
    notebook = tmp_path / "notebook"
    notebook.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(notebook)
        with wandb.init(mode="offline"):
            assert "WANDB_SERVICE" in os.environ
            flags = [*tiny, "--wandb", "offline", "--run-dir", "run"]
            finished = script("train.py", *flags, cwd=tmp_path, WANDB_MODE="offline")
        wandb.teardown()
    assert finished.returncode == 0, finished.stderr
    folder = next(tmp_path.glob("run/wandb/offline-run-*"))

    def inspect(*options: str) -> str:
        program = Path(sys.executable).with_name("wandb")
        command = [program, "leet", "inspect", *options, "--json", folder]
        result = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert result.returncode == 0, result.stderr or result.stdout
        return result.stdout

    records = [json.loads(line) for line in inspect().splitlines()]
    return SimpleNamespace(
        folder=folder,
        records=records,
        summary=json.loads(inspect("--summary")),
        metrics=read_metrics(tmp_path / "run"),
        stderr=finished.stderr,
    )


@pytest.mark.slow  # the quick tests have another offline run, in test_tracking.py
def test_an_offline_run_holds_what_a_lab_looks_at(offline_run):
    summary, records = offline_run.summary["summary"], offline_run.records
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    epochs = [row for row in offline_run.metrics if "val/loss_epoch" in row]

    # A table of answers for each validation, and at the end one of the answers to all pairs.
    tables = sorted(offline_run.folder.glob("files/media/table/val/*.json"))
    assert len(tables) == len(epochs) == 2
    table = json.loads(tables[0].read_text(encoding="utf-8"))
    assert table["columns"] == ["pair", "target", "prediction", "right", "held out"]
    assert len(table["data"]) == 10 and all(row[4] for row in table["data"])
    (file,) = offline_run.folder.glob("files/media/table/test/*.json")
    everything = json.loads(file.read_text(encoding="utf-8"))
    assert len(everything["data"]) == 100 and sum(row[4] for row in everything["data"]) == 20
    rows = {row[0]: row for row in everything["data"]}
    (right,) = make_task(Config()).target_texts((8, 4))
    assert rows["8 4"][1] == right and rows["8 4"][3] == (rows["8 4"][1] == rows["8 4"][2])

    # Pictures, speed, norms and learning rate.
    assert {"pictures/answers", "pictures/attention_cross", "pictures/attention_self"} < set(
        summary
    )
    assert all(row["tokens/s"] > 0 for row in history if "val/loss_epoch" in row)
    assert any("grad_norm" in row and "lr" in row for row in history)

    # The best epoch stands in the table of runs, and the x axis is the update.
    assert summary["val/loss_epoch"] == {"min": min(row["val/loss_epoch"] for row in epochs)}
    assert summary["val/exact_match"] == {"max": max(row["val/exact_match"] for row in epochs)}
    defined = [record["metric"] for record in records if record.get("metric")]
    axes = {m.get("name", m.get("glob_name")): m["step_metric"] for m in defined}
    assert axes["*"] == axes["val/loss_epoch"] == axes["val/exact_match"] == "step"
    assert axes["val/loss_step"] == "val/batch"

    # The article's steps: filter runs by their arguments, see the command line and the console.
    assert offline_run.summary["config"]["num_datas"] == 320
    assert offline_run.summary["tags"] == ["run"]
    environments = [record.get("environment", {}) for record in records]
    arguments = next(found["args"] for found in environments if "args" in found)
    assert any(argument.startswith("--num-datas") for argument in arguments)
    assert any("val exact match" in line["line"] for line in offline_run.summary["console"])
    group = next(record["run"]["run_group"] for record in records if record["type"] == "run")
    assert group == offline_run.summary["name"]

    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert not any(artifact["type"] == "model" for artifact in artifacts)
    assert "warning" not in offline_run.stderr.lower()


@pytest.mark.parametrize(
    ("mode", "uploads", "draws"),
    [("online", True, True), ("offline", False, True), ("disabled", False, False)],
)
def test_weights_are_uploaded_online_and_pictures_drawn_where_someone_looks(
    mode, uploads, draws, monkeypatch, tmp_path
):
    uploaded, drawn, alerts = [], [], []

    def draw_run(*arguments: object) -> dict:
        drawn.append("run")
        return dict.fromkeys(("answers", "attention_cross", "attention_self"))

    started = SimpleNamespace(offline=mode == "offline", disabled=mode == "disabled", id="abc")
    monkeypatch.setattr(tracking, "in_background", lambda function, *given: function(*given))
    monkeypatch.setattr(tracking, "upload_weights", uploaded.append)
    monkeypatch.setattr(wandb, "run", started)
    monkeypatch.setattr(wandb, "log", lambda row: None)
    monkeypatch.setattr(wandb, "alert", lambda title, text: alerts.append(text))
    monkeypatch.setattr(plots, "draw_run", draw_run)
    monkeypatch.setattr(plots, "save_pictures", lambda pictures, folder: [])
    task = Digits()
    model = Transformer(vocab_size=14, dim=16, num_layers=1).eval()
    run, row = SimpleNamespace(path=tmp_path / "run"), {"step": 9, "test/exact_match": 0.25}
    tracking.log_results(run, row, model, task)
    assert alerts == ["run: test exact match 25.0%"] * draws
    assert uploaded == [tmp_path / "run/best.pt"] * uploads
    assert bool(drawn) == draws
