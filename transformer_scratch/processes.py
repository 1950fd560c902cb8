"""This process among those that torchrun started to train one model together."""

import atexit
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_scratch.errors import BadInput, exit_code_so_far, when_main_ends


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and what they say to each other. Alone it is 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    # torchrun keeps the store for as long as it lives, over restarts of its processes.
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """The one process that prints, reads and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all processes up, in place, on every process."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, weighted_sum: Tensor, weight: int) -> float:
        """All processes' weighted sums over all their weights."""
        total = self.sum(torch.tensor(weight, device=weighted_sum.device))
        return (self.sum(weighted_sum.clone()) / total).item()

    def gather(self, value: object) -> list:
        """The value of every process, in order of rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_main(self, function: Callable[[], object]) -> object:
        """Call it on the main process; all processes get its result, or the BadInput it raises."""
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
        """The run that this torchrun was training before it restarted its processes, if any.

        The main process asks for all: it keeps the store, which is gone as soon as it has refused
        what the others refuse a little later.
        """
        if self.store is None:
            return None

        def ask() -> Path | None:
            return Path(self.store.get("run").decode()) if self.store.check(["run"]) else None

        return self.run_on_main(ask)


ALONE = Processes()
WHO_SETS_IT = "torchrun sets it; to train with one process, unset WORLD_SIZE"


def start_processes() -> Processes:
    """Join the other processes, where torchrun started several.

    Raises BadInput when the environment does not say which process this is, or where the others
    are to be found.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not under_torchrun and os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    world_size = number_from_environment("WORLD_SIZE", 1, 2**31 - 1)
    rank = number_from_environment("RANK", 0, world_size - 1)
    local_rank = number_from_environment("LOCAL_RANK", 0, world_size - 1)
    port = number_from_environment("MASTER_PORT", 1, 65_535)
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise BadInput(f"MASTER_ADDR must name the host of process 0; {WHO_SETS_IT}")
    place = f"MASTER_ADDR={host} MASTER_PORT={port}"
    try:
        store = call_interruptibly(lambda: join(rank, world_size), place)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"the processes cannot meet at {place}: {reason}") from None
    if world_size > 1:
        when_main_ends(leave_process_group)
    return Processes(rank, local_rank, world_size, store)


def number_from_environment(name: str, least: int, most: int) -> int:
    """Raises BadInput when the variable does not hold such a number."""
    text = os.environ.get(name)
    if text is None or not text.isdecimal() or not least <= int(text) <= most:
        state = "is not set" if text is None else f"is {text!r}"
        raise BadInput(f"{name} {state}, but must be from {least} to {most}; {WHO_SETS_IT}")
    return int(text)


def call_interruptibly(function: Callable[[], object], place: str) -> object:
    """Call what waits for others: in a thread, as PyTorch waits where no Ctrl-C is heard."""
    future = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if not wait([future], timeout=10).done:
        print(f"waiting for the other processes at {place}", file=sys.stderr)
    return future.result()


def join(rank: int, world_size: int) -> dist.Store:
    """Wait until all processes have come. -> the store that they share."""
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("transformer_scratch", store)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own_store = dist.PrefixStore(name_of_this_start(store, rank, world_size), store)
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
    return store


def leave_process_group() -> None:
    """Leave the group when main has ended well, otherwise when the process ends.

    After a fault the traceback still holds the distributed model, whose destructor would then wait
    for a peer that is gone.
    """
    if sys.exc_info()[0] is None:
        dist.destroy_process_group()
        return
    if exit_code_so_far() == 1 and torch.cuda.is_initialized():
        # Perhaps a fault of this process alone: NCCL would wait for what the others are to send.
        dist.group.WORLD._get_backend(torch.device("cuda")).abort()
    atexit.register(dist.destroy_process_group)


def name_of_this_start(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the processes started together share, and no processes before them had.

    After a restart the store still holds the addresses of the dead processes under the keys of the
    living, who would wait for them for ever (pytorch issue 135712). How often torchrun has
    restarted is no such name: each node counts for itself.
    """
    if rank > 0:
        name = store.get(f"answer {store.add('requests', 1)}").decode()
        store.add(f"{name} joined", 1)
        return name
    name, answered = uuid.uuid4().hex, 0
    # Requests that the dead left behind are answered, too; only the living join.
    while store.add(f"{name} joined", 0) < world_size - 1:
        requests = store.add("requests", 0)
        for number in range(answered + 1, requests + 1):
            store.set(f"answer {number}", name)
        answered = requests
        time.sleep(0.01)
    return name
