"""Time and memory of a training step as one thing grows: digits, width, depth, batch, processes;
and what a file of pairs costs as it grows.

    python -m benchmarks.scaling

Every point is a process of its own (two, for "processes"), so that its peak memory is its own.
Digits stand for length: with D digits the longest target has D + 1 tokens.
"""

import tempfile
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.lib.many_pairs import measure_pairs
from benchmarks.lib.measure import (
    Options,
    Timing,
    number,
    peak_memory,
    print_table,
    save_json,
    save_picture,
    threads,
)
from train import token_loss
from transformer_scratch.batches import (
    UPDATES_PER_WINDOW,
    BatchSampler,
    make_loader,
)
from transformer_scratch.digits import Digits, make_datasets, split_pairs
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import keep_freed_memory
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer


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
PAIRS = (1_000, 10_000, 100_000, 1_000_000)  # lines of a file


@dataclass
class Arguments(Options):
    """Measure how time and memory of a training step grow."""

    windows: int = 4
    """Windows of three batches (short, middling, long) timed at each point."""
    rounds: int = 3
    """How often all points are measured, in turn; the median round counts."""


def train_an_epoch(rank: int, point: Point, windows: int, num_threads: int, folder: str) -> None:
    """A process: train, then leave the seconds of a step and the peak memory in the folder."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    world_size = point.processes
    if world_size > 1:
        address = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    make_optimizer(nn.Linear(1, 1), 1.0, 0.0)  # the first one loads a part of PyTorch
    before = peak_memory()
    torch.manual_seed(0)
    task = Digits(point.digits, point.digits + 6)
    splits = split_pairs(task, holdout=0.2, seed=42)
    updates = windows * UPDATES_PER_WINDOW
    data = make_datasets(task, splits, point.batch * world_size * updates, seed=42)[0]
    share = {"rank": rank, "world_size": world_size}
    loader = make_loader(BatchSampler(data, point.batch, shuffle=True, seed=42, **share))

    num_heads = max(1, point.dim // 64)
    model = Transformer(task.vocab_size, point.dim, num_heads, point.layers, pad_id=task.pad_id)
    network = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.1)

    def step(batch) -> None:
        weight = batch.num_tokens / batch.mean_update_tokens * world_size
        (token_loss(network, batch, task.pad_id) * weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(next(iter(loader)))  # warm-up
    started = time.perf_counter()
    for batch in loader:
        step(batch)
    seconds = (time.perf_counter() - started) / updates
    if rank == 0:
        result = {"seconds": seconds, "memory": peak_memory() - before}
        torch.save(result, f"{folder}/result.pt")
    if world_size > 1:
        dist.destroy_process_group()


def measure(point: Point, windows: int) -> dict:
    """-> mean seconds of a step, and the bytes that training added to a process."""
    num_threads = max(1, torch.get_num_threads() // point.processes)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_an_epoch, (point, windows, num_threads, folder), nprocs=point.processes)
        return torch.load(f"{folder}/result.pt", weights_only=True)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    standard, sweeps = Point(), SWEEPS
    if options.quick:
        standard, sweeps = Point(dim=16, layers=1, batch=8), QUICK
        options.windows = options.rounds = 1
    options.set_threads()
    points = {
        (name, value): replace(standard, **{name: value})
        for name, values in sweeps.items()
        for value in values
    }
    # The standard point is in every sweep, but measured only once a round.
    results = {point: [] for point in points.values()}
    todo = [point for _ in range(options.rounds) for point in results]
    for point in tqdm(todo, desc="points", unit="point"):
        results[point].append(measure(point, options.windows))

    rows, curves = [], {}
    for (name, value), point in points.items():
        timing = Timing([result["seconds"] for result in results[point]])
        memory = Timing([result["memory"] for result in results[point]]).median / 2**20
        samples = point.batch * point.processes / timing.median
        curve = {"value": value, "seconds": timing.median, "MiB": memory, "samples/s": samples}
        curves.setdefault(name, []).append(curve)
        rows.append(
            {
                "grows": name,
                "to": str(value),
                "ms a step (middle half)": timing.show(),
                "samples/s": samples,
                "MiB a process": number(memory),
            }
        )
    others = ", ".join(f"{name} {value}" for name, value in asdict(standard).items())
    print_table(f"A training step as one thing grows; the others: {others}; {threads()}", rows)
    files = print_files((1_000,) if options.quick else PAIRS)
    results = {"standard": asdict(standard), "curves": curves, "pairs": files}
    save_json(options, "scaling", results)
    save_picture(options, "scaling", lambda: draw(curves))


def print_files(sizes: tuple[int, ...]) -> dict[int, dict]:
    """Measure files of so many pairs. -> what was measured, by size."""
    files = {size: measure_pairs(size) for size in tqdm(sizes, desc="files", unit="file")}
    rows = [
        {
            "pairs in the file": f"{size:,}",
            "s to read": number(result["start_up"]),
            "s to the first batch": number(result["first_batch"]),
            "MiB at most": number(result["peak"] / 2**20),
            "bytes kept a pair": number(result["held"] / size),
            "samples/s fetched": result["samples/s"],
        }
        for size, result in files.items()
    ]
    print_table("A file of pairs as it grows; one thread, batches of 128", rows)
    return files


def draw(curves: dict[str, list[dict]]) -> object:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(2, len(curves), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        values = [str(point["value"]) for point in points]
        milliseconds = [point["seconds"] * 1e3 for point in points]
        grid[0, column].plot(values, milliseconds, "o-", color="#2a7")
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
    return figure


if __name__ == "__main__":
    main()
