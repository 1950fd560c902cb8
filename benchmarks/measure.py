"""How the benchmarks measure, and how they show it: A B A B, medians, a table, a JSON file, a picture."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm


@dataclass
class Options:
    """What every benchmark can be told."""

    quick: bool = False
    """A tiny size, to see that the command works; its numbers mean nothing."""
    threads: int | None = None
    """Threads of PyTorch. None: its own choice, one a core unless OMP_NUM_THREADS says otherwise."""
    output: Path = Path("build/benchmarks")
    """Folder for the JSON file and the picture."""

    def set_threads(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Timing:
    """Seconds of all rounds: their median, and the middle half of them."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]

    def show(self, unit: float = 1e3) -> str:
        """Median and middle half, in milliseconds by default (unit: how many make a second)."""
        low, high = self.quartiles
        return f"{number(self.median * unit)} ({number(low * unit)} to {number(high * unit)})"


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, description: str, warm_up: int = 1
) -> dict[str, Timing]:
    """Call every contender once a round, in turn, so that what else the machine does hits all of them alike.

    A contender is timed from outside, unless it returns seconds, a float. The first calls are not counted.
    """
    seconds = {name: [] for name in contenders}
    names = list(contenders)
    with tqdm(
        total=(warm_up + rounds) * len(names),
        desc=description,
        unit="run",
        mininterval=0.2 if sys.stderr.isatty() else 15,
    ) as bar:
        for index in range(warm_up + rounds):
            for name in names if index % 2 else reversed(names):  # A B B A: nobody always runs after the same one
                started = time.perf_counter()
                own = contenders[name]()
                took = own if isinstance(own, float) else time.perf_counter() - started
                if index >= warm_up:
                    seconds[name].append(took)
                bar.update()
    return {name: Timing(values) for name, values in seconds.items()}


def machine() -> dict:
    """Where the numbers come from."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "vector units": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def peak_flops(dtype: torch.dtype = torch.float32, size: int = 1536) -> float:
    """Floating-point operations a second of one large matrix product: what this machine can do at best."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = min(interleave({"product": lambda: a @ b}, 5, "peak of this machine")["product"].seconds)
    return 2 * size**3 / best


def print_table(title: str, rows: list[dict]) -> None:
    """A Markdown table, so that it can stand in docs/performance.md as it is."""
    columns = list(rows[0])
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(cell if isinstance(cell, str) else number(cell) for cell in row.values())} |")


def save_json(options: Options, name: str, result: dict) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{name}.json"
    file.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"\nwritten {file}")


def save_picture(options: Options, name: str, figure) -> None:
    """figure: of matplotlib, which only the benchmarks and evaluate.py load."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{name}.png"
    figure.savefig(file, dpi=100)
    print(f"written {file}")
