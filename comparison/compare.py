"""Train with train.py and with its Lightning twin, with one configuration, and hold the two against each other.

    python -m comparison.compare                       the default training
    python -m comparison.compare --dim 64 --amp bf16   any flags of train.py
    python -m comparison.compare --page                also one HTML file that shows both loops side by side

Lightning's times include its Recorder, which writes what train.py writes into metrics.jsonl; benchmarks/overhead.py
leaves it out. Exit code 0 only if the loss of every update and all weights at the end are equal to the last bit.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from comparison.page import write_page
from comparison.parity import Parity, compare_runs
from comparison.reading import count_lines
from transformer_scratch.config import Config, load_config, settle_config
from transformer_scratch.errors import BadInput, exit_codes
from transformer_scratch.runtime import RUNS, Processes

SIDES = ("plain", "lightning")
PROJECT = Path(__file__).resolve().parent.parent
# Enough to pass through every part of both loops once; profiling makes it slow.
SHORT = ["--dim", "8", "--num-heads", "1", "--num-layers", "1", "--num-datas", "64", "--batch-size", "16",
         "--max-epochs", "1", "--num-workers", "0", "--wandb", "disabled"]  # fmt: skip


def new_folder(wanted: str | None) -> Path:
    """--run-dir, or runs/compare, runs/compare-2, ... Raises BadInput."""
    if wanted is not None:
        folder = Path(wanted)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"--run-dir {folder} is not an empty folder; give a new one")
    else:
        taken = {path.name for path in RUNS.glob("compare*")}
        number = next(
            n for n in range(1, 10**6) if ("compare" if n == 1 else f"compare-{n}") not in taken
        )
        folder = RUNS / ("compare" if number == 1 else f"compare-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def number_of_updates(config: Config) -> int:
    batches = config.num_datas // (config.batch_size * config.devices)
    return config.max_epochs * math.ceil(batches / config.accumulate)


def start(output: Path | None, module: str, *arguments: object, devices: int = 1) -> None:
    """Run a module of this project to its end, on one process or several. Raises RuntimeError where it fails."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
        if devices > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    search = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(output or os.devnull, "w") as file:
        stream = file if output else None
        code = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        ).returncode
    if code:
        raise RuntimeError(f"{module} {arguments[0]} ended with exit code {code}")


