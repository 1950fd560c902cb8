"""Tells the time that a loop takes for itself from the time of the model it trains.

What train.py and its Lightning twin call alike (fetching a batch, the model, its loss, backward,
the end of autocast, clipping, AdamW's step, zero_grad) is the model's; the rest is the loop's own.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data.dataloader import _BaseDataLoaderIter

from transformer_scratch.model import Transformer

# Both programs look these up by name at every call, so that neither has to be changed.
MODELS_OWN = [
    (_BaseDataLoaderIter, "__next__"),
    (Transformer, "forward"),
    (F, "cross_entropy"),
    (Tensor, "backward"),
    (torch.amp.autocast, "__exit__"),  # lets go of the weights it has cast
    (nn.utils, "clip_grad_norm_"),
    (torch.optim.AdamW, "step"),
    (torch.optim.Optimizer, "zero_grad"),
]


class Stopwatch:
    """Adds up the time spent outside the functions in MODELS_OWN."""

    def __init__(self):
        self.own_time, self.is_own, self.since = 0.0, True, time.perf_counter()

    def switch(self, is_own: bool) -> None:
        """Say whose time runs from here on."""
        now = time.perf_counter()
        if self.is_own:
            self.own_time += now - self.since
        self.is_own, self.since = is_own, now

    def read(self) -> float:
        """The loop's own seconds so far."""
        self.switch(self.is_own)
        return self.own_time

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the program that runs meanwhile."""
        # The first AdamW of a process makes PyTorch wrap its step. That has to come first: the
        # wrapper, in which the hooks of a step run, is then always within what is timed.
        torch.optim.AdamW([nn.Parameter(torch.zeros(()))])
        with contextlib.ExitStack() as stack:
            for owner, name in MODELS_OWN:
                function = getattr(owner, name)
                wrap = {"cross_entropy": self.loss, "backward": self.backward, "step": self.step}
                timed = wrap.get(name, self.timed)(function)
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def timed(self, function: Callable, is_own: bool = False) -> Callable:
        @functools.wraps(function)
        def call(*arguments: object, **options: object) -> object:
            before = self.is_own
            self.switch(is_own)
            try:
                return function(*arguments, **options)
            finally:
                self.switch(before)

        return call

    def loss(self, cross_entropy: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> Tensor:
            self.newest_loss = cross_entropy(*arguments, **options)
            return self.newest_loss

        return self.timed(call)

    def backward(self, backward: Callable) -> Callable:
        """Free the graph here, rather than at whatever later line lets go of the loss."""

        def call(tensor: Tensor, *arguments: object, **options: object) -> None:
            backward(tensor, *arguments, **options)
            tensor.detach_()
            self.newest_loss.detach_()

        return self.timed(call)

    def step(self, step: Callable) -> Callable:
        """Leave out the closure in which Lightning runs everything else."""

        @functools.wraps(step)  # tells PyTorch that this step is wrapped already
        def call(optimizer: torch.optim.Optimizer, closure: Callable | None = None) -> object:
            return step(optimizer, closure and self.timed(closure, is_own=True))

        return self.timed(call)
