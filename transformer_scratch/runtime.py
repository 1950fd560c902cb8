"""Where and how the program runs: device, precision, seeds, processes."""

import atexit
import ctypes
import functools
import gc
import os
import platform
import random
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_scratch.errors import BadInput

RUNS = Path("runs")


@dataclass(frozen=True)
class Processes:
    """This process among all that train together: torchrun says so in the environment; alone it is 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    store: dist.Store | None = None  # torchrun keeps it as long as it lives, over restarts of its processes

    @property
    def is_main(self) -> bool:
        """The one process that prints, reads and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on every one of them. The tensor itself is changed."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, weighted_sum: Tensor, weight: int) -> float:
        """The sum of all processes' weighted sums over that of their weights."""
        total = self.sum(torch.tensor(weight, device=weighted_sum.device))
        return (self.sum(weighted_sum.clone()) / total).item()

    def gather(self, value: object) -> list:
        """The value of every process, in order of rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], object]) -> object:
        """What the function returns on the main process, on every process; a BadInput it raises, too."""
        if self.world_size == 1:
            return function()
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except BadInput as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def remember_run(self, folder: Path) -> None:
        """Let the processes that torchrun starts after a fault find their run again."""
        if self.store is not None:
            self.store.set("run", str(folder))

    def run_before_restart(self) -> Path | None:
        """The run that this torchrun was training before it restarted its processes, if it did and there was one."""
        if self.store is None or not self.store.check(["run"]):
            return None
        return Path(self.store.get("run").decode())


ALONE = Processes()


def start_processes() -> Processes:
    """Join the other processes, if torchrun started several."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("transformer_scratch", store)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own_store = dist.PrefixStore(name_of_this_start(store, rank, world_size), store)
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
        atexit.register(dist.destroy_process_group)
    return Processes(rank, int(os.environ["LOCAL_RANK"]), world_size, store)


def name_of_this_start(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that all processes started together share, and none that torchrun started before.

    After a restart the store still holds the addresses of the dead processes under the keys of the living, which
    would wait for them for ever (pytorch issue 135712). How often it has restarted, each node counts for itself.
    """
    if rank > 0:
        name = store.get(f"answer {store.add('requests', 1)}").decode()
        store.add(f"{name} joined", 1)
        return name
    name, answered = uuid.uuid4().hex, 0
    while store.add(f"{name} joined", 0) < world_size - 1:  # requests of the dead are answered, too, and not counted
        requests = store.add("requests", 0)
        for number in range(answered + 1, requests + 1):
            store.set(f"answer {number}", name)
        answered = requests
        time.sleep(0.01)
    return name


def choose_device(accelerator: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """-> the device, and why. Raises BadInput when the accelerator is not there."""
    has = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        found = next(name for name in ("gpu", "mps", "cpu") if has[name])
        reason = "no GPU found" if found == "cpu" else "found here"
    else:
        found, reason = accelerator, "as asked"
    if not has[found]:
        raise BadInput(f"--accelerator {found}, but PyTorch finds none here; --accelerator cpu works everywhere")
    if found != "gpu":
        return torch.device(found), reason
    if local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"process {local_rank + 1} of this machine has no GPU of its own (found: {torch.cuda.device_count()}); "
            "start fewer with --nproc-per-node, or give --accelerator cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), reason


def choose_precision(amp: str, device: torch.device, dim: int) -> tuple[torch.dtype | None, str]:
    """-> the type that autocast computes in (None: float32 throughout), and why."""
    names = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
    has_bf16_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if amp == "fp16" and device.type == "cpu":
        return torch.float16, "as asked; slow on a CPU, good for seeing the loss scaler work"
    if amp == "bf16" and device.type == "cpu" and not has_bf16_units:
        return torch.bfloat16, "as asked; this CPU has no units for it, so it is slower than float32"
    if amp != "auto":
        return names[amp], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes it fast, and it needs no loss scaling"
        return torch.float16, "this GPU has no fast bf16"
    if device.type == "cpu" and dim >= 256 and has_bf16_units:
        return torch.bfloat16, "this CPU multiplies matrices in it (AMX or AVX-512 BF16)"
    return None, "nothing to gain here from half precision"


def prepare_cpu(dim: int, batch_size: int) -> str:
    """Keep freed memory, spare the garbage collector, leave a small model to one thread. -> why so many threads.

    A second thread makes its steps little faster, and where other programs run both threads wait for each other: the
    default training then takes minutes instead of half a one.
    """
    keep_freed_memory()
    freeze_imports()
    if "OMP_NUM_THREADS" in os.environ:
        return "OMP_NUM_THREADS"
    if dim * batch_size <= 32 * 128:
        torch.set_num_threads(1)
        return "a model this small gains little from more"
    return "one a core"


@functools.cache  # once a process: what a finished training leaves behind shall be collected
def freeze_imports() -> None:
    """What the imports have made stays, so the garbage collector need not walk through it again and again."""
    gc.freeze()


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees for the next one, instead of giving it back to the system.

    Taking it anew costs a page fault every 4 KiB: a step at dim 512 took 395 ms instead of 345 on a CPU. Only glibc
    knows the call.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt's parameters in malloc.h
        libc = ctypes.CDLL(None)
        for parameter, size in ((mmap_threshold, 2**25), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            libc.mallopt(parameter, size)


def compile_model(model: torch.nn.Module) -> str:
    """Compile each block of the model's encoder and decoder in place, where a compiler works. -> what was done.

    Blocks of a kind are alike, so that two compilations serve them all; the whole model in one piece would take many
    times as long.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # torch wraps a missing compiler in many types
        return f"no: no working compiler here ({type(error).__name__}), so the model runs as it is written"
    for block in [*model.encoder, *model.decoder]:
        block.compile(dynamic=True)  # batches differ in length
    return "yes: torch.compile; the first step is slow"


def typed(program: str) -> str:
    """What to type for a program of this Python's: its name, or its path where the name would find another or none."""
    path = os.path.join(os.path.dirname(sys.executable), program)
    if sys.prefix == sys.base_prefix or shutil.which(program) == path:  # no virtual environment, or an activated one
        return program
    return min(path, os.path.relpath(path), key=len)


def seed_everything(seed: int) -> None:
    """Python's and PyTorch's generators (CPU and all GPUs). The project draws from PyTorch's alone."""
    random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of every generator, in types that torch.load accepts with weights_only."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
