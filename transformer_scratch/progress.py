"""How far a run has got: the counters, sums and ranking that a resumed run needs."""

import torch
from torch import Tensor


class Progress:
    """Counters, sums and the ranking of epochs; saved and loaded like the state of a model.

    epoch: the epoch in progress, from 0. batch: how many of its batches are done. step: updates
    done. ranking: [validation loss, epoch] of the checkpoints that are kept, the best first.
    epoch_loss: loss x tokens, summed over this process's batches of the epoch, on the device.
    epoch_tokens: the target tokens in those batches.
    """

    def __init__(self, device: torch.device):
        self.epoch = self.batch = self.step = 0
        self.ranking: list[list] = []
        self.epoch_loss: Tensor = torch.zeros((), device=device)
        self.epoch_tokens = 0

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.batch = epoch, 0
        self.epoch_loss = torch.zeros_like(self.epoch_loss)
        self.epoch_tokens = 0

    def state_dict(self) -> dict:
        return {**vars(self), "epoch_loss": self.epoch_loss.cpu()}

    def load_state_dict(self, state: dict) -> None:
        device = self.epoch_loss.device
        vars(self).update(state, epoch_loss=state["epoch_loss"].to(device))
