"""A campaign against checkpoints: kills at random moments, flipped bits, cut files.

    python -m tests.reliability.campaign               20 kills, 300 flips, 200 cuts; some minutes
    python -m tests.reliability.campaign --kills 2 --flips 20 --cuts 20

Each kill hits a training of its own, a real process of train.py. It is then resumed, and has to end
like the run that nobody disturbed, bit for bit. Flips and cuts hit a last.pt: it may load as what
it was, or not at all.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from tests.reliability.trainings import fingerprint, steps_done
from transformer_scratch.checkpoint import CheckpointError, checksum, load_checkpoint

PROJECT = Path(__file__).resolve().parents[2]
# Saving after every update takes much of the time, so that random kills often hit a save.
TRAINING = shlex.split(
    "--dim 32 --num-layers 2 --batch-size 64 --num-datas 1920 --max-epochs 2 "
    "--save-every 1 --wandb disabled --run-dir run"
)


@dataclass
class Arguments:
    """Kill trainings, damage checkpoints, count what survives."""

    kills: int = 20
    """Trainings to kill. Every other one dies when a half-written checkpoint is seen."""
    flips: int = 300
    """Bits to flip in a checkpoint, one at a time."""
    cuts: int = 200
    """Lengths to cut a checkpoint to."""
    seed: int = 0
    """Decides the moments, bits and lengths."""


def start(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(folder: Path, inside_a_save: bool, generator: random.Random) -> bool:
    """Start a training and kill it. -> whether it left a half-written checkpoint."""
    run, update = folder / "run", generator.randrange(50)
    process = start(folder, *TRAINING)
    while process.poll() is None and (steps_done(run) < update or not (run / "last.pt").exists()):
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1))
    while inside_a_save and process.poll() is None and not list(run.glob("last.pt.*.tmp")):
        pass
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the training ended by itself with {process.returncode}")
    return bool(list(run.glob("last.pt.*.tmp")))


def kill_many(kills: int, generator: random.Random) -> bool:
    """-> whether all survived."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING).wait()
        undisturbed = fingerprint(Path(folder, "run"))
    inside = survived = 0
    for number in tqdm(range(kills), desc="kills"):
        with tempfile.TemporaryDirectory() as folder:
            inside += kill(Path(folder), number % 2 == 0, generator)
            resumed = start(Path(folder), "--resume", "run").wait() == 0
            survived += resumed and fingerprint(Path(folder, "run")) == undisturbed
    print(
        f"kills: {survived} of {kills} ended like the undisturbed run, bit for bit, when resumed; "
        f"{inside} had died inside a save"
    )
    return survived == kills


def damage_many(flips: int, cuts: int, generator: random.Random) -> bool:
    """Flip bits of a last.pt, and cut it. -> whether no damage was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING, "--max-epochs", "1").wait()
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


def main() -> None:
    arguments = tyro.cli(Arguments)
    generator = random.Random(arguments.seed)
    survived = kill_many(arguments.kills, generator)
    survived &= damage_many(arguments.flips, arguments.cuts, generator)
    print("all survived" if survived else "NOT all survived")
    sys.exit(not survived)


if __name__ == "__main__":
    main()
