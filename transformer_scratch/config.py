"""The command line, flat flags read by tyro; what depends on size or hardware is chosen here, with a reason."""

import dataclasses
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from transformer_scratch.checkpoint import load_resumable
from transformer_scratch.data import Task, split_pairs
from transformer_scratch.errors import BadInput
from transformer_scratch.runtime import ALONE, Processes, choose_device, choose_precision


@dataclass
class ModelOptions:
    """The Transformer, in the paper's terms."""

    dim: int = 32
    """Width of the model."""
    num_heads: int = 1
    """Attention heads; must divide --dim."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward networks. None: 4 x --dim, the paper's ratio."""
    dropout: float = 0.1
    """Probability of dropping an element, where the paper drops: embeddings and sub-layer outputs. 0 = off."""
    tie_embeddings: bool = True
    """Share one matrix between both embeddings and the output projection (section 3.4 of the paper)."""


@dataclass
class DataOptions:
    """The task and its samples."""

    num_categories: int = 10
    """Digits of the task; 10 make 100 pairs, 30 make 900."""
    seq_len: int | None = None
    """Length of a padded sequence. None: --num-categories + 6, so 16 for ten digits."""
    num_datas: int = 38_400
    """Training samples in an epoch, drawn with repetition from the training pairs."""
    holdout: float = 0.2
    """Share of the distinct pairs kept out of training, for validation and test. 0 = all share them (the article)."""
    num_workers: int = 0
    """Processes that prepare batches. 0 = none, which is fastest for this small data."""


@dataclass
class TrainingOptions:
    """The loop: how long, in what steps."""

    max_epochs: int = 3
    """Epochs to train; there is no early stopping."""
    batch_size: int = 128
    """Samples per process in one forward and backward pass."""
    accumulate: int = 1
    """Batches whose gradients make up one update."""
    lr: float | None = None
    """Learning rate of AdamW after the warm-up, constant. None: 1e-3 x (32 / --dim)^(5/6)."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises linearly to --lr. 0 = off."""
    weight_decay: float = 0.1
    """Weight decay of AdamW. 0 = off."""
    clip_norm: float = 1.0
    """Scale gradients down to this L2 norm. 0 = off."""
    seed: int = 42
    """Decides the split, the first weights, the order of the data and dropout."""


@dataclass
class HardwareOptions:
    """Where and in what precision to compute."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    devices: int = 1
    """Number of processes, one a device. Above 1, start it with torchrun; without it, the error says how."""
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """Mixed precision. fp16 scales the loss, bf16 need not. auto: what the device computes fast."""
    compile: bool = False
    """Compile the model with torch.compile. The first step is slow; what later ones gain depends on the machine."""


@dataclass
class RunOptions:
    """What is written where, and what is shown."""

    resume: str | None = None
    """Folder of a run to continue; every other setting comes from there. Given beside it, --max-epochs goes further."""
    run_dir: str | None = None
    """Folder of this run. None: runs/ and a name made of the settings."""
    save_every: int = 0
    """Updates between two writings of last.pt within an epoch. 0 = only at its end."""
    save_top_k: int = 10
    """How many epoch=K.pt to keep, by lowest validation loss."""
    log_every: int = 10
    """Updates between two readings of the loss: then the bar and W&B get the newest, metrics.jsonl all of them."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: online if you are logged in, otherwise offline; never a question."""
    wandb_project: str = "transformer-scratch"
    """Project in W&B."""
    debug: bool = False
    """Tag the W&B run "debug" instead of "run"."""


@dataclass
class Config(RunOptions, HardwareOptions, TrainingOptions, DataOptions, ModelOptions):
    """Every setting of a run, flat."""


@dataclass
class CommandLine:
    """Train a Transformer, written from scratch, to count from one digit to another.

    Every flag may be written with dashes or underscores. None means: chosen by size or hardware, and printed at the
    start together with the reason.
    """

    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    hardware: HardwareOptions
    run: RunOptions


# What a resumed run may be told anew, because it cannot change what the run has computed so far.
CHANGEABLE_ON_RESUME = {
    "resume", "max_epochs", "log_every", "save_every", "num_workers", "debug", "wandb", "wandb_project",
}  # fmt: skip


def parse(arguments: list[str] | None, default: Config) -> Config:
    """The flags as given; grouped for --help, and flat for everything else."""
    groups = {
        group.name: group.type(**{field.name: getattr(default, field.name) for field in dataclasses.fields(group.type)})
        for group in dataclasses.fields(CommandLine)
    }
    # --help and wrong flags are tyro's: explained, with exit codes 0 and 2.
    given = tyro.cli(CommandLine, args=arguments, default=CommandLine(**groups), config=(tyro.conf.OmitArgPrefixes,))
    return Config(**{name: value for group in vars(given).values() for name, value in vars(group).items()})


def load_config(arguments: list[str] | None = None, processes: Processes = ALONE) -> tuple[Config, dict | None]:
    """The configuration as given on the command line, checked, and the state to go on from (None for a new run).

    With --resume every setting is the saved one, and what is given beside it must not change the run so far.
    Raises BadInput.
    """
    config = parse(arguments, Config())
    folder = processes.run_before_restart() if config.resume is None else config.resume
    if folder is None:
        check(config, processes)
        return config, None
    saved = processes.from_main(lambda: load_resumable(Path(folder)))
    before = saved_config(saved, folder)
    config = keep_settings(before, parse(arguments, before))
    config = dataclasses.replace(config, resume=str(folder))
    check(config, processes)
    if config.max_epochs < saved["epoch"]:
        raise BadInput(f"--max-epochs {config.max_epochs}, but the run has done {saved['epoch']} epochs already")
    return config, saved


