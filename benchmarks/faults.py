"""A campaign against checkpoints: kills at random moments, flipped bits, cut files. All must be survived.

    python -m benchmarks.faults               20 kills, 300 flips, 200 cuts; some minutes
    python -m benchmarks.faults --quick

Every kill hits a training of its own, real processes of train.py. It is resumed once, and its weights, optimizer,
schedule, generators and metrics have to be those of the run that nobody disturbed. Flips and cuts hit a last.pt: it may
load as what it was, or not at all.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.measure import Options, save_json
from transformer_scratch.checkpoint import CheckpointError, checksum, load_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
# A state after every update: much of the time goes into saving, so that kills at random moments often hit a save.
TRAINING = "--dim 32 --num-layers 2 --batch-size 64 --num-datas 1920 --max-epochs 2 --save-every 1 --wandb disabled"


@dataclass
class Arguments(Options):
    """Kill trainings, damage checkpoints, count what survives."""

    kills: int = 20
    """Trainings to kill. Every other one dies inside a save, as soon as a half written file is seen."""
    flips: int = 300
    """Bits to flip in a checkpoint, one at a time."""
    cuts: int = 200
    """Lengths to cut a checkpoint to."""
    seed: int = 0
    """Decides the moments, bits and lengths."""


def start(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def outcome(run: Path) -> dict:
    """All that a run has come to; how it was started and the clock are left out."""
    last = load_checkpoint(run / "last.pt")
    state = {
        name: checksum(value) for name, value in last.items() if name not in ("wandb_id", "config", "metrics_size")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state["metrics"] = [{name: value for name, value in line.items() if "per_second" not in name} for line in lines]
    state["best"] = checksum(load_checkpoint(run / "best.pt")["model"])
    return state


def kill(folder: Path, inside_a_save: bool, generator: random.Random) -> tuple[int, bool]:
    """Start a training and kill it. -> the updates it had saved, and whether it died with a half written file."""
    run, update = folder / "run", generator.randrange(50)
    process = start(folder, *TRAINING.split(), "--run-dir", "run")
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b'"lr"') < update or not (run / "last.pt").exists():
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.1))
    while inside_a_save and process.poll() is None and not list(run.glob("last.pt.*.tmp")):
        pass
    process.kill()
    process.wait()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the training ended by itself with {process.returncode}: it was too short to be killed")
    return load_checkpoint(run / "last.pt")["step"], bool(list(run.glob("last.pt.*.tmp")))


def kill_many(arguments: Arguments) -> dict:
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING.split(), "--run-dir", "run").wait()
        undisturbed = outcome(Path(folder, "run"))
    inside = survived = 0
    steps = []
    for number in tqdm(range(arguments.kills), desc="kills", mininterval=0.2 if sys.stderr.isatty() else 15):
        with tempfile.TemporaryDirectory() as folder:
            step, in_save = kill(Path(folder), number % 2 == 0, generator)
            steps.append(step)
            inside += in_save
            resumed = start(Path(folder), "--resume", "run").wait() == 0
            survived += resumed and outcome(Path(folder, "run")) == undisturbed
    return {"tried": arguments.kills, "survived": survived, "inside a save": inside, "at updates": sorted(steps)}


def damage_many(arguments: Arguments) -> tuple[dict, dict]:
    """Flip bits of a last.pt, and cut it. -> what came of the flips, what of the cuts."""
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), *TRAINING.split(), "--run-dir", "run", "--max-epochs", "1").wait()
        file = Path(folder, "run/last.pt")
        content, values = file.read_bytes(), checksum(load_checkpoint(file))

        def load(damaged: bytes) -> str:
            file.write_bytes(damaged)
            try:
                return "unchanged" if checksum(load_checkpoint(file)) == values else "different"
            except CheckpointError:
                return "refused"

        flips = {"refused": 0, "unchanged": 0, "different": 0}
        for _ in tqdm(range(arguments.flips), desc="flips", mininterval=0.2 if sys.stderr.isatty() else 15):
            damaged, bit = bytearray(content), generator.randrange(8 * len(content))
            damaged[bit // 8] ^= 1 << bit % 8
            flips[load(bytes(damaged))] += 1

        lengths = {0, 1, 2, len(content) // 10, len(content) * 99 // 100, len(content) - 1}
        lengths |= {generator.randrange(len(content)) for _ in range(arguments.cuts - len(lengths))}
        cuts = {"refused": 0, "unchanged": 0, "different": 0}
        for length in tqdm(sorted(lengths), desc="cuts", mininterval=0.2 if sys.stderr.isatty() else 15):
            cuts[load(content[:length])] += 1
    return {"tried": arguments.flips, **flips}, {"tried": len(lengths), **cuts, "bytes": len(content)}


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.quick:
        arguments.kills, arguments.flips, arguments.cuts = 2, 20, 20
    kills = kill_many(arguments)
    flips, cuts = damage_many(arguments)
    print(
        f"kills: {kills['survived']} of {kills['tried']} ended bit for bit as the undisturbed run after --resume; "
        f"{kills['inside a save']} died inside a save; last saved updates {kills['at updates']}"
    )
    print(
        f"flipped bits: {flips['tried']} tried, {flips['refused']} refused, "
        f"{flips['unchanged']} loaded with the same values (padding), {flips['different']} loaded with other values"
    )
    print(
        f"cut files: {cuts['tried']} lengths from 0 to {cuts['bytes'] - 1} bytes tried, {cuts['refused']} refused, "
        f"{cuts['different']} loaded with other values"
    )
    save_json(arguments, "faults", {"kills": kills, "flips": flips, "cuts": cuts})
    survived = kills["survived"] == kills["tried"] and not flips["different"] and cuts["refused"] == cuts["tried"]
    print("all survived" if survived else "NOT all survived")
    sys.exit(not survived)


if __name__ == "__main__":
    main()
