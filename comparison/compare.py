"""Run train.py and its Lightning twin with one configuration, and compare all they computed.

    python -m comparison.compare                       the default training
    python -m comparison.compare --dim 64 --amp bf16   any flags of train.py
    python -m comparison.compare --page                also one HTML file with both loops

Exit code 0 only if the loss of every update and all weights at the end are equal to the last bit.
What each loop costs is measured by python -m benchmarks.overhead.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from comparison.hidden_steps.page import write_page
from comparison.parity import Parity, compare_runs
from transformer_scratch.config import from_home, load_config
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.processes import Processes
from transformer_scratch.run_folder import RUNS

PROJECT = Path(__file__).resolve().parent.parent
# Each as its user runs it; with several processes torchrun stands before it.
PROGRAMS = {
    "plain": [str(PROJECT / "train.py")],
    "lightning": ["-m", "comparison.train_lightning"],
}


def new_folder(wanted: str | None) -> Path:
    """--run-dir, or runs/compare, runs/compare-2, ... Raises BadInput."""
    if wanted is None:
        folder, number = RUNS / "compare", 2
        while folder.exists():
            folder, number = RUNS / f"compare-{number}", number + 1
        return folder.resolve()
    folder = Path(from_home(wanted, "--run-dir"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--run-dir {folder} is not an empty folder; give a new one")
    return folder.resolve()


def run(side: str, folder: Path, flags: list[str], devices: int) -> None:
    """Run one of the programs to its end. One that fails has said why, and ends this one too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    command = [sys.executable, *(launcher if devices > 1 else []), *PROGRAMS[side], *flags]
    search = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run(
        [*command, "--run-dir", str(folder / side)],
        env={**os.environ, "PYTHONPATH": search},
        stdin=subprocess.DEVNULL,
    ).returncode
    if code:
        sys.exit(code if code > 0 else 1)  # below 0: killed by a signal


def table(parity: Parity, folder: Path) -> list[tuple[str, str, str]]:
    """Rows of (what, train.py, Lightning)."""

    def verdict(equal: bool) -> str:
        return "equal" if equal else "DIFFERENT"

    rows = []
    for name, (ours, theirs) in parity.epoch_figures.items():
        mark = "" if ours == theirs else f"  {verdict(False)}"
        rows.append((name, f"{ours:.8g}", f"{theirs:.8g}{mark}"))
    rows.append(("loss of every step", "", verdict(parity.max_loss_difference == 0)))
    rows.append(("weights at the end", "", verdict(parity.weights_equal)))
    rows += [(name, "", verdict(equal)) for name, equal in parity.others.items()]
    rows.append(("updates skipped by fp16 overflow", *map(str, parity.skipped)))
    twins = (folder / "lightning").glob("epoch=*.ckpt")
    newest = max(twins, key=lambda file: int(file.stem.removeprefix("epoch=")))
    checkpoints = (contents(folder / "plain" / "last.pt"), contents(newest))
    return [*rows, ("in the checkpoint written last", *checkpoints)]


def contents(file: Path) -> str:
    """What a checkpoint holds, and its size."""
    keys = torch.load(file, map_location="cpu", weights_only=True).keys()
    return f"{', '.join(sorted(keys))} ({file.stat().st_size / 1024:,.0f} KiB)"


def print_table(rows: list[tuple[str, str, str]]) -> None:
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{'':<{width}}  {'train.py':<16}  Lightning")
    for name, ours, theirs in rows:
        if len(ours) <= 16:
            print(f"{name:<{width}}  {ours:<16}  {theirs}")
        else:  # too long for a column
            print(f"{name}\n    train.py   {ours}\n    Lightning  {theirs}")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--run-dir", "--run_dir")
    parser.add_argument("--resume")
    parser.add_argument("--devices", default="1")
    own, flags = parser.parse_known_args(arguments)
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise BadInput("Lightning is missing: python -m pip install -r comparison/requirements.txt")
    if own.resume is not None:
        raise BadInput("--resume: both programs train from the start here; leave it out")
    if not own.devices.isdecimal() or int(own.devices) < 1:
        raise BadInput(f"--devices {own.devices} must be 1 or more")
    devices = int(own.devices)
    flags += ["--devices", str(devices)]
    load_config(flags, Processes(world_size=devices))  # refuses bad input before anything is made
    try:
        folder = new_folder(own.run_dir)
    except OSError as error:
        raise BadInput(f"--run-dir: {error.filename}: {error.strerror}") from None

    for number, side in enumerate(PROGRAMS, start=1):
        print(f"\n==== {number} of 2: {PROGRAMS[side][-1]}", file=sys.stderr, flush=True)
        run(side, folder, flags, devices)

    parity = compare_runs(folder / "plain", folder / "lightning")
    rows = table(parity, folder)
    print_table(rows)
    if parity.other_optimizer:
        print(f"\n{parity.other_optimizer}")
    print(f"\nruns  {folder}")
    if own.page:
        print(f"page  {write_page(folder, parity, rows)}")
    print(parity.verdict())
    if not parity.holds:
        sys.exit(1)


if __name__ == "__main__":
    main()
