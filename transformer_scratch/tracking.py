"""Weights & Biases: it never asks a question, needs no account, and cannot end a run."""

import dataclasses
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import wandb

from transformer_scratch.commands import shell_command
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import when_main_ends
from transformer_scratch.evaluation import Prediction, pair_to_show, predict
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import RunFolder
from transformer_scratch.task import Splits, Task

warned_of: set[str] = set()


@contextmanager
def never_fatal(name: str) -> Iterator[None]:
    """A logger that dies costs one warning, not the run."""
    try:
        yield
    except Exception as error:  # wandb raises ConnectionResetError and others of its own accord
        if name not in warned_of:
            warned_of.add(name)
            reason = f"{type(error).__name__}: {error}"
            print(f"warning: {name} failed ({reason}); training continues", file=sys.stderr)


def choose_mode(requested: str) -> tuple[str, str]:
    """-> online, offline or disabled, and why. It never asks for a login."""
    mode, reason = requested, "as asked"
    variable = os.environ.get("WANDB_MODE")
    variable = {"dryrun": "offline", "run": "online"}.get(variable, variable)
    if mode == "auto" and variable in ("online", "offline", "disabled"):
        mode, reason = variable, "WANDB_MODE is set"
    if mode not in ("auto", "online"):
        return mode, reason
    with never_fatal("the W&B login"):
        if wandb.login(prompt=False, verify=False):
            return "online", "you are logged in"
        return "offline", f"no API key; `{shell_command('wandb')} login` once to go online"
    return "offline", "the API key was not accepted"


def start_wandb(config: Config, run: RunFolder) -> str:
    """wandb.init; offline when the server does not answer. -> a line on where to see the run."""
    mode, reason = "disabled", "the main process does it"
    if run.is_main:
        mode, reason = choose_mode(config.wandb)
    folder = run.path.absolute()  # W&B's own process may have been started in another folder
    if mode != "disabled" and "WANDB_DATA_DIR" not in os.environ:
        # W&B keeps copies of artifacts: in the run's folder, rather than in the user's home.
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")
        when_main_ends(os.environ.pop, "WANDB_DATA_DIR", None)
    settings = {
        "project": config.wandb_project,
        "name": run_name(config),
        "group": run_name(config),  # the twin's too, so that W&B draws their curves together
        "tags": ["debug" if config.debug else "run"],
        "config": dataclasses.asdict(config),
        "dir": folder,
        "save_code": True,
        "id": run.wandb_id,
        "resume": "allow",
        "settings": wandb.Settings(init_timeout=20, finish_timeout=60, silent=True),
    }
    with never_fatal("W&B"):
        try:
            wandb.init(mode=mode, **settings)
        except wandb.Error as error:
            mode, reason = "offline", f"W&B did not answer: {str(error).splitlines()[0]}"
            # W&B's own process holds on to the id of the attempt that failed.
            run.wandb_id = settings["id"] = uuid.uuid4().hex[:8]
            wandb.init(mode=mode, **settings)
        wandb.define_metric("*", step_metric="step")
        for split in ("val", "test"):  # the losses of single batches count batches, not updates
            wandb.define_metric(f"{split}/loss_step", step_metric=f"{split}/batch")
        # The table of runs shows the best epoch rather than the last.
        wandb.define_metric("val/loss_epoch", step_metric="step", summary="min")
        wandb.define_metric("val/exact_match", step_metric="step", summary="max")
        line = f"{mode} ({reason})"
        if mode == "online":
            line += f"; {wandb.run.url}"
        if mode == "offline":
            files = quote(str(run.path / "wandb" / Path(wandb.run.dir).parent.name))
            line += f"\n             look at it: {shell_command('wandb')} leet {files}"
            line += f"\n             upload it:  {shell_command('wandb')} sync {files}"
        return line
    return "off, because it could not be started"


def answers_table(answers: list[Prediction], splits: Splits) -> wandb.Table:
    """One line a pair: the question, the right answer, the model's answer."""
    trained = set(splits.train)
    rows = [
        [
            " ".join(map(str, answer.pair)),
            " ".join(map(str, answer.target)),
            " ".join(map(str, answer.tokens)),
            answer.exact,
            answer.pair not in trained,
        ]
        for answer in answers
    ]
    return wandb.Table(columns=["pair", "target", "prediction", "right", "held out"], data=rows)


def finish_wandb(run: RunFolder, row: dict, model: Transformer, task: Task, splits: Splits) -> None:
    """Log every answer of the best weights, with pictures, and the weights; announce the end."""
    with never_fatal("W&B"):
        if not wandb.run.disabled:
            log_results(run, model, task, splits)
        exact = f"{row['test/exact_match']:.1%}"
        wandb.alert("Training has ended", f"{run.path.name}: test exact match {exact}")
        wandb.finish()


def log_results(run: RunFolder, model: Transformer, task: Task, splits: Splits) -> None:
    """Answers as a table and as a picture, where the model looks, and, online, its weights."""
    from transformer_scratch.plots import draw_run, save_figures  # matplotlib takes long to import

    with never_fatal("the pictures for W&B"):
        answers = {answer.pair: answer for answer in predict(model, task, task.all_pairs())}
        figures = draw_run(model, task, splits, answers, pair_to_show(task, splits.test))
        shown = {name: figures[name] for name in ("answers", "attention_cross", "attention_self")}
        images = {
            f"pictures/{file.stem}": wandb.Image(str(file))
            for file in save_figures(shown, run.path)
        }
        wandb.log({"test/answers": answers_table(list(answers.values()), splits), **images})
    if not wandb.run.offline:
        wandb.log_artifact(run.path / "best.pt", name=f"best-{wandb.run.id}", type="model")
