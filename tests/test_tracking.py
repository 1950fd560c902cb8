"""W&B: what an offline run holds; nothing asks for a login; a dead logger stops no training.

The run itself is among the long tests: what it holds arrives online, too, in test_wandb_online.py.
"""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from conftest import PROJECT, TINY

import train as train_script
from transformer_scratch import output, tracking
from transformer_scratch.config import Config, load_config
from transformer_scratch.run_folder import read_metrics

FLAGS = [*TINY, "--log-every", "3", "--debug", "--wandb-project", "lab", "--run-dir", "run"]


def without_account(home: Path) -> dict[str, str]:
    """The environment of a user who has never heard of W&B."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(home), "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> SimpleNamespace:
    """A training without an account on a terminal, where a login prompt could appear.

    It is run from a copy of the project.
    """
    folder = tmp_path_factory.mktemp("offline")
    shutil.copy(PROJECT / "train.py", folder)
    shutil.copytree(PROJECT / "transformer_scratch", folder / "transformer_scratch")
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", *FLAGS],
        cwd=folder,
        env=without_account(folder),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    output = b""
    while b"API key:" not in output:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the process has closed its side
            break
    else:
        process.kill()
        pytest.fail(f"it asks for a login:\n{output.decode()}")
    os.close(terminal)

    tracked = next((folder / "run/wandb").glob("offline-run-*"))
    program = Path(sys.executable).with_name("wandb")
    command = [program, "leet", "inspect", "--json", tracked]
    lines = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=True
    ).stdout.splitlines()
    records: dict[str, list] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return SimpleNamespace(
        exit_code=process.wait(),
        output=output.decode(),
        folder=folder,
        tracked=tracked,
        records=records,
    )


@pytest.mark.slow
def test_without_a_key_it_runs_offline_and_says_how_to_look(offline):
    assert offline.exit_code == 0
    lines = offline.output.split("\r\n")
    (index,) = [number for number, line in enumerate(lines) if line.startswith("wandb ")]
    assert re.search(r"offline \(no API key; `\S*wandb login` once to go online\)", lines[index])
    where = re.escape(str(offline.tracked.relative_to(offline.folder)))
    assert re.fullmatch(rf"look at it: \S*wandb leet {where}", lines[index + 1].strip())
    assert re.fullmatch(rf"upload it:  \S*wandb sync {where}", lines[index + 2].strip())


@pytest.mark.slow
def test_project_name_tags_and_settings(offline):
    (run,) = offline.records["run"]
    assert (run["project"], run["display_name"]) == ("lab", "sn-data-320-head1-dim16-lr0.00689")
    assert run["tags"] == ["debug"]
    saved = json.loads((offline.folder / "run/config.json").read_text(encoding="utf-8"))
    settings = run["config"]["update"]
    assert settings.items() >= saved.items(), "all settings, so that runs can be filtered by any"


@pytest.mark.slow
def test_the_code_is_saved(offline):
    saved = offline.tracked / "files/code/train.py"
    assert saved.read_bytes() == (offline.folder / "train.py").read_bytes()


@pytest.mark.slow
def test_losses_of_every_split_per_step_and_per_epoch(offline):
    history = [row["item"] for row in offline.records["history"]]
    rows = read_metrics(offline.folder / "run")

    def logged(key: str) -> dict[int, float]:
        return {row["step"]: row[key] for row in history if key in row}

    def written(key: str) -> dict[int, float]:
        return {row["step"]: row[key] for row in rows if key in row}

    steps = [*range(3, 20, 3), 10, 20]  # every --log-every steps and at the end of each epoch
    for key in ("train/loss_step", "lr", "grad_norm"):
        assert logged(key) == {step: written(key)[step] for step in sorted(steps)}
    validated = ("train/loss_epoch", "val/loss_epoch", "val/exact_match")
    for key in (*validated, "test/loss_epoch", "test/exact_match"):
        assert logged(key) == written(key) and written(key)
    for split, count in (("val", 2), ("test", 1)):
        losses = [row[f"{split}/loss_step"] for row in history if f"{split}/loss_step" in row]
        by_epoch = list(written(f"{split}/loss_epoch").values())
        assert losses == pytest.approx(by_epoch), "one batch each here"
        assert len(losses) == count


@pytest.mark.slow
def test_the_end_is_announced(offline):
    (alert,) = offline.records["alert"]
    exact = read_metrics(offline.folder / "run")[-1]["test/exact_match"]
    assert alert["title"] == "Training has ended" and f"{exact:.1%}" in alert["text"]
    assert offline.records["exit"][0].get("exit_code", 0) == 0


# ------------------------------------------------------------------------------------ which mode


@pytest.fixture
def no_prompt(monkeypatch):
    """What wandb.login is asked, and what it finds."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    output.warned_of.clear()

    def answer(found) -> None:
        def login(prompt, verify):
            assert prompt is False
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(wandb, "login", login)

    return answer


