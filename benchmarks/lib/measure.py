"""How the benchmarks measure and what they write: medians, a table, a JSON file, a picture."""

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

from transformer_scratch.errors import BadInput


@dataclass
class Options:
    """The options that every benchmark has."""

    quick: bool = False
    """A tiny size, to see that the command works; its numbers mean nothing."""
    threads: int | None = None
    """Threads of PyTorch. None: the benchmark's choice, unless OMP_NUM_THREADS is set."""
    output: Path = Path("build/benchmarks")
    """Folder for the JSON file and the picture."""

    def set_threads(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Timing:
    """The seconds of all rounds, their median and the middle half of them."""

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


def ratio(of: Timing, to: Timing) -> Timing:
    """The ratio within each round: where a machine changes its speed, it spoils one round."""
    return Timing([a / b for a, b in zip(of.seconds, to.seconds, strict=True)])


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done all that it has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, description: str, warm_up: int = 1
) -> dict[str, Timing]:
    """Call every contender once a round, so that a busy machine slows all of them alike.

    A contender is timed from outside, unless it returns seconds, a float. The first warm_up rounds
    do not count.
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
            # A B B A: nobody always runs after the same one.
            for name in names if index % 2 else reversed(names):
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        model = next(names, model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    return {
        "gpu": gpu,
        "cpu": model,
        "threads": torch.get_num_threads(),
        "vector units": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def peak_memory() -> int:
    """The most bytes this process has held so far, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_table(title: str, rows: list[dict]) -> None:
    """A Markdown table, to be copied into docs/performance.md as it is."""
    columns = list(rows[0])
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (cell if isinstance(cell, str) else number(cell) for cell in row.values())
        print(f"| {' | '.join(cells)} |")


def save_json(options: Options, name: str, result: dict) -> None:
    file = options.output / f"{name}.json"
    text = json.dumps({"machine": machine(), **result}, indent=1) + "\n"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}") from None
    print(f"\nwritten {file}")


def save_picture(options: Options, name: str, draw: Callable[[], object]) -> None:
    """draw: -> a matplotlib Figure. Where it fails there is a warning: the numbers are safe."""
    from transformer_scratch.plots import save_pictures  # matplotlib takes long to import

    for file in save_pictures({name: draw}, options.output, style={}):
        print(f"written {file}")
