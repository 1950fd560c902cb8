"""Run by startup.py in a process of its own: starts train.py or its twin, notes when each stage of the start is over.

After the first training step it prints the notes, and what was imported, as a line of JSON among the program's output.
"""

import sys
import time
from pathlib import Path

STAMPS = [("Python itself", time.time())]


class Enough(Exception):
    """The first step is done."""


def stamp(stage: str) -> None:
    STAMPS.append((stage, time.time()))


def main(program: str, flags: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # In the order in which the programs import them; both need all of these.
    import torch  # noqa: F401

    stamp("import torch")
    import wandb

    stamp("import wandb")
    run = start_train if program == "train" else start_lightning
    try:
        run(flags)
    except Enough:
        stamp("first step")
    imported = sorted({name.partition(".")[0] for name in sys.modules} | set(sys.modules) & {"torch._dynamo"})
    wandb.finish()
    import json

    print("\n" + json.dumps({"stamps": STAMPS, "imported": imported}), flush=True)


def start_train(flags: list[str]) -> None:
    import train
    from transformer_scratch import summary

    stamp("import the rest")
    print_start = summary.print_start

    def stamp_start(*arguments: object) -> None:
        print_start(*arguments)
        stamp("data, model, folder, W&B")

    class Bar(summary.tqdm):
        def update(self, n: int = 1) -> None:
            raise Enough

    summary.print_start, summary.tqdm = stamp_start, Bar
    train.main(flags)


def start_lightning(flags: list[str]) -> None:
    import pytorch_lightning as pl

    stamp("import pytorch_lightning")
    from comparison import train_lightning

    stamp("import the rest")

    class FirstStep(pl.Callback):
        def on_train_start(self, *_: object) -> None:
            stamp("data, model, folder, W&B")

        def on_train_batch_end(self, *_: object) -> None:
            raise Enough

    train_lightning.main(flags, callbacks=[FirstStep()])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
