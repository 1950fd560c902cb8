"""A campaign against runs: kills and signals at random moments, flipped bits, cut files.

    python -m tests.reliability.campaign               about half an hour
    python -m tests.reliability.campaign --stops 2 --flips 20 --cuts 20

Each stop hits a training of its own, a real process of train.py that logs to a stand-in for W&B's
server, which comes and goes. The training is then resumed, and has to end like the run that nobody
disturbed, bit for bit. Then all that W&B has on the disk is uploaded, and what it still lacks is
counted. Flips and cuts hit a last.pt: it may load as what it was, or not at all.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tests.reliability.trainings import fingerprint, steps_done
from tests.wandb_server import WandbServer
from transformer_scratch.checkpoint import CheckpointError, checksum, load_checkpoint
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.run_folder import read_metrics

PROJECT = Path(__file__).resolve().parents[2]
# Saving after every update takes much of the time, so that random kills often hit a save.
TRAINING = shlex.split(
    "--dim 32 --num-layers 2 --batch-size 64 --num-datas 1920 --max-epochs 2 "
    "--save-every 1 --log-every 5 --run-dir run"
)


@dataclass
class Arguments:
    """Stop trainings, damage checkpoints, count what survives."""

    stops: int = 20
    """Trainings to stop by each of the signals."""
    signals: tuple[str, ...] = ("SIGKILL", "SIGTERM", "SIGHUP")
    """What to stop them by."""
    flips: int = 300
    """Bits to flip in a checkpoint, one at a time."""
    cuts: int = 200
    """Lengths to cut a checkpoint to."""
    seed: int = 0
    """Decides the moments, bits and lengths."""


def start(folder: Path, *flags: str, **environment: str) -> subprocess.Popen:
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *flags],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=output,
            stderr=output,
        )


@contextmanager
def server_that_comes_and_goes(generator: random.Random) -> Iterator[WandbServer]:
    """Up for some seconds, then down in one way or another."""
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.wait(generator.uniform(2, 6)):
            server.mode = generator.choice(["refused", "hanging", 500])
            ended.wait(generator.uniform(1, 4))
            server.mode = "healthy"

    with WandbServer() as server:
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            yield server
        finally:
            ended.set()
            thread.join()


def stop(process: subprocess.Popen, run: Path, number: int, generator: random.Random) -> bool:
    """Stop a training at a random moment. -> whether it left a half-written checkpoint."""
    update, inside_a_save = generator.randrange(50), generator.random() < 0.5
    while process.poll() is None and (steps_done(run) < update or not (run / "last.pt").exists()):
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1))
    while inside_a_save and process.poll() is None and not list(run.glob("last.pt.*.tmp")):
        pass
    process.send_signal(number)
    expected = -number if number == signal.SIGKILL else 128 + number
    if process.wait() != expected:
        raise RuntimeError(f"the training ended with {process.returncode}, not {expected}")
    return bool(list(run.glob("last.pt.*.tmp")))


def stop_many(number: signal.Signals, stops: int, generator: random.Random) -> bool:
    """-> whether all survived."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING, WANDB_MODE="disabled").wait()
        undisturbed = fingerprint(Path(folder, "run"))
    counts = Counter()
    for _ in tqdm(range(stops), desc=number.name):
        with (
            tempfile.TemporaryDirectory() as name,
            server_that_comes_and_goes(generator) as server,
        ):
            folder, run = Path(name), Path(name, "run")
            environment = server.environment(folder / "home")
            process = start(folder, *TRAINING, **environment)
            counts["inside a save"] += stop(process, run, number, generator)
            counts["lacking rows before"] += bool(missing_rows(run, server))
            ended = start(folder, "--resume", "run", **environment).wait()
            counts["survived"] += ended == 0 and fingerprint(run) == undisturbed
            missing = missing_rows(run, server)
            output = (folder / "output.txt").read_text(encoding="utf-8")
            said = "W&B has not got everything" in output or "wandb        offline" in output
            counts["lacking rows"] += bool(missing)
            counts["lacking rows in silence"] += bool(missing) and not said
            server.mode = "healthy"
            upload(folder, environment)
            counts["lacking rows after wandb sync"] += bool(missing_rows(run, server))
    print(f"{number.name}: {stops}, " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    return counts["survived"] == stops


def missing_rows(run: Path, server: WandbServer) -> set[int]:
    """The updates that were due for W&B, and that its server does not have."""
    rows = [row for row in read_metrics(run) if "train/loss_step" in row]
    due = {row["step"] for row in rows if row["step"] % 5 == 0}
    histories = [received.history for received in server.runs.values()]
    return due - {row["step"] for rows in histories for row in rows if "train/loss_step" in row}


def upload(folder: Path, environment: dict[str, str]) -> None:
    """Everything that W&B has on the disk."""
    parts = sorted(folder.glob("run/wandb/*run-*"), key=lambda part: part.name.split("run-")[1])
    command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *map(str, parts)]
    environment = {**os.environ, **environment}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)


def damage_many(flips: int, cuts: int, generator: random.Random) -> bool:
    """Flip bits of a last.pt, and cut it. -> whether no damage was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING, "--max-epochs", "1", WANDB_MODE="disabled").wait()
        file = Path(folder, "run/last.pt")
        content, values = file.read_bytes(), checksum(load_checkpoint(file))

        def load(damaged: bytes) -> str:
            file.write_bytes(damaged)
            try:
                same = checksum(load_checkpoint(file)) == values
            except CheckpointError:
                return "refused"
            return "loaded with the same values" if same else "LOADED WITH OTHER VALUES"

        flipped, cut = Counter(), Counter()
        for _ in tqdm(range(flips), desc="flips"):
            damaged, bit = bytearray(content), generator.randrange(8 * len(content))
            damaged[bit // 8] ^= 1 << bit % 8
            flipped[load(bytes(damaged))] += 1
        lengths = [0, 1, len(content) - 1]
        lengths += [generator.randrange(len(content)) for _ in range(cuts - len(lengths))]
        for length in tqdm(lengths, desc="cuts"):
            cut[load(content[:length])] += 1
    for name, outcomes in (("flipped bits", flipped), ("cut files", cut)):
        print(f"{name}:", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return "LOADED WITH OTHER VALUES" not in flipped and set(cut) == {"refused"}


@exits_cleanly
def main() -> None:
    arguments = tyro.cli(Arguments)
    generator = random.Random(arguments.seed)
    # A campaign that is started by nohup must not hand down that SIGHUP is ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    survived = all(
        stop_many(signal.Signals[name], arguments.stops, generator) for name in arguments.signals
    )
    survived &= damage_many(arguments.flips, arguments.cuts, generator)
    print("all survived" if survived else "NOT all survived")
    sys.exit(not survived)


if __name__ == "__main__":
    main()
