"""W&B online: what a training sends arrives whole at a stand-in for its server."""

import json
from types import SimpleNamespace

import pytest
from conftest import PROJECT, TINY
from trainings import Training
from wandb_server import WandbServer

from transformer_scratch.run_folder import read_metrics

FLAGS = [*TINY, "--log-every", "3", "--debug", "--wandb-project", "lab", "--run-dir", "run"]
NAME = "sn-data-320-head1-dim16-lr0.00689"


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> SimpleNamespace:
    """A training while all is well. -> what it printed and left behind, what the server has."""
    folder = tmp_path_factory.mktemp("online")
    with WandbServer() as server:
        training = Training(FLAGS, folder=folder, **server.environment(folder / "home"))
        training.start()
        code, output = training.wait()
    assert code == 0, output
    [(id, run)] = server.runs.items()
    return SimpleNamespace(
        folder=folder,
        output=output,
        server=server,
        id=id,
        run=run,
        metrics=read_metrics(folder / "run"),
    )


def logged(run, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in run.history if key in row}


def test_it_says_where_to_look_and_complains_of_nothing(online):
    url = f"{online.server.url}/learner/lab/runs/{online.id}"
    assert f"wandb        online (you are logged in); {url}\n" in online.output
    assert "warning" not in online.output and "still uploading" not in online.output


def test_settings_tags_and_group(online):
    saved = json.loads((online.folder / "run/config.json").read_text(encoding="utf-8"))
    assert online.run.config.items() >= saved.items()
    settings = online.run.settings
    assert (settings["displayName"], settings["groupName"]) == (NAME, NAME)
    assert (settings["project"], settings["tags"]) == ("lab", ["debug"])


def test_every_row_arrives_once(online):
    history = online.run.history
    assert [row["_step"] for row in history] == list(range(len(history)))
    steps = {*range(3, 20, 3), 10, 20}  # every --log-every steps, and at the end of each epoch
    for key in ("train/loss_step", "lr", "grad_norm"):
        assert logged(online.run, key) == {
            row["step"]: row[key] for row in online.metrics if row["step"] in steps and key in row
        }
    for key in (
        "train/loss_epoch",
        "val/loss_epoch",
        "val/exact_match",
        "test/loss_epoch",
        "test/exact_match",
    ):
        assert logged(online.run, key) == {
            row["step"]: row[key] for row in online.metrics if key in row
        }, key
    batches = {
        split: [row[f"{split}/batch"] for row in history if f"{split}/batch" in row]
        for split in ("val", "test")
    }
    assert batches == {"val": [0, 1], "test": [0]}
    assert (online.run.complete, online.run.exit_code) == (True, 0)


def test_the_table_of_runs_shows_the_best_epoch(online):
    losses = logged(online.run, "val/loss_epoch").values()
    assert online.run.summary["val/loss_epoch"] == {"min": min(losses)}


@pytest.mark.parametrize(("key", "pairs"), [("val/answers", 10), ("test/answers", 100)])
def test_tables(online, key, pairs):
    logs = [row[key] for row in online.run.history if key in row]
    assert len(logs) == (2 if key == "val/answers" else 1)
    tables = [json.loads(online.run.files[log["path"]]) for log in logs]
    assert all(table["columns"][:2] == ["pair", "target"] for table in tables)
    assert all(len(table["data"]) == pairs for table in tables)


def test_pictures(online):
    logs = [row for row in online.run.history if any(key.startswith("pictures/") for key in row)]
    pictures = {
        key: value["path"]
        for row in logs
        for key, value in row.items()
        if key.startswith("pictures/")
    }
    assert pictures.keys() == {
        f"pictures/{name}" for name in ("answers", "attention_cross", "attention_self")
    }
    assert all(online.run.files[path].startswith(b"\x89PNG") for path in pictures.values())


def test_the_code(online):
    assert online.run.files["code/train.py"] == (PROJECT / "train.py").read_bytes()


def test_the_end_is_announced(online):
    (alert,) = online.run.alerts
    assert alert["title"] == "Training has ended"
    assert f"{online.metrics[-1]['test/exact_match']:.1%}" in alert["text"]


def test_the_best_weights_arrive_and_are_not_copied_into_the_users_home(online):
    (model,) = [
        artifact for artifact in online.server.artifacts.values() if artifact.type == "model"
    ]
    assert model.name == f"best-{online.id}" and model.committed
    weights = (online.folder / "run/best.pt").read_bytes()
    assert model.files["best.pt"] == weights
    copies = [file for file in (online.folder / "home").rglob("artifacts/**/*") if file.is_file()]
    assert not copies
