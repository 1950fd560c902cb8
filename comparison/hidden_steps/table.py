"""Every step that Lightning takes for its user and train.py writes out: what, where in Lightning, and what it is for.

python -m comparison.hidden        prints the table of comparison/README.md
"""

from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Hidden:
    """One tag of train.py."""

    tag: str
    lightning: str  # what Lightning does
    where: str  # in which of its files, package first, and in which function or class
    twin: str  # the text in train_lightning.py that asks for it
    without: str  # what `python -m comparison.without` reports when our line is gone


PL = "pytorch_lightning"
HIDDEN = [
    Hidden(
        "seeding", "seeds Python, NumPy and PyTorch, when asked to",
        "lightning_fabric/utilities/seed.py:seed_everything", "pl.seed_everything(",
        "every loss differs from update 1 on, by up to 0.51: two runs are never the same",
    ),
    Hidden(
        "model to the device", "moves the model, then builds the optimizer",
        f"{PL}/strategies/strategy.py:setup", "accelerator=config.accelerator",
        "stops at the first batch: the weights are not where its tensors are",
    ),
    Hidden(
        "gradients averaged over the processes", "wraps the model in DistributedDataParallel, in `fit` only",
        f"{PL}/strategies/ddp.py:_setup_model", "strategy=",
        "with 2 processes: no gradient is exchanged, each process trains a model of its own on half of the data; "
        "train loss 0.168 → 0.269",
    ),
    Hidden(
        "no gradients outside training", "`no_grad` for validation within `fit`, `inference_mode` for `test`",
        f"{PL}/loops/utilities.py:_no_grad_context", "def validation_step",
        "evaluation keeps 1.7 MiB for a backward pass that never comes, at 1 layer and dim 32",
    ),
    Hidden(
        "train mode", "never calls `train()`: it puts each module back to the mode it had before validation",
        f"{PL}/utilities/model_helpers.py:_ModuleMode", "def validation_step",
        "losses differ from the second epoch on: it trains without dropout",
    ),
    Hidden(
        "a new order every epoch", "calls `set_epoch` of any sampler that has it",
        "lightning_fabric/utilities/data.py:_set_sampler_epoch", "sampler = BatchSampler(",
        "losses differ from the second epoch on: every epoch has the same batches in the same order",
    ),
    Hidden(
        "batch to the device", "moves every tensor it finds in the batch, through lists, tuples and dicts",
        "lightning_fabric/utilities/apply_func.py:move_data_to_device", "def training_step",
        "stops at the first batch: its tensors are not where the weights are",
    ),
    Hidden(
        "no_sync", "no exchange between processes until the update is due",
        f"{PL}/strategies/parallel.py:block_backward_sync", "strategy=",
        "with 2 processes and `--accumulate 4`: gradients are exchanged 150 times instead of 39; the losses differ by "
        "rounding alone (4.8e-07)",
    ),
    Hidden(
        "autocast", "lays it around each of the three steps, and around nothing else",
        f"{PL}/plugins/precision/amp.py:forward_context", "**precision(",
        "with `--amp bf16`: losses differ from update 1 on, by up to 0.1: it computes in float32",
    ),
    Hidden(
        "backward", "divides the loss by `accumulate_grad_batches`, scales it in fp16, goes backward",
        f"{PL}/loops/optimization/automatic.py:closure", "return loss",
        "nothing is learned: train loss 0.069 → 5.3, 0 % exact",
    ),
    Hidden(
        "accumulation", "holds the update back until the window is full or the epoch ends",
        f"{PL}/loops/training_epoch_loop.py:_should_accumulate", "accumulate_grad_batches=",
        "with `--accumulate 4`: 300 updates instead of 75, each on a quarter of the data",
    ),
    Hidden(
        "unscale before clipping", "at every fp16 update, whether it clips or not",
        f"{PL}/plugins/precision/amp.py:optimizer_step", "**precision(",
        "with `--amp fp16`: losses differ from update 2 on, by up to 0.17: 65,536-fold gradients are clipped, so all "
        "updates are clipped",
    ),
    Hidden(
        "clipping", "clips by L2 norm and throws the norm away",
        f"{PL}/plugins/precision/precision.py:clip_grad_by_norm", "gradient_clip_val=",
        "losses differ from update 3 on, by up to 0.66",
    ),
    Hidden(
        "optimizer step", "enters the optimizer first: forward and backward run inside of it, as its closure",
        f"{PL}/plugins/precision/precision.py:optimizer_step", "def configure_optimizers",
        "nothing is learned: train loss 0.069 → 5.3, 0 % exact",
    ),
    Hidden(
        "scaler update", "right after the step; an update that overflowed still counts in `global_step`",
        f"{PL}/plugins/precision/amp.py:optimizer_step", "**precision(",
        "with `--amp fp16`: stops in the second update: `unscale_() is being called after step()`",
    ),
    Hidden(
        "schedule", "steps it after each update or epoch, also after updates that fp16 skipped",
        f"{PL}/loops/training_epoch_loop.py:_update_learning_rates", "schedule = make_schedule(",
        "the learning rate stays where the warm-up began: train loss 0.069 → 1.48, 90 % exact → 10 %",
    ),
    Hidden(
        "zero_grad", "between forward and backward of a window's first batch",
        f"{PL}/loops/optimization/automatic.py:_optimizer_zero_grad", "def training_step",
        "gradients pile up: train loss 0.069 → 0.66, 90 % exact → 30 %",
    ),
    Hidden(
        "reading the loss only now and then", "logs every `log_every_n_steps`, but reads for the bar at every batch",
        f"{PL}/trainer/connectors/logger_connector/logger_connector.py:should_update_logs", "log_every_n_steps=",
        "the loop waits for the device 300 times instead of 30, and W&B gets ten times the rows",
    ),
    Hidden(
        "logging", "`self.log` keeps, forks, averages and sends, with a step count of its own for each stage",
        f"{PL}/trainer/connectors/logger_connector/logger_connector.py:log_metrics", "self.log(",
        "W&B gets 0 rows of updates instead of 30",
    ),
    Hidden(
        "eval mode", "notes the mode of every module, calls `eval()`, and afterwards puts each back",
        f"{PL}/loops/evaluation_loop.py:_on_evaluation_model_eval", "def validation_step",
        "dropout rolls dice over validation and moves the random stream: val loss 0.053 → 0.067, losses differ from "
        "the second epoch on",
    ),
    Hidden(
        "epoch mean", "mean of the logged values, weighted by `batch_size` (guessed, unless given)",
        f"{PL}/trainer/connectors/logger_connector/result.py:_ResultMetric", "on_epoch=True",
        "the last batch stands for the epoch: train loss 0.069 → 0.045",
    ),
    Hidden(
        "validation", "after the last batch of an epoch; once before training, too, on two batches",
        f"{PL}/loops/training_epoch_loop.py:on_advance_end", "trainer.fit(",
        "with the training loss in its place another epoch is taken for the best one (2, not 1)",
    ),
    Hidden(
        "the best k", "keeps the k best files; ties go to the older one",
        f"{PL}/callbacks/model_checkpoint.py:check_monitor_top_k", "ModelCheckpoint(",
        "with `--save-top-k 1`: the newest counts as the best, and 3 files are kept instead of 1",
    ),
    Hidden(
        "a checkpoint to go on from", "in every file: optimizer, schedule, loop counters; never the random state",
        f"{PL}/trainer/connectors/checkpoint_connector.py:dump_checkpoint", "ModelCheckpoint(",
        "`--resume` goes back to update 0, not 300",
    ),
    Hidden(
        "the best weights, not the last", "given the module, tests its last weights, unless told `ckpt_path=\"best\"`",
        f"{PL}/trainer/connectors/checkpoint_connector.py:_parse_ckpt_path", 'ckpt_path="best"',
        "the last weights are tested: another test loss (0.022 → 0.003 here: more luck than merit, and not the file "
        "one would use)",
    ),
]  # fmt: skip


def line_of(text: str, tag: str) -> tuple[int, str]:
    """-> the number and the code of the line of train.py with this tag."""
    for number, line in enumerate(text.splitlines(), start=1):
        if f"# [hidden: {tag}]" in line:
            return number, line.split("# [hidden:")[0].strip()
    raise ValueError(f"train.py has no line with the tag [hidden: {tag}]")


def table() -> str:
    """The table of the README, one row a tag, in the order of train.py."""
    source = (PROJECT / "train.py").read_text()
    rows = [
        "| tag | Lightning | where | our line in `train.py` | without it |",
        "|---|---|---|---|---|",
    ]
    for hidden in HIDDEN:
        file, name = hidden.where.split(":")
        code = line_of(source, hidden.tag)[1].replace("|", "\\|")
        rows.append(
            f"| {hidden.tag} | {hidden.lightning} | `{name}` in `{file}` | `{code}` | {hidden.without} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
