"""Random numbers: seeded once, saved in every checkpoint."""

import random

import torch

from transformer_scratch.errors import when_main_ends


def seed_everything(seed: int) -> None:
    """Seed Python's generator and PyTorch's, on the CPU and on the GPU, until main ends."""
    generators = RandomState()
    when_main_ends(generators.load_state_dict, generators.state_dict())
    random.seed(seed)
    torch.manual_seed(seed)


class RandomState:
    """The state of all generators of this process, saved and loaded like that of a model.

    Of a GPU only where it is in use: asking for its state would take some of its memory.
    """

    def state_dict(self) -> dict:
        state = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["cuda"])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
