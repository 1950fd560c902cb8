"""What a large file of pairs costs: reading it, holding it, taking batches from it."""

import random
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from benchmarks.lib.measure import peak_memory
from transformer_scratch.batches import BatchSampler, make_loader
from transformer_scratch.config import load_config
from transformer_scratch.pair_file import write_pairs

BATCH_SIZE = 128


def write_words(path: Path, num_pairs: int) -> None:
    """Made-up words of 4 to 12 letters, and their letters backwards: the lengths of English."""
    draw = random.Random(0)
    lines = []
    for _ in range(num_pairs):
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 12)))
        lines.append((word, " ".join(reversed(word))))
    write_pairs(path, lines)


def read_and_fetch(rank: int, file: str, num_batches: int, folder: str) -> None:
    """A process: read the file as train.py does, then take batches; leave the figures behind."""
    torch.set_num_threads(1)
    before = peak_memory()
    started = time.perf_counter()
    config, task, _, _ = load_config(["--pairs", file, "--batch-size", str(BATCH_SIZE)])
    start_up = time.perf_counter() - started
    held = sum(tensor.nbytes for data in task.datasets() for tensor in tensors_of(data))
    sampler = BatchSampler(task.datasets()[0], config.batch_size, shuffle=True, keep_last=True)
    started = time.perf_counter()
    iterator = iter(make_loader(sampler))
    next(iterator)  # sorts the whole epoch
    first_batch = time.perf_counter() - started
    started, samples = time.perf_counter(), 0
    for _, batch in zip(range(num_batches), iterator, strict=False):
        samples += len(batch.source)
    fetching = time.perf_counter() - started
    torch.save(
        {
            "start_up": start_up,
            "first_batch": first_batch,
            "peak": peak_memory() - before,
            "held": held,
            "samples/s": samples / fetching,
        },
        f"{folder}/result.pt",
    )


def tensors_of(data) -> list[torch.Tensor]:
    """All that a dataset keeps, each tensor once."""
    parts = [data, data.source, data.target]
    tensors = [value for part in parts for value in vars(part).values() if torch.is_tensor(value)]
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def measure_pairs(num_pairs: int, num_batches: int = 200) -> dict:
    """-> seconds to start and to the first batch, bytes at most and kept, samples a second."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.tsv"
        write_words(file, num_pairs)
        mp.spawn(read_and_fetch, (str(file), num_batches, folder))
        return torch.load(f"{folder}/result.pt", weights_only=True)