@pytest.mark.parametrize("requested", ["auto", "online"])
def test_online_only_with_a_key(no_prompt, requested, capsys):
    no_prompt(True)
    assert tracking.choose_mode(requested) == ("online", "you are logged in")
    no_prompt(False)
    assert tracking.choose_mode(requested)[0] == "offline"
    no_prompt(ValueError("API key must be 40 characters long"))
    assert tracking.choose_mode(requested) == ("offline", "the API key was not accepted")
    assert "40 characters" in capsys.readouterr().err


def test_offline_and_disabled_need_no_login(no_prompt, monkeypatch):
    no_prompt(AssertionError("nobody asked for it"))
    assert tracking.choose_mode("offline") == ("offline", "as asked")
    assert tracking.choose_mode("disabled") == ("disabled", "as asked")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.choose_mode("auto") == ("disabled", "WANDB_MODE is set")
    assert tracking.choose_mode("offline") == ("offline", "as asked"), (
        "a flag beats the environment"
    )


# ---------------------------------------------------------------------------- W&B's own variables


@pytest.mark.parametrize(
    ("variable", "argument"),
    [
        ("WANDB_NAME", "name"),
        ("WANDB_RUN_GROUP", "group"),
        ("WANDB_TAGS", "tags"),
        ("WANDB_DIR", "dir"),
        ("WANDB_DISABLE_CODE", "save_code"),
    ],
)
def test_what_the_user_has_set_for_wandb_counts(monkeypatch, tmp_path, variable, argument):
    """wandb reads the variable where the argument is left out."""
    config = Config(lr=0.1, wandb_project="lab")
    monkeypatch.delenv(variable, raising=False)
    assert argument in tracking.settings_of_run(config, tmp_path)
    monkeypatch.setenv(variable, "mine")
    settings = tracking.settings_of_run(config, tmp_path)
    assert argument not in settings and settings["project"] == "lab"


def test_a_flag_beats_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_TAGS", "mine")
    settings = tracking.settings_of_run(Config(lr=0.1, debug=True), tmp_path)
    assert settings["tags"] == ["debug"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert load_config(["--wandb-project", "lab"])[0].wandb_project == "lab"
    assert load_config([])[0].wandb_project == "mine"


def test_disabled_leaves_nothing_of_wandb(train):
    run = train(*TINY, "--max-epochs", 1)
    assert not (run / "wandb").exists() and not Path("wandb").exists()


# -------------------------------------------------------------------------- a logger that dies


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> list[dict]:
    """The metrics of a run whose logger lives."""
    run = tmp_path_factory.mktemp("healthy") / "run"
    train_script.main([*TINY, "--wandb", "disabled", "--run-dir", str(run)])
    return read_metrics(run)


@pytest.mark.parametrize("function", ["log", "init", "finish"])
def test_a_dead_logger_changes_nothing(train, healthy, monkeypatch, capsys, function):
    def dead(*arguments, **options):
        raise ConnectionResetError("the service is gone")

    init = wandb.init
    with monkeypatch.context() as patch:

        def init_and_die(**arguments):
            init(**arguments)  # which sets wandb.log and others anew
            patch.setattr(wandb, function, dead)

        patch.setattr(wandb, "init", dead if function == "init" else init_and_die)
        run = train(*TINY)
    assert read_metrics(run) == healthy
    output = capsys.readouterr()
    assert output.err.count("W&B failed (ConnectionResetError: the service is gone)") == 1
    assert "exact match" in output.out and "best.pt" in output.out
    wandb.finish()