def run_both(
    folder: Path, config: Config, flags: list[str]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """-> what the stopwatch read, and how much code there is to read, for each side."""
    measures = {}
    steps = number_of_updates(config)
    for side in SIDES:
        file = folder / f"{side}.json"
        given = [*flags, "--run-dir", folder / side]
        try:
            start(None, "comparison.measured", side, file, steps, config.log_every, time.time(), *given,
                  devices=config.devices)  # fmt: skip
        except RuntimeError:
            output = file.with_suffix(
                ".txt"
            )  # absent where the program ended before it could open it
            if output.exists():
                print("".join(output.read_text().splitlines(keepends=True)[-30:]), file=sys.stderr)
            raise
        measures[side] = json.loads(file.read_text())
    print("counting the lines that run ...", file=sys.stderr)

    def lines_of(side: str) -> list:
        file, run = folder / f"{side}-lines.json", folder / f"{side}-short"
        short = [*SHORT, "--amp", config.amp, "--accelerator", config.accelerator, "--run-dir", run]
        start(file.with_suffix(".txt"), "comparison.reading", side, file, *short)
        shutil.rmtree(run)
        return json.loads(file.read_text())

    with ThreadPoolExecutor() as pool:
        lines = pool.map(lines_of, SIDES)
    return measures, count_lines(*lines)


def contents(file: Path) -> str:
    """What a checkpoint holds, and its size."""
    keys = torch.load(file, map_location="cpu", weights_only=True).keys() - {"format", "checksum"}
    return f"{', '.join(sorted(keys))} ({file.stat().st_size / 1024:,.0f} KiB)"


def table(parity: Parity, measures: dict, lines: dict, folder: Path) -> list[tuple[str, str, str]]:
    """(what, train.py, Lightning)"""

    def measured(name: str, form: str) -> tuple[str, str]:
        return tuple(
            form.format(measures[side][name]) if measures[side][name] is not None else "-"
            for side in SIDES
        )

    rows = []
    for name, (ours, theirs) in parity.epoch_figures.items():
        rows.append(
            (name, f"{ours:.8g}", f"{theirs:.8g}" if ours == theirs else f"{theirs:.8g}  DIFFERENT")
        )
    yes = {True: "equal", False: "DIFFERENT"}
    rows += [
        ("loss of every step", "", yes[parity.max_loss_difference == 0]),
        ("weights at the end", "", yes[parity.weights_equal]),
        *((name, "", yes[equal]) for name, equal in parity.others.items()),
        ("updates skipped by fp16 overflow", *map(str, parity.skipped)),
        ("milliseconds a step", *measured("step_ms", "{:.2f}")),
        ("microseconds of it around the model", *measured("around_us", "{:.0f}")),
        ("seconds until the first update", *measured("startup_s", "{:.1f}")),
        ("seconds in all", *measured("total_s", "{:.1f}")),
        ("peak memory, MiB", *measured("peak_mb", "{:.0f}")),
        ("functions open between main() and loss", *measured("frames", "{}")),
        ("lines of code only this one runs", *(f"{lines[s]['lines']:,} in {lines[s]['files']} files" for s in SIDES)),
        ("in the checkpoint written last", contents(folder / "plain/last.pt"),
         contents(max((folder / "lightning").glob("epoch=*.ckpt"), key=lambda file: file.stat().st_mtime))),
    ]  # fmt: skip
    return rows


def print_table(rows: list[tuple[str, str, str]]) -> None:
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{'':<{width}}  {'train.py':<24}  Lightning")
    for name, ours, theirs in rows:
        wide = len(ours) > 40  # too much for a column
        print(f"{name:<{width}}  {'' if wide else ours:<24}  {'' if wide else theirs}".rstrip())
        if wide:
            print(f"    train.py   {ours}\n    Lightning  {theirs}")


def draw(parity: Parity, file: Path) -> None:
    """Both loss curves, one over the other, and their difference."""
    ours, theirs = zip(*parity.losses, strict=True)
    steps = range(1, len(ours) + 1)
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5), height_ratios=[3, 1], layout="constrained"
    )
    above.plot(steps, theirs, color="#b8b8b8", linewidth=4, label="Lightning")
    above.plot(steps, ours, color="#c2410c", linewidth=1, label="train.py")
    above.set_ylabel("training loss")
    above.legend()
    below.plot(steps, [a - b for a, b in parity.losses], color="#c2410c", linewidth=1)
    below.set(xlabel="update", ylabel="difference")
    figure.savefig(file, dpi=100)
    plt.close(figure)


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
    if own.resume:
        raise BadInput("--resume: both programs start from nothing here; leave it out")
    if not own.devices.isdigit():
        raise BadInput(f"--devices {own.devices} must be 1 or more")
    flags += ["--devices", own.devices]
    processes = Processes(world_size=int(own.devices))
    config, _, _, _ = settle_config(load_config(flags, processes)[0], processes)
    folder = new_folder(own.run_dir)
    print(f"{number_of_updates(config)} updates with each, in {folder}", file=sys.stderr)
    measures, lines = run_both(folder, config, flags)
    parity = compare_runs(folder / "plain", folder / "lightning")

    rows = table(parity, measures, lines, folder)
    print_table(rows)
    draw(parity, folder / "losses.png")
    print(f"\npicture  {folder / 'losses.png'}")
    if own.page:
        print(f"page     {write_page(folder, parity, rows)}")
    print(parity.last_line())
    sys.exit(0 if parity.holds else 1)


if __name__ == "__main__":
    with exit_codes():
        main()
