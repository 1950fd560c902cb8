"""The faults of docs/reliability.md, done to the Lightning twin: what happens to a training there.

python -m comparison.faults                  every fault, some minutes
python -m comparison.faults "a loss" ...     those whose name contains a word
"""

import functools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.cloud_io import _load
from pytorch_lightning.callbacks import ModelCheckpoint

from comparison import train_lightning
from transformer_scratch.checkpoint import checksum

PROJECT = Path(__file__).resolve().parent.parent
SMALL = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--num-datas", "192", "--max-epochs", "2",
         "--run-dir", "run"]  # fmt: skip  # two epochs of six updates
OFF = ["--wandb", "disabled"]


class AtStep(pl.Callback):
    """Do something in the middle of an update (from 1), before the optimizer's step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_before_optimizer_step(self, trainer: pl.Trainer, *others: object) -> None:
        if trainer.global_step + 1 == self.step:
            self.action(trainer)


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("touch was_here",)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def make_nan(trainer: pl.Trainer) -> None:
    """A gradient that is no number, which is what a loss that is none leaves."""
    next(trainer.model.parameters()).grad.fill_(torch.nan)


def resume_from(file: Path) -> None:
    """Let Trainer.fit go on from a checkpoint."""
    pl.Trainer.fit = functools.partialmethod(pl.Trainer.fit, ckpt_path=file)


def every_steps(number: int) -> ModelCheckpoint:
    return ModelCheckpoint(
        "run",
        "step={step}",
        every_n_train_steps=number,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )


def hang(trainer: pl.Trainer) -> None:
    Path("waiting").touch()
    while not Path("go on").exists():
        time.sleep(0.05)


def small_files(trainer: pl.Trainer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


# What a child process does: flags and callbacks of the twin, or a change to Lightning before it starts.
CHILDREN = {
    "whole": lambda: train([every_steps(4)]),
    "resumed at the end of an epoch": lambda: (resume_from(Path("run/epoch=0.ckpt")), train([])),
    "resumed in the middle of an epoch": lambda: (resume_from(Path("run/step=4.ckpt")), train([])),
    "SIGTERM": lambda: train([AtStep(9, lambda trainer: send(signal.SIGTERM))]),
    "SIGINT": lambda: train([AtStep(9, lambda trainer: send(signal.SIGINT))]),
    "nan": lambda: train([AtStep(9, make_nan)]),
    "full disk": lambda: train([AtStep(8, small_files)]),
    "waiting": lambda: train([AtStep(9, hang)]),
    "offline": lambda: train([AtStep(9, hang)], ["--wandb", "offline"]),
    "restarted": lambda: train([AtStep(9, die_at_first)]),
}


def die_at_first(trainer: pl.Trainer) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        send(signal.SIGKILL)


def train(callbacks: list, flags: list[str] = OFF) -> None:
    devices = ["--devices", os.environ.get("WORLD_SIZE", "1")]
    train_lightning.main([*SMALL, *flags, *devices], callbacks=callbacks)


def start(child: str, before: tuple = (sys.executable,), **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*before, "-m", "comparison.faults", "--child", child],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options,
    )  # fmt: skip


def run(child: str) -> int:
    return start(child).wait()


def files() -> str:
    return ", ".join(sorted(file.name for file in Path("run").glob("*.ckpt"))) or "none"


def weights(file: str) -> str:
    return checksum(torch.load(file, weights_only=False)["state_dict"])


def resume() -> str:
    run("whole")
    whole = weights("run/epoch=1.ckpt")
    found = []
    for where in ("at the end of an epoch", "in the middle of an epoch"):
        code = run(f"resumed {where}")
        last = max(Path("run").glob("epoch=1*.ckpt"), key=lambda file: file.stat().st_mtime)
        found.append(
            f"{where}: exit code {code}, weights {'equal' if weights(last) == whole else 'differ'}"
        )
    return "; ".join(found)


def stopped(child: str) -> str:
    code = run(child)
    return f"exit code {code}, checkpoints {files()} (stopped in update 9; epoch=0 is update 6)"


def bad_number() -> str:
    code = run("nan")
    state = torch.load("run/epoch=1.ckpt", weights_only=False)["state_dict"]
    finite = all(torch.isfinite(weight).all() for weight in state.values())
    return f"trains on; exit code {code}, weights in epoch=1.ckpt {'finite' if finite else 'not finite'}"


def damaged() -> str:
    run("whole")
    file = Path("run/epoch=0.ckpt")
    content, generator = file.read_bytes(), random.Random(0)
    values = checksum(_load(file, weights_only=True)["state_dict"])
    silent = 0
    for _ in range(300):
        flipped, bit = bytearray(content), generator.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            silent += checksum(_load(file, weights_only=True)["state_dict"]) != values
        except Exception:  # it was noticed
            continue
    file.write_bytes(content[: len(content) // 2])
    code = run("resumed at the end of an epoch")
    torch.save(Hostile(), file)
    run("resumed at the end of an epoch")
    ran = "runs" if Path("was_here").exists() else "does not run"
    return (
        f"of 300 flipped bits {silent} load with other weights and no word; cut in half: exit code {code}; "
        f"a hostile pickle {ran}"
    )


def full_disk() -> str:
    code = run("full disk")
    left = [file.name for file in Path("run").glob("*") if file.is_file()]
    return f"exit code {code}, files {', '.join(sorted(left))}"


def until_it_waits(process: subprocess.Popen) -> None:
    while not Path("waiting").exists():
        if process.poll() is not None:
            raise RuntimeError(
                f"the training ended with exit code {process.returncode} before the fault"
            )
        time.sleep(0.1)


def two_in_a_folder() -> str:
    first = start("waiting")
    until_it_waits(first)
    second = start("whole")
    code = second.wait()
    Path("go on").touch()
    return f"exit codes {first.wait()} and {code}: both write into the folder"


def service_killed() -> str:
    process = start("offline")
    until_it_waits(process)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    Path("go on").touch()
    return f"exit code {process.wait()}, checkpoints {files()}"


def restarted() -> str:
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    process = start("restarted", before=(*torchrun, "--max-restarts", "1"), start_new_session=True)
    try:
        return f"exit code {process.wait(180)}, from the beginning"
    except subprocess.TimeoutExpired:
        process.terminate()
        return "hangs after the restart (stopped after three minutes)"


FAULTS = {
    "stopped and resumed": resume,
    "SIGTERM in an update": lambda: stopped("SIGTERM"),
    "Ctrl-C in an update": lambda: stopped("SIGINT"),
    "a loss that is no number": bad_number,
    "a damaged or hostile checkpoint": damaged,
    "a full disk": full_disk,
    "two trainings in one folder": two_in_a_folder,
    "the W&B process killed": service_killed,
    "a process killed under torchrun --max-restarts 1": restarted,
}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]]()
        return
    for name, measure in FAULTS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            result = measure()
            os.chdir(PROJECT)
        print(f"{name}\n    {result}", flush=True)


if __name__ == "__main__":
    main()
