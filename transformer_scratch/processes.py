"""This process among those that torchrun started to train one model together."""

import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_scratch.errors import BadInput, when_main_ends


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
        """The run that this torchrun was training before it restarted its processes, if any."""
        if self.store is None or not self.store.check(["run"]):
            return None
        return Path(self.store.get("run").decode())


ALONE = Processes()


def start_processes() -> Processes:
    """Join the other processes, where torchrun started several."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("transformer_scratch", store)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own_store = dist.PrefixStore(name_of_this_start(store, rank, world_size), store)
        dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
        when_main_ends(leave_process_group)
    return Processes(rank, int(os.environ["LOCAL_RANK"]), world_size, store)


def leave_process_group() -> None:
    """Leave the group when main has ended well, otherwise when the process ends.

    After a fault the traceback still holds the distributed model, whose destructor would then wait
    for a peer that is gone.
    """
    if sys.exc_info()[0] is None:
        dist.destroy_process_group()
    else:
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
