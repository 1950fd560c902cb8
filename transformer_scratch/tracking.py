"""Weights & Biases: it never asks a question, needs no account, and neither ends nor delays a run.

Everything that may wait for its server is called in a thread of its own, in order. At the end that
thread gets 50 seconds; what is then not uploaded lies in the run's folder, for `wandb sync`.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import wandb

from transformer_scratch.commands import path_argument, shell_command, shorter
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import Stopped, exit_code_so_far, when_main_ends
from transformer_scratch.evaluation import Prediction, example_to_show, predict
from transformer_scratch.model import Transformer
from transformer_scratch.output import warn_once, warned_of
from transformer_scratch.run_folder import RunFolder, read_metrics
from transformer_scratch.signals import Signals
from transformer_scratch.task import Task
from transformer_scratch.wandb_process import Service, synced

# Seconds. How long to wait for W&B when a run has ended, and when a signal has stopped it: whoever
# sends SIGTERM soon kills.
PATIENCE, PATIENCE_WHEN_STOPPED = 50, 4
START_TIMEOUT = 20
MOST_ROWS = 200  # of a table of answers
# Seconds that a table waits for the server to say whether it knows another of that name. W&B asks
# only in order to complain early, but would wait 20 seconds for the answer, at every table.
TABLE_TIMEOUT = 0.01

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"


@contextmanager
def never_fatal(name: str) -> Iterator[None]:
    """A logger that dies costs one warning, not the run."""
    try:
        yield
    except (Exception, SystemExit) as error:  # wandb raises what it likes
        warn_once(name, f"{name} failed ({type(error).__name__}: {error}); training continues")


# ------------------------------------------------------------------------------ W&B's own thread

thread: ThreadPoolExecutor | None = None


def in_background(function: Callable, *arguments: object) -> Future:
    """Call a function in W&B's thread, after everything that was asked for before."""

    def call() -> object:
        with never_fatal("W&B"):
            return function(*arguments)

    return thread.submit(call)


def ends_in_time(call: Future, seconds: float, signals: Signals, notice: str) -> bool:
    """Wait for a call in the background. -> whether it ended before time was up or a signal came.

    notice: what to say when it takes long.
    """
    heard, start, patient = signals.received, time.monotonic(), True
    while not call.done() and signals.received == heard and time.monotonic() < start + seconds:
        if patient and time.monotonic() > start + 4:
            print(notice, file=sys.stderr)
            patient = False
        wait([call], timeout=0.1)
    return call.done()


# ----------------------------------------------------------------------------- start of a run


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


def start_wandb(config: Config, run: RunFolder, signals: Signals) -> str:
    """Begin a run in W&B; offline when the server does not answer. -> where to see it."""
    global thread
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="W&B")
    service = Service(run)
    when_main_ends(end_wandb, signals, service)
    started = in_background(open_run, config, run, service)
    if not ends_in_time(started, PATIENCE, signals, "waiting for W&B to answer"):
        return "off, because it did not start in time"
    return started.result() or "off, because it could not be started"


def open_run(config: Config, run: RunFolder, service: Service) -> str:
    """wandb.init. -> a line on where to see the run."""
    if service.is_ours and run.is_main and config.wandb != "disabled":
        wandb.setup(wandb.Settings(silent=True))
    mode, reason = "disabled", "the main process does it"
    if run.is_main:
        mode, reason = choose_mode(config.wandb)
    settings = {
        **settings_of_run(config, run.path),
        "config": dataclasses.asdict(config),
        "id": run.wandb_id,
        "resume": "allow",
        "reinit": "finish_previous",
        "settings": wandb.Settings(
            init_timeout=START_TIMEOUT,
            silent=True,
            x_transaction_log_flush_interval=1,  # to the disk every second, not every 15
            # Found also when it was started from another folder.
            program_abspath=str(SCRIPT),
            program_relpath=SCRIPT.name,
        ),
    }
    if mode != "disabled":
        service.start()
    earlier_parts = unfinished_parts(run)
    try:
        if mode == "online" and earlier_parts:
            upload(earlier_parts, run.path)
        wandb.init(mode=mode, **settings)
    except wandb.Error as error:
        mode, reason = "offline", f"W&B did not answer: {str(error).splitlines()[0]}"
        # To ask whether the key is right takes the server, too, which may be what failed.
        refused = isinstance(error, wandb.errors.AuthenticationError) and "verif" not in str(error)
        if "401" in str(error) or refused:
            reason = f"W&B refused the key; `{shell_command('wandb')} login --relogin`"
        # Its process holds on to the run that could not begin.
        service.kill()
        service.start()
        wandb.init(mode=mode, **settings)
    define_axes(wandb.run)
    if mode == "online" and earlier_parts:
        send_missing_rows(run)
    line = f"{mode} ({reason})"
    if mode == "online":
        service.files = files_of_run()
        wandb.run._public_api()._service_api._timeout = TABLE_TIMEOUT
        line += f"; {wandb.run.url}"
    if mode == "offline":
        look_at = to_upload = path_argument(files_of_run())
        if earlier_parts:  # a resumed run: leet shows the parts side by side, sync needs each
            look_at = path_argument(Path(files_of_run()).parent)
            parts = [*map(shorter, earlier_parts), files_of_run()]
            to_upload = " ".join(["--no-skip-online", *map(path_argument, parts)])
        line += f"\n             look at it: {shell_command('wandb')} leet {look_at}"
        line += f"\n             upload it:  {shell_command('wandb')} sync {to_upload}"
    return line


