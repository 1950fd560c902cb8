"""The steps that train.py writes out and Lightning hides: one entry for each tag of train.py.

python -m comparison.hidden_steps.table        prints the table of comparison/README.md
"""

from dataclasses import dataclass
from pathlib import Path

from transformer_scratch.errors import exits_cleanly

PROJECT = Path(__file__).resolve().parent.parent.parent
PL = "pytorch_lightning"
CONNECTORS = f"{PL}/trainer/connectors"


@dataclass(frozen=True)
class Hidden:
    """One tag of train.py."""

    tag: str
    without: str  # what remove_lines.py measures when the line is gone
    lightning: str  # what Lightning does
    where: str  # in which of its files, and in which function or class
    twin: str  # the text in train_lightning.py that asks for it


HIDDEN = [
    Hidden(
        "no gradients outside training",
        without="evaluation keeps 1.9 MiB for a backward pass that never comes",
        lightning="`no_grad` for validation within `fit`, `inference_mode` for `test`",
        where=f"{PL}/loops/utilities.py:_no_grad_context",
        twin="def validation_step",
    ),
    Hidden(
        "seeding",
        without="all losses differ, by up to 0.5: no two runs are the same",
        lightning="only when asked: `seed_everything`",
        where="lightning_fabric/utilities/seed.py:seed_everything",
        twin="pl.seed_everything(",
    ),
    Hidden(
        "model to the device",
        without="stops at the first batch: the weights are on another device",
        lightning="moves the model before it asks for the optimizer",
        where=f"{PL}/strategies/strategy.py:setup",
        twin="accelerator=config.accelerator",
    ),
    Hidden(
        "gradients averaged over the processes",
        without="with 2 processes: each trains a model of its own on half of the data; "
        "train loss 0.41 → 0.50",
        lightning="wraps the model in DistributedDataParallel, in `fit` only",
        where=f"{PL}/strategies/ddp.py:_setup_model",
        twin="strategy=",
    ),
    Hidden(
        "train mode",
        without="losses differ from the second epoch on: it trains without dropout",
        lightning="no `train()`: puts each module back to the mode it had before validation",
        where=f"{PL}/utilities/model_helpers.py:_ModuleMode",
        twin="def validation_step",
    ),
    Hidden(
        "a new order every epoch",
        without="losses differ from the second epoch on: every epoch has the same batches in the "
        "same order",
        lightning="calls `set_epoch` of any sampler that has it",
        where="lightning_fabric/utilities/data.py:_set_sampler_epoch",
        twin="make_loaders(",
    ),
    Hidden(
        "batch to the device",
        without="stops at the first batch: its tensors are on another device than the weights",
        lightning="moves every tensor of the batch, through lists, tuples and dicts",
        where="lightning_fabric/utilities/apply_func.py:move_data_to_device",
        twin="def training_step",
    ),
    Hidden(
        "no_sync",
        without="with 2 processes and `--accumulate 4`: 150 exchanges of gradients instead of 39; "
        "losses differ by rounding (2.4e-07)",
        lightning="no exchange between processes until the update is due",
        where=f"{PL}/strategies/parallel.py:block_backward_sync",
        twin="strategy=",
    ),
    Hidden(
        "autocast",
        without="with `--amp bf16`: all losses differ, by up to 0.24: it computes in float32",
        lightning="around each of the three steps, and nothing else",
        where=f"{PL}/plugins/precision/amp.py:forward_context",
        twin="**precision(",
    ),
    Hidden(
        "backward",
        without="nothing is learned: train loss 0.19 → 4.9",
        lightning="divides the loss by `accumulate_grad_batches`, scales it in fp16, runs backward",
        where=f"{PL}/loops/optimization/automatic.py:closure",
        twin='return {"loss":',
    ),
    Hidden(
        "accumulation",
        without="with `--accumulate 4`: 300 updates instead of 75, each on a quarter of the data",
        lightning="no update until the window is full or the epoch ends",
        where=f"{PL}/loops/training_epoch_loop.py:_should_accumulate",
        twin="accumulate_grad_batches=",
    ),
    Hidden(
        "unscale before clipping",
        without="with `--amp fp16`: losses differ from update 2 on, by up to 0.41: every update is "
        "clipped, because its gradients are 65,536 times too large",
        lightning="in every fp16 update, whether it clips or not, but it leaves that to a "
        "fused optimizer, whose step comes after the clipping",
        where=f"{PL}/plugins/precision/amp.py:optimizer_step",
        twin="**precision(",
    ),
    Hidden(
        "clipping",
        without="losses differ from update 3 on, by up to 0.64",
        lightning="`gradient_clip_val`: by L2 norm; the norm is thrown away",
        where=f"{PL}/plugins/precision/precision.py:clip_grad_by_norm",
        twin="gradient_clip_val=",
    ),
    Hidden(
        "optimizer step",
        without="nothing is learned: train loss 0.19 → 4.9",
        lightning="forward and backward run inside the optimizer's step, as its closure",
        where=f"{PL}/plugins/precision/precision.py:optimizer_step",
        twin="def configure_optimizers",
    ),
    Hidden(
        "scaler update",
        without="with `--amp fp16`: stops in the second update: "
        "`unscale_() is being called after step()`",
        lightning="right after the step; a skipped update still counts in `global_step`",
        where=f"{PL}/plugins/precision/amp.py:optimizer_step",
        twin="**precision(",
    ),
    Hidden(
        "schedule",
        without="the learning rate stays where the warm-up began: train loss 0.19 → 1.8",
        lightning="after each update or epoch, also after updates that fp16 skipped",
        where=f"{PL}/loops/training_epoch_loop.py:_update_learning_rates",
        twin="schedule = make_schedule(",
    ),
    Hidden(
        "averaging",
        without="with `--average 0.99`: the weights of the start are validated and tested",
        lightning="a callback, `EMAWeightAveraging`, of constant decay; it puts the last weights "
        "back before `on_validation_epoch_end`",
        where=f"{PL}/callbacks/weight_averaging.py:on_train_batch_end",
        twin="self.averaged = ",
    ),
    Hidden(
        "zero_grad",
        without="gradients pile up: train loss 0.19 → 0.45",
        lightning="between forward and backward of an update's first batch",
        where=f"{PL}/loops/optimization/automatic.py:_optimizer_zero_grad",
        twin="def training_step",
    ),
    Hidden(
        "reading the loss only now and then",
        without="the loop waits for the device 300 times instead of 30, and W&B gets 300 rows "
        "instead of 30",
        lightning="logs every `log_every_n_steps`; its bar reads at every batch by default",
        where=f"{CONNECTORS}/logger_connector/logger_connector.py:should_update_logs",
        twin="log_every_n_steps=",
    ),
    Hidden(
        "logging",
        without="W&B gets no row of an update instead of 30",
        lightning="`self.log` keeps, averages and sends; each stage counts its own steps",
        where=f"{CONNECTORS}/logger_connector/logger_connector.py:log_metrics",
        twin="self.log(",
    ),
    Hidden(
        "eval mode",
        without="dropout makes validation random and advances the random generator: "
        "losses differ from the second epoch on",
        lightning="notes the mode of every module, calls `eval()`, and restores each afterwards",
        where=f"{PL}/loops/evaluation_loop.py:_on_evaluation_model_eval",
        twin="def validation_step",
    ),
    Hidden(
        "epoch mean",
        without="the last batch stands for the epoch: train loss 0.19 → 0.055",
        lightning="weighs the logged values by `batch_size`, which it guesses unless given",
        where=f"{CONNECTORS}/logger_connector/result.py:_ResultMetric",
        twin="on_epoch=True",
    ),
    Hidden(
        "validation",
        without="the training loss in its place takes another epoch for the best one (2, not 1)",
        lightning="after the last batch of an epoch, and two batches before training",
        where=f"{PL}/loops/training_epoch_loop.py:on_advance_end",
        twin="trainer.fit(",
    ),
    Hidden(
        "the best k",
        without="with `--save-top-k 1`: 3 files of weights are kept instead of 1",
        lightning="keeps the k best files; of two equal ones the older",
        where=f"{PL}/callbacks/model_checkpoint.py:check_monitor_top_k",
        twin="ModelCheckpoint(",
    ),
    Hidden(
        "a checkpoint for resuming",
        without="`--resume` goes back to update 0, not 300",
        lightning="every file has optimizer, schedule and counters, but no random state",
        where=f"{CONNECTORS}/checkpoint_connector.py:dump_checkpoint",
        twin="ModelCheckpoint(",
    ),
    Hidden(
        "the best weights, not the last",
        without="the last weights are tested, not those of best.pt: test loss 0.133 → 0.088 "
        "(better here, by luck)",
        lightning='given the module, tests its last weights unless told `ckpt_path="best"`',
        where=f"{CONNECTORS}/checkpoint_connector.py:_parse_ckpt_path",
        twin='ckpt_path="best"',
    ),
]


def line_of(source: str, tag: str) -> int:
    """The number of the line of train.py with this tag. Raises ValueError where there is none."""
    for number, line in enumerate(source.splitlines(), start=1):
        if f"# [hidden: {tag}]" in line:
            return number
    raise ValueError(f"train.py has no line with the tag [hidden: {tag}]")


def table() -> str:
    """The table of the README: one row a tag, in the order of train.py."""
    rows = ["| tag | without the line | Lightning |", "|---|---|---|"]
    rows += [f"| {hidden.tag} | {hidden.without} | {hidden.lightning} |" for hidden in HIDDEN]
    return "\n".join(rows)


@exits_cleanly
def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
