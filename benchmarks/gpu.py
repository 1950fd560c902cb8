"""One page about one GPU, in less than five minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --quick --accelerator cpu      does the command run? Tiny, no numbers

Samples a second by size and precision, as a share of what the card reaches in one large matrix
product; ours against nn.Transformer, the article's way and the Lightning twin (where
comparison/requirements.txt is installed); the article's whole command; decoding; peak memory; how
often the host waits for the GPU.
"""

import functools
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.measure import (
    Options,
    clock,
    interleave,
    number,
    print_table,
    ratio,
    save_json,
)
from benchmarks.lib.programs import (
    run_lightning,
    run_to_the_end,
    run_train,
    update_seconds,
)
from benchmarks.lib.training_steps import TrainingStep, TrainingSteps
from benchmarks.lib.waits import Waits, waits_of_training
from transformer_scratch.batches import UPDATES_PER_WINDOW
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.hardware import (
    AUTOCAST_TYPES,
    choose_device,
    choose_kernels,
    choose_precision,
    keep_freed_memory,
)

NEVER = -1  # an end token that no model writes
ROUNDS, SECONDS_A_ROUND = 5, 0.2
TWIN_UPDATES, TWIN_ROUNDS = 60, 3


@dataclass(frozen=True)
class Size:
    dim: int
    num_heads: int
    num_layers: int
    batch_size: int

    def __str__(self) -> str:
        heads = "1 head" if self.num_heads == 1 else f"{self.num_heads} heads"
        return f"dim {self.dim}, {heads}, batch {self.batch_size}"

    def flags(self) -> list[str]:
        names = ("dim", "num-heads", "num-layers", "batch-size")
        values = (self.dim, self.num_heads, self.num_layers, self.batch_size)
        return [word for pair in zip(names, values, strict=True) for word in flag(*pair)]


def flag(name: str, value: object) -> tuple[str, str]:
    return f"--{name}", str(value)


DEFAULT, ARTICLE = Size(32, 1, 6, 128), Size(512, 8, 6, 256)
LARGE, TINY = Size(1024, 16, 6, 512), Size(16, 1, 1, 8)


@dataclass
class Arguments(Options):
    """Print one page about this machine's GPU."""

    accelerator: Literal["gpu", "cpu"] = "gpu"
    """cpu: with --quick, to see that the command runs."""


class Page:
    """Prints each table as soon as it is measured, and keeps them all.

    Where one cannot be measured the others still are.
    """

    def __init__(self, device: torch.device, quick: bool):
        self.device, self.quick, self.tables, self.missing = device, quick, {}, []
        self.on_gpu = device.type == "cuda"

    def add(self, title: str, measure: Callable[..., list[dict]], *arguments: object) -> None:
        try:
            rows = measure(self, *arguments)
        except (Exception, SystemExit) as end:  # train.py exits by itself, and has said why
            if isinstance(end, SystemExit) and end.code > 128:  # Ctrl-C ends the whole page
                raise
            traceback.print_exc()
            self.missing.append(title)
        else:
            self.tables[title] = rows
            print_table(title, rows)

    def sizes(self, *sizes: Size) -> tuple[Size, ...]:
        return (TINY,) if self.quick else sizes

    def precision(self, size: Size) -> str:
        """What --amp auto chooses."""
        return choose_precision("auto", self.device, size.dim)[0]

    def steps(self, size: Size) -> TrainingSteps:
        sizes = (size.dim, size.num_heads, size.num_layers, size.batch_size)
        return TrainingSteps(*sizes, device=self.device)


def device_rows(page: Page) -> list[dict]:
    """What is measured."""
    values = {"PyTorch": torch.__version__, "device": str(page.device)}
    if page.on_gpu:
        properties = torch.cuda.get_device_properties(page.device)
        values |= {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "CUDA": torch.version.cuda,
        }
    return [{"what": name, "value": value} for name, value in values.items()]


def precisions(page: Page) -> list[str]:
    """The values of --amp; bf16 only where the card computes it."""
    has_bf16 = not page.on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    return ["off", "fp16", *(["bf16"] if has_bf16 else [])]


def matrix_peak(page: Page, amp: str) -> float:
    """-> the most FLOP a second of a square product. "off" is TF32, where the card has it."""
    size = 64 if page.quick else 8192
    dtype = AUTOCAST_TYPES[amp] or torch.float32
    a = torch.randn(size, size, device=page.device).to(dtype)
    seconds = []
    for _ in range(4):
        started = clock(page.device)
        for _ in range(5):
            a @ a
        seconds.append((clock(page.device) - started) / 5)
    return 2 * size**3 / min(seconds)


def peak_rows(page: Page, peaks: dict[str, float]) -> list[dict]:
    return [{"--amp": amp, "TFLOP/s": peak / 1e12} for amp, peak in peaks.items()]


