"""Time and memory of a training step as one thing at a time grows: digits, width, depth, batch, processes.

    python -m benchmarks.scaling

Every point is a process of its own (two, for "processes"), so that its peak memory is its own. Digits stand for length:
the longest of D digits' targets has D + 1 tokens.
"""

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.measure import Options, Timing, number, print_table, save_json, save_picture
from train import token_loss
from transformer_scratch.data import BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer
from transformer_scratch.runtime import keep_freed_memory


@dataclass(frozen=True)
class Point:
    """One size. The batch is that of each process."""

    digits: int = 10
    dim: int = 128
    layers: int = 6
    batch: int = 64
    processes: int = 1


SWEEPS = {
    "digits": (10, 20, 40, 80),
    "dim": (32, 64, 128, 256, 512),
    "layers": (1, 2, 4, 8),
    "batch": (16, 32, 64, 128, 256),
    "processes": (1, 2),
}
QUICK = {"dim": (16,), "processes": (1, 2)}


@dataclass
class Arguments(Options):
    """How a training step grows."""

    steps: int = 10
    """Training steps timed at each point."""
    rounds: int = 3
    """How often all points are measured, in turn; the median round counts."""


def peak_memory() -> int:
    """The most bytes this process has held so far, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train_steps(rank: int, point: Point, steps: int, threads: int, folder: str) -> None:
    """A process: train, then leave seconds of each step and peak memory in the folder."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if point.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=point.processes)
    make_optimizer(nn.Linear(1, 1), 1.0, 0.0, fused=True)  # the first one loads a part of PyTorch
    before = peak_memory()
    torch.manual_seed(0)
    task = Task(point.digits, point.digits + 6)
    pairs = split_pairs(task, 0.2, 42)
    data = make_datasets(task, pairs, point.batch * point.processes * (steps + 2), 42)[0]
    sampler = BatchSampler(data, point.batch, True, 42, rank=rank, world_size=point.processes)
    model = Transformer(task.vocab_size, point.dim, max(1, point.dim // 64), point.layers, pad_id=task.pad_id)
    network = DistributedDataParallel(model) if point.processes > 1 else model
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, 1e-4, 0.1, fused=True)
    ends = []
    for batch in make_loader(sampler):
        token_loss(network, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    if rank == 0:
        seconds = [end - start for start, end in itertools.pairwise(ends[1:])]
        torch.save({"seconds": seconds, "memory": peak_memory() - before}, f"{folder}/result.pt")
    if point.processes > 1:
        dist.destroy_process_group()


def measure(point: Point, options: Arguments) -> dict:
    """-> median seconds of a step and bytes that training added to a process."""
    threads = max(1, torch.get_num_threads() // point.processes)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_steps, (point, options.steps, threads, folder), nprocs=point.processes)
        result = torch.load(f"{folder}/result.pt", weights_only=True)
    return {"seconds": Timing(result["seconds"]).median, "memory": result["memory"]}


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    standard, sweeps, rounds = Point(), SWEEPS, options.rounds
    if options.quick:
        standard, sweeps, rounds, options.steps = Point(dim=16, layers=1, batch=8), QUICK, 1, 2
    options.set_threads()
    points = {(name, value): replace(standard, **{name: value}) for name, values in sweeps.items() for value in values}
    results = {point: [] for point in dict.fromkeys(points.values())}  # the standard point is in every sweep
    todo = [point for _ in range(rounds) for point in results]
    for point in tqdm(todo, desc="points", unit="point"):
        results[point].append(measure(point, options))

    rows, curves = [], {}
    for (name, value), point in points.items():
        timing = Timing([run["seconds"] for run in results[point]])
        memory = Timing([run["memory"] for run in results[point]]).median / 2**20
        samples = point.batch * point.processes / timing.median
        curves.setdefault(name, []).append(
            {"value": value, "seconds": timing.median, "MiB": memory, "samples/s": samples}
        )
        rows.append({"grows": name, "to": str(value), "ms a step (middle half)": timing.show(), "samples/s": samples,
                     "MiB a process": number(memory)})  # fmt: skip
    others = ", ".join(f"{name} {value}" for name, value in asdict(standard).items())
    title = f"A training step as one thing grows; the others: {others}; {torch.get_num_threads()} threads"
    print_table(title, rows)
    save_json(options, "scaling", {"standard": asdict(standard), "curves": curves})
    draw(options, curves)


def draw(options: Arguments, curves: dict[str, list[dict]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(2, len(curves), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        values = [str(point["value"]) for point in points]
        grid[0, column].plot(values, [point["seconds"] * 1e3 for point in points], "o-", color="#2a7")
        grid[1, column].plot(values, [point["MiB"] for point in points], "o-", color="#88c")
        grid[1, column].set_xlabel(name)
        for axes in grid[:, column]:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("MiB a process")
    figure.suptitle("Time and memory of a training step as one thing grows")
    save_picture(options, "scaling", figure)


if __name__ == "__main__":
    main()
