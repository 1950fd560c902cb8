"""Weights & Biases without a question, without an account if need be, and without ever ending a run."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import wandb

from transformer_scratch.config import Config, run_name
from transformer_scratch.data import Splits, Task
from transformer_scratch.evaluation import Prediction, pair_to_show, predict
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import RunFolder
from transformer_scratch.runtime import typed

broken: set[str] = set()


@contextmanager
def never_fatal(name: str) -> Iterator[None]:
    """A logger that dies is worth one warning, not the run."""
    try:
        yield
    except Exception as error:  # wandb raises ConnectionResetError and others outside wandb.Error
        if name not in broken:
            broken.add(name)
            print(f"warning: {name} failed ({type(error).__name__}: {error}); training goes on", file=sys.stderr)


def choose_mode(requested: str) -> tuple[str, str]:
    """-> online, offline or disabled, and why. Never asks for a login, not even where online is asked for."""
    mode, reason = requested, "as asked"
    wanted = {"dryrun": "offline", "run": "online"}.get(os.environ.get("WANDB_MODE"), os.environ.get("WANDB_MODE"))
    if mode == "auto" and wanted in ("online", "offline", "disabled"):
        mode, reason = wanted, "WANDB_MODE is set"
    if mode not in ("auto", "online"):
        return mode, reason
    with never_fatal("the W&B login"):
        if wandb.login(prompt=False, verify=False):
            return "online", "you are logged in"
        return "offline", f"no API key; `{typed('wandb')} login` once to go online"
    return "offline", "the API key was not accepted"


def start_wandb(config: Config, run: RunFolder) -> str:
    """wandb.init, offline when the server does not answer. -> one line on where the run can be seen."""
    mode, reason = choose_mode(config.wandb) if run.is_main else ("disabled", "the main process does it")
    folder = run.path.absolute()  # W&B's own process, which writes the files, may have been started in another folder
    if mode != "disabled":  # W&B leaves copies of artifacts in the home folder; in the run's they go with the run
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
    arguments = {
        "project": config.wandb_project,
        "name": run_name(config),
        "group": run_name(config),  # runs of the same settings, the Lightning twin's too, are drawn over each other
        "tags": ["debug" if config.debug else "run"],
        "config": dataclasses.asdict(config),
        "dir": folder,
        "save_code": True,
        "id": run.wandb_id,
        "resume": "allow" if run.wandb_id else None,
        "settings": wandb.Settings(init_timeout=20, finish_timeout=60, silent=True),
    }
    with never_fatal("W&B"):
        try:
            wandb.init(mode=mode, **arguments)
        except wandb.Error as error:
            mode, reason = "offline", f"W&B did not answer: {str(error).splitlines()[0]}"
            wandb.init(mode=mode, **arguments)
        run.wandb_id = wandb.run.id
        wandb.define_metric("*", step_metric="step")
        for split in ("val", "test"):  # the losses of single batches count batches, not updates
            wandb.define_metric(f"{split}/loss_step", step_metric=f"{split}/batch")
        # The table of runs shows the best epoch, not the last.
        wandb.define_metric("val/loss_epoch", step_metric="step", summary="min")
        wandb.define_metric("val/exact_match", step_metric="step", summary="max")
        where = run.path / "wandb" / Path(wandb.run.dir).parent.name
        line = f"{mode} ({reason})"
        if mode == "online":
            line += f"; {wandb.run.url}"
        if mode == "offline":
            for purpose, command in (("look at it:", "leet"), ("upload it: ", "sync")):
                line += f"\n             {purpose} {typed('wandb')} {command} {quote(str(where))}"
        return line
    return "off, because it could not be started"


def answers_table(answers: list[Prediction], splits: Splits) -> wandb.Table:
    """One line a pair: what was asked, what is right, what the model said."""
    trained = set(splits.train)
    rows = [
        [" ".join(map(str, ids)) for ids in (answer.pair, answer.target, answer.tokens)]
        + [answer.exact, answer.pair not in trained]
        for answer in answers
    ]
    return wandb.Table(columns=["pair", "target", "prediction", "right", "held out"], data=rows)


def log_results(run: RunFolder, model: Transformer, task: Task, splits: Splits) -> None:
    """Every answer of the best weights as a table and a picture, where they look, and online the weights themselves."""
    if wandb.run.disabled:
        return
    from transformer_scratch.plots import draw_run, save_figures  # only here: matplotlib takes a while to start

    with never_fatal("the pictures for W&B"):
        predictions = {answer.pair: answer for answer in predict(model, task, task.all_pairs())}
        figures = draw_run(model, task, splits, predictions, pair_to_show(task, splits.test))
        shown = {name: figures[name] for name in ("answers", "attention_cross", "attention_self")}
        images = {f"pictures/{file.stem}": wandb.Image(str(file)) for file in save_figures(shown, run.path)}
        wandb.log({"test/answers": answers_table(list(predictions.values()), splits), **images})
    if not wandb.run.offline:
        wandb.log_artifact(run.path / "best.pt", name=f"best-{wandb.run.id}", type="model")