def as_many_windows_as_fit(step: TrainingStep, seconds: float) -> TrainingStep:
    """Warm the step up, and let it train for about so many seconds at once."""
    step()
    a_window = step() * UPDATES_PER_WINDOW
    step.windows = max(1, min(50, round(seconds / a_window)))
    return step


def speed_rows(page: Page, peaks: dict[str, float]) -> list[dict]:
    """Ours, by size and precision."""
    rows = []
    rounds, seconds = (1, 0) if page.quick else (ROUNDS, SECONDS_A_ROUND)
    for size in page.sizes(DEFAULT, ARTICLE, LARGE):
        for amp in peaks:
            row = {"size": str(size), "--amp": amp}
            try:
                row |= speed(page, size, amp, peaks[amp], rounds, seconds)
            except torch.OutOfMemoryError:
                names = ("samples/s", "ms a step (middle half)", "TFLOP/s", "of the peak", "MiB")
                row |= dict.fromkeys(names, "out of memory")
            rows.append(row)
    return rows


def speed(
    page: Page, size: Size, amp: str, peak: float, rounds: int, seconds: float
) -> dict[str, object]:
    if page.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = page.steps(size).ours(dtype=AUTOCAST_TYPES[amp])
    step = as_many_windows_as_fit(step, seconds)
    memory = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}" if page.on_gpu else "-"
    with FlopCounterMode(display=False) as counter:
        step.train_on_a_window()
    flop = counter.get_total_flops() / UPDATES_PER_WINDOW
    timing = interleave({"ours": step}, rounds, f"{size}, {amp}", warm_up=0)["ours"]
    return {
        "samples/s": size.batch_size / timing.median,
        "ms a step (middle half)": timing.show(),
        "TFLOP/s": flop / timing.median / 1e12,
        "of the peak": f"{flop / timing.median / peak:.1%}",
        "MiB": memory,
    }


def against_others_rows(page: Page) -> list[dict]:
    """Ours and nn.Transformer on the same batches in the same precision; the article in float32."""
    rows = []
    rounds, seconds = (1, 0) if page.quick else (ROUNDS, SECONDS_A_ROUND)
    for size in page.sizes(DEFAULT, ARTICLE):
        amp, steps = page.precision(size), page.steps(size)
        dtype = AUTOCAST_TYPES[amp]
        ways = {
            "ours": steps.ours(dtype=dtype),
            "nn.Transformer": steps.nn_transformer(0.1, dtype),
            "ours, dropout 0": steps.ours(0.0, dtype=dtype),
            "nn.Transformer, dropout 0": steps.nn_transformer(0.0, dtype),
            "the article's way": steps.article(),
        }
        ways = {name: as_many_windows_as_fit(step, seconds) for name, step in ways.items()}
        timings = interleave(ways, rounds, str(size), warm_up=0)
        for name, timing in timings.items():
            base = "ours, dropout 0" if "dropout 0" in name else "ours"
            rows.append(
                {
                    "size": str(size),
                    "way": name if name == "the article's way" else f"{name}, {amp}",
                    "samples/s": size.batch_size / timing.median,
                    "ms a step (middle half)": timing.show(),
                    "x ours": f"{ratio(timing, timings[base]).median:.2f}",
                }
            )
    return rows


def against_the_twin_rows(page: Page, accelerator: str) -> list[dict]:
    """Whole updates of both programs, and the host's time of them around the model.

    Where the GPU is slower than the host, the host waits for it when it reads the loss, and the
    time around the model has that in it: hence only at the smallest size.
    """
    from benchmarks.overhead import around_the_model

    updates, rounds = (11, 1) if page.quick else (TWIN_UPDATES, TWIN_ROUNDS)
    programs = {"train.py": run_train, "the Lightning twin": run_lightning}

    def measure(size: Size, what: str) -> list[dict]:
        flags = [*size.flags(), "--accelerator", accelerator]

        def whole_update(program) -> float:
            return sum(update_seconds(program, flags, updates)) / updates

        def around(program) -> float:
            return around_the_model(program, flags, updates)

        function = whole_update if what == "whole update" else around
        contenders = {
            name: functools.partial(function, program) for name, program in programs.items()
        }
        timings = interleave(contenders, rounds, f"{size}, {what}")
        return [
            {
                "size": str(size),
                "what": what,
                "program": name,
                "µs an update (middle half)": timing.show(1e6),
                "x train.py's": f"{ratio(timing, timings['train.py']).median:.2f}",
            }
            for name, timing in timings.items()
        ]

    rows = []
    for size in page.sizes(DEFAULT, ARTICLE):
        rows += measure(size, "whole update")
    return rows + measure(page.sizes(DEFAULT)[0], "around the model")