def settings_of_run(config: Config, folder: Path) -> dict:
    """Arguments of wandb.init. What the user has set in W&B's own variables it finds by itself."""
    ours = {
        "name": ("WANDB_NAME", run_name(config)),
        "group": ("WANDB_RUN_GROUP", run_name(config)),  # the twin's, too: their curves together
        "tags": ("WANDB_TAGS", ["run"]),
        "dir": ("WANDB_DIR", folder.absolute()),
        "save_code": ("WANDB_DISABLE_CODE", True),
    }
    settings = {"project": config.wandb_project}
    for name, (variable, value) in ours.items():
        if variable not in os.environ:
            settings[name] = value
    if config.debug:
        settings["tags"] = ["debug"]
    return settings


def unfinished_parts(run: RunFolder) -> list[Path]:
    """The folders of what W&B has recorded of this run before, and not uploaded; the oldest first.

    Their names are run-<time>-<id> and offline-run-<time>-<id>.
    """
    files = [file for file in run.path.glob("wandb/*run-*/*.wandb") if not synced(file).exists()]
    parts = [file.parent.absolute() for file in files]
    return sorted(parts, key=lambda part: part.name.split("run-")[1])


def upload(parts: list[Path], folder: Path) -> None:
    """Upload what is on the disk, before new rows follow. Raises wandb.Error when it takes long.

    folder: where `wandb sync` leaves a log.
    """
    command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *parts]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=START_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise wandb.Error("the upload of the run's earlier part took too long") from None


def send_missing_rows(run: RunFolder) -> None:
    """Rows that were lost with W&B's process, which writes to the disk once a second.

    Those of the last update that arrived come twice: its epoch's row has the same number.
    """
    known = wandb.run.summary.get("step", 0)
    for row in read_metrics(run.path):
        if row["step"] >= known:
            wandb.log(row)


def define_axes(run: wandb.Run) -> None:
    """What the curves are drawn over: updates; for the losses of single batches, batches."""
    run.define_metric("*", step_metric="step")
    for split in ("val", "test"):
        run.define_metric(f"{split}/loss_step", step_metric=f"{split}/batch")
    # The table of runs shows the best epoch rather than the last.
    run.define_metric("val/loss_epoch", step_metric="step", summary="min")
    run.define_metric("val/exact_match", step_metric="step", summary="max")


def files_of_run() -> str:
    """The folder of this run's files, as `wandb sync` takes it."""
    return shorter(Path(wandb.run.dir).parent)


# ----------------------------------------------------------------------------- tables and pictures


def answers_table(answers: list[Prediction], task: Task) -> wandb.Table:
    """A line for each of the first answers: the question, what is right, what the model says."""
    rows = [
        [
            task.source_text(answer.pair),
            " or ".join(task.target_texts(answer.pair)),
            task.text(answer.tokens),
            answer.exact,
            not task.was_trained(answer.pair),
        ]
        for answer in answers[:MOST_ROWS]
    ]
    return wandb.Table(columns=["pair", "target", "prediction", "right", "held out"], data=rows)


def log_table(step: int, name: str, answers: list[Prediction], task: Task) -> None:
    """Send a table of answers to W&B."""
    in_background(lambda: wandb.log({"step": step, name: answers_table(answers, task)}))


def log_results(run: RunFolder, row: dict, model: Transformer, task: Task) -> None:
    """Log the test's numbers, answers of the best weights, and the weights."""
    in_background(wandb.log, row)
    if wandb.run is None or wandb.run.disabled:
        return
    with never_fatal("the answers for W&B"):
        log_answers(run, row["step"], model, task)
    if not wandb.run.offline:
        in_background(upload_weights, run.path / "best.pt")
    exact = f"{row['test/exact_match']:.1%}"
    in_background(wandb.alert, "Training has ended", f"{run.path.name}: test exact match {exact}")


def log_answers(run: RunFolder, step: int, model: Transformer, task: Task) -> None:
    """Answers as a table and as a picture, and where the model looks for one."""
    from transformer_scratch.plots import draw_run, save_pictures  # matplotlib takes long to import

    example = example_to_show(task, task.splits.test[: task.most_answers])
    answers = predict(model, task, task.splits.every()[: task.most_answers])
    log_table(step, "test/answers", answers, task)
    pictures = draw_run(model, task, answers, example)
    shown = {name: pictures[name] for name in pictures if name not in ("positions", "masks")}
    for file in save_pictures(shown, run.path / "pictures"):
        in_background(wandb.log, {"step": step, f"pictures/{file.stem}": wandb.Image(str(file))})


def upload_weights(file: Path) -> None:
    """As an artifact, of which W&B keeps no copy: the weights are on the disk already."""
    artifact = wandb.Artifact(f"best-{wandb.run.id}", type="model")
    artifact.add_file(str(file), skip_cache=True, policy="immutable")
    wandb.log_artifact(artifact)


# ------------------------------------------------------------------------------- end of a run


def end_wandb(signals: Signals, service: Service) -> None:
    """Finish the run in W&B. Where its server does not answer, say how to upload the rest later."""
    global thread
    exit_code, stopped = exit_code_so_far(), signals.received
    patience = PATIENCE_WHEN_STOPPED if stopped else PATIENCE
    ended = in_background(service.end, exit_code)
    notice = f"W&B is still uploading, for {patience} seconds at most; Ctrl-C ends it"
    if not (ends_in_time(ended, patience, signals, notice) and ended.result()):
        warned_of.add("W&B")  # what its thread now complains of is said here
        service.kill()
        if service.files:
            files = path_argument(service.files)
            print(
                "warning: W&B has not got everything; metrics.jsonl has all numbers. Upload what "
                f"lies on the disk with: {shell_command('wandb')} sync --no-skip-online {files}",
                file=sys.stderr,
            )
    thread.shutdown(wait=False, cancel_futures=True)
    thread = None
    service.give_back()
    if signals.received and not stopped and not exit_code:
        raise Stopped(signals.received, "after the training was done")