def saved_config(saved: dict, origin: object) -> Config:
    """The configuration in a checkpoint. Raises BadInput when it has settings that this version does not know."""
    if unknown := saved["config"].keys() - {field.name for field in dataclasses.fields(Config)}:
        raise BadInput(f"{origin} was trained with settings unknown to this version: {', '.join(sorted(unknown))}")
    return Config(**saved["config"])


def keep_settings(before: Config, config: Config) -> Config:
    """The configuration of a resumed run. Raises BadInput where it would change what the run has computed so far."""
    changed = []
    for field in dataclasses.fields(Config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if new is None or (new == "auto" and field.name in ("accelerator", "amp")):  # chosen when the run began
            config = dataclasses.replace(config, **{field.name: old})
        elif old != new and field.name not in CHANGEABLE_ON_RESUME:
            changed.append(f"{flag(field.name)} (it was {old}, now {new})")
    if changed:
        allowed = ", ".join(flag(name) for name in sorted(CHANGEABLE_ON_RESUME - {"resume"}))
        raise BadInput(
            f"{', '.join(changed)} cannot change in a resumed run. Leave it out, or start a new run. "
            f"These may change: {allowed}"
        )
    return config


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(config: Config, processes: Processes) -> None:
    """Raise BadInput for any value that cannot work, before anything is created."""
    whole_from_one = (
        "devices", "max_epochs", "num_datas", "batch_size", "num_heads", "dim", "num_layers", "ffn_dim",
        "num_categories", "seq_len", "accumulate", "log_every", "save_top_k",
    )  # fmt: skip
    for name in whole_from_one:
        require(name, config, lambda value: value >= 1, "must be 1 or more")
    for name in ("warmup_steps", "num_workers", "save_every"):
        require(name, config, lambda value: value >= 0, "must be 0 (off) or more")
    for name in ("weight_decay", "clip_norm"):
        require(name, config, lambda value: 0 <= value < math.inf, "must be 0 (off) or more, and finite")
    for name in ("dropout", "holdout"):
        require(name, config, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    require("lr", config, lambda value: 0 < value < math.inf, "must be above 0, and finite")
    require("seed", config, lambda value: 0 <= value < 2**32, "must be from 0 to 4294967295")
    if config.dim % config.num_heads:
        divisors = [str(n) for n in range(1, config.dim + 1) if config.dim % n == 0]
        raise BadInput(
            f"--dim {config.dim} is not divisible by --num-heads {config.num_heads}; these fit: {', '.join(divisors)}"
        )
    if config.devices != processes.world_size and (config.devices > 1 or config.resume):
        started = f"torchrun started {processes.world_size}" if processes.world_size > 1 else "one process was started"
        starter = f"torchrun --standalone --nproc-per-node {config.devices}" if config.devices > 1 else "python"
        raise BadInput(
            f"--devices {config.devices}, but {started}. Start several processes with torchrun, a single one "
            f"without; here: {starter} {shlex.join(sys.argv)}"
        )
    if not config.wandb_project or set(config.wandb_project) & set("/\\#?%:"):
        raise BadInput(f"--wandb-project {config.wandb_project!r} must be a name without / \\ # ? % :")
    global_batch = config.batch_size * processes.world_size
    if global_batch > config.num_datas:
        raise BadInput(
            f"a batch of {global_batch} is larger than --num-datas {config.num_datas}: give a smaller --batch-size "
            "or more --num-datas"
        )
    try:
        task = Task(config.num_categories, config.seq_len or default_seq_len(config))
        split_pairs(task, config.holdout, config.seed)
    except ValueError as error:
        raise BadInput(str(error)) from None


def require(name: str, config: Config, holds, rule: str) -> None:
    """Raise BadInput unless the value is None (to be chosen) or the rule holds for it; NaN holds for no rule."""
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise BadInput(f"{flag(name)} {value} {rule}")


def default_seq_len(config: Config) -> int:
    return config.num_categories + 6


def settle_config(
    config: Config, processes: Processes
) -> tuple[Config, torch.device, torch.dtype | None, dict[str, str]]:
    """Fill in what was left to size and hardware.

    -> the full configuration, the device, the type of mixed precision, and a reason for each choice. Raises BadInput.
    """
    rules = {
        "lr": (float(f"{1e-3 * (32 / config.dim) ** (5 / 6):.3g}"), "1e-3 x (32 / dim)^(5/6)"),
        "ffn_dim": (4 * config.dim, "4 x dim, the paper's ratio"),
        "seq_len": (default_seq_len(config), "num_categories + 6"),
    }
    chosen = {name: value for name, (value, _) in rules.items() if getattr(config, name) is None}
    reasons = {name: rules[name][1] for name in chosen}
    try:
        device, reasons["device"] = choose_device(config.accelerator, processes.local_rank)
    except BadInput as error:
        if config.resume is None:
            raise
        raise BadInput(f"{config.resume} was trained so, and goes on only where one is: {error}") from None
    dtype, reasons["precision"] = choose_precision(config.amp, device, config.dim)
    if config.resume is not None:
        reasons |= {"device": "as when the run began", "precision": "as when the run began"}
    chosen["accelerator"] = "gpu" if device.type == "cuda" else device.type
    chosen["amp"] = {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    return dataclasses.replace(config, **chosen, devices=processes.world_size), device, dtype, reasons


def run_name(config: Config) -> str:
    """The article's name for a run."""
    return f"sn-data-{config.num_datas}-head{config.num_heads}-dim{config.dim}-lr{config.lr:g}"