def article_rows(page: Page, accelerator: str) -> list[dict]:
    """The article's command from its first update to its last answer."""
    (size,) = page.sizes(ARTICLE)
    num_datas, epochs = (3 * size.batch_size, 2) if page.quick else (50_000, 10)
    flags = [*size.flags(), "--accelerator", accelerator, "--lr", "0.0001"]
    flags += [*flag("num-datas", num_datas), *flag("max-epochs", epochs)]
    per_epoch = num_datas // size.batch_size

    def read(update: int) -> float:
        # At the end of an epoch train.py reads the loss, for which it waits anyway.
        return clock(page.device) if update % per_epoch == 0 else time.perf_counter()

    started = time.perf_counter()
    ends = run_to_the_end(run_train, flags, read)
    total = time.perf_counter() - started
    # What comes between two epochs (validation, saving) belongs to no step.
    epochs_of_steps = [ends[i : i + per_epoch] for i in range(0, len(ends), per_epoch)]
    in_steps = sum(times[-1] - times[0] for times in epochs_of_steps) * per_epoch / (per_epoch - 1)
    return [
        {
            "updates": str(len(ends)),
            "epochs": str(epochs),
            "s in all": total,
            "s in steps": in_steps,
            "ms a step": in_steps / len(ends) * 1e3,
            "samples/s in steps": len(ends) * size.batch_size / in_steps,
        }
    ]


@torch.inference_mode()
def decoding_rows(page: Page) -> list[dict]:
    """100 answers at once that never end before the full length: the most it can cost."""
    (size,), rows = page.sizes(ARTICLE), []
    steps = page.steps(size)
    model = steps.our_model(0.1).eval()
    task = steps.task
    source = torch.tensor([task.encode_source(pair) for pair in task.all_pairs()])  # (100, 4)
    source = source.to(page.device)
    for length in (8,) if page.quick else (16, 64):
        for amp in dict.fromkeys(("off", page.precision(size))):
            dtype = AUTOCAST_TYPES[amp]
            autocast = torch.amp.autocast(page.device.type, dtype=dtype, enabled=dtype is not None)

            def decode(length: int = length, autocast: torch.amp.autocast = autocast) -> float:
                started = clock(page.device)
                with autocast:
                    question = (model, source, task.start_id, NEVER, length)
                    greedy_decode(*question, source_is_padded=False)
                return clock(page.device) - started

            timing = interleave({"decode": decode}, 1 if page.quick else 9, f"{length} tokens")
            with Waits().counting() as waits:
                decode()
            rows.append(
                {
                    "tokens": str(length),
                    "--amp": amp,
                    "sequences/s": 100 / timing["decode"].median,
                    "ms for 100 (middle half)": timing["decode"].show(),
                    "waits a position": waits_text(page, waits.count / length),
                }
            )
    return rows


def waits_rows(page: Page, accelerator: str) -> list[dict]:
    """How often a step of train.py waits: where it reads no loss, and where it does."""
    rows = []
    for amp in precisions(page):
        flags = [*TINY.flags(), "--accelerator", accelerator, "--amp", amp, "--log-every"]
        silent, waits = waits_of_training([*flags, "1000"], updates=10)
        logging, _ = waits_of_training([*flags, "1"], updates=10)
        rows.append(
            {
                "--amp": amp,
                "waits a step": waits_text(page, silent),
                "a step that reads its loss": waits_text(page, logging),
                "lines that waited, from the start on": "; ".join(waits.by_line) or "-",
            }
        )
    return rows


def waits_text(page: Page, count: float) -> str:
    return number(count) if page.on_gpu else "-"


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.accelerator == "cpu" and not options.quick:
        raise BadInput("--accelerator cpu takes hours at these sizes: give --quick, too")
    started = time.perf_counter()
    device, _ = choose_device(options.accelerator)
    options.set_threads()
    keep_freed_memory()
    choose_kernels()
    torch.manual_seed(0)
    page = Page(device, options.quick)
    page.add("The device", device_rows)
    peaks = {amp: matrix_peak(page, amp) for amp in precisions(page)}
    page.add("The most it reaches in one large matrix product", peak_rows, peaks)
    page.add("Training by size and precision", speed_rows, peaks)
    page.add("Against nn.Transformer and the article's way", against_others_rows)
    if importlib.util.find_spec("pytorch_lightning"):
        page.add("Against the Lightning twin", against_the_twin_rows, options.accelerator)
    page.add("The article's command", article_rows, options.accelerator)
    page.add("Decoding", decoding_rows)
    page.add("Waits of the host for the GPU", waits_rows, options.accelerator)
    print(f"\nmeasured in {time.perf_counter() - started:.0f} s")
    save_json(options, "gpu", {"tables": page.tables})
    if page.missing:
        sys.exit(f"not measured, see above: {'; '.join(page.missing)}")


if __name__ == "__main__":
    main()
