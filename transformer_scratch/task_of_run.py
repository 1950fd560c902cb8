"""Which task a run has: digits, or a file of pairs."""

from pathlib import Path

from transformer_scratch.digits import Digits
from transformer_scratch.task import Task
from transformer_scratch.text_pairs import TextPairs


def make_task(config, checkpoint: dict | None = None) -> Task:
    """The task to train on. Raises BadInput when a checkpoint was trained on another."""
    if config.pairs is None:
        return Digits.from_config(config)
    return TextPairs.from_config(config, checkpoint and checkpoint["task"])


def load_task(config, checkpoint: dict, folder: Path | None) -> Task:
    """The task of a trained run in this folder; without one, only for other questions than its own.

    Raises BadInput.
    """
    if config.pairs is None:
        return Digits.from_config(config)
    return TextPairs.from_run(config, checkpoint["task"], folder)
