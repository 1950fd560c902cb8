"""The settings of a run: one flat dataclass that tyro turns into the command line."""

import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from transformer_scratch.checkpoint import load_resumable
from transformer_scratch.commands import python_command
from transformer_scratch.errors import BadInput
from transformer_scratch.hardware import choose_device, choose_precision
from transformer_scratch.processes import ALONE, Processes
from transformer_scratch.task import Task
from transformer_scratch.task_of_run import make_task


@dataclass
class Config:
    """Train a Transformer, written from scratch, to count from one digit to another, or on a file
    of your own pairs.

    Flags may be written with dashes or underscores. None stands for what the flag's
    text says; what is chosen by task, size or hardware is printed at the start with its reason.
    """

    # ---- the model, in the paper's terms

    dim: int = 32
    """Width of the model."""
    num_heads: int = 1
    """Attention heads; must divide --dim."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward networks. None: 4 x --dim, the paper's ratio."""
    dropout: float = 0.1
    """Probability of dropping an element of embeddings and sub-layer outputs. 0 = off."""
    tie_embeddings: bool = True
    """Share one matrix between both embeddings and the output projection (section 3.4)."""

    # ---- the task and its samples

    num_categories: int | None = None
    """Digits of the task. None: 10, which make 100 pairs; 30 make 900."""
    num_datas: int | None = None
    """Samples of digits in an epoch, drawn with repetition. None: 38,400."""
    pairs: str | None = None
    """File of your own pairs instead of digits: UTF-8, one pair a line, source, tab, target."""
    val_pairs: str | None = None
    """File of pairs to validate on; needs --test-pairs. --pairs is then trained on whole."""
    test_pairs: str | None = None
    """File of pairs to test on."""
    holdout: float | None = None
    """Share of the distinct pairs (of a file: sources) kept out of training, half for validation,
    half for the test. 0 = none. None: 0.2 of the digits' pairs, 0.1 of a file's sources."""
    seq_len: int | None = None
    """Tokens of the longest sequence. None: --num-categories + 6, or what a file needs."""
    num_workers: int = 0
    """Processes that prepare batches. 0 = none, which is fastest for data this small."""

    # ---- the loop

    max_epochs: int | None = None
    """Epochs to train; there is no early stopping. None: 3; with a file, about 3,000 updates."""
    batch_size: int | None = None
    """Samples per process in one forward and backward pass. None: 128."""
    accumulate: int = 1
    """Batches whose gradients make up one update."""
    lr: float | None = None
    """Learning rate of AdamW after the warm-up. None: 3e-3 x (32 / --dim)^(6/5)."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises linearly to --lr. 0 = off."""
    schedule: Literal["constant", "inverse-sqrt"] = "constant"
    """After the warm-up: constant, or --lr x sqrt(--warmup-steps / update) as in section 5.3."""
    label_smoothing: float = 0.1
    """Share of the target's probability that is spread over all tokens in training (section 5.4).
    0 = off."""
    average: float = 0.99
    """Decay of the moving average of the weights, which is what is validated, tested and kept as
    best (after section 6.1). 0 = off."""
    weight_decay: float = 0.5
    """Weight decay of AdamW. 0 = off."""
    clip_norm: float = 1.0
    """Scale gradients down to this L2 norm. 0 = off."""
    seed: int = 42
    """Decides the split, the first weights, the order of the data and dropout."""

    # ---- where and in what precision to compute

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    devices: int = 1
    """Number of processes, one for each device. Start more than one with torchrun."""
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """Mixed precision. fp16 needs its loss scaled, bf16 does not. auto: what is fast here."""
    compile: bool = False
    """Compile the model with torch.compile: a slow first step, then faster ones, perhaps."""

    # ---- what is written and shown

    resume: str | None = None
    """Folder of a run to resume with its own settings. A larger --max-epochs trains it longer."""
    run_dir: str | None = None
    """Folder of this run. None: runs/ and a name made of the settings."""
    save_every: int = 0
    """Updates between two saves of last.pt within an epoch. 0 = only at its end."""
    save_top_k: int = 10
    """How many epoch=K.pt to keep, by lowest validation loss."""
    log_every: int = 10
    """Updates between two readings of the loss, for the progress bar and W&B."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: online if you are logged in, otherwise offline; it never asks."""
    wandb_project: str | None = None
    """Project in W&B. None: the variable WANDB_PROJECT, or transformer-scratch."""
    debug: bool = False
    """Tag the W&B run "debug" instead of "run"."""


PAIR_FILES = ("pairs", "val_pairs", "test_pairs")

# What may change in a resumed run, because it cannot change what the run has computed so far.
CHANGEABLE_ON_RESUME = {
    "resume",
    "max_epochs",
    "log_every",
    "save_every",
    "num_workers",
    "debug",
    "wandb",
    "wandb_project",
    "pairs",  # another place of the same file
}

# The largest value of a flag, where it is not 10**9: far above what is of use, and below what
# overflows or goes on for hours before it has filled the memory.
LARGEST = {
    "dim": 10**6,
    "ffn_dim": 10**6,
    "num_layers": 1_000,
    "num_categories": 1_000,
    "seq_len": 10**5,
    "accumulate": 10**6,
    "num_workers": 1_000,
    "seed": 2**32 - 1,
}


def load_config(
    arguments: list[str] | None = None, processes: Processes = ALONE
) -> tuple[Config, Task, dict[str, str], dict | None]:
    """Read the command line and the task, check them, and choose what was left open.

    -> the settings; the task; the reason for each choice, by setting; the checkpoint to resume,
    None for a new run. A resumed run keeps its settings, and what is given beside --resume must not
    change what it has computed so far. Raises BadInput.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(arguments, Config())
    folder = processes.run_before_restart() if config.resume is None else config.resume
    if folder is None:
        check(config, processes, arguments)
        return *choose_open_settings(config, processes), None

    checkpoint = processes.run_on_main(lambda: load_run(Path(folder)))
    saved = config_of_checkpoint(checkpoint, folder)
    config = keep_saved_settings(saved, parse(arguments, saved))
    config = dataclasses.replace(config, resume=str(folder))
    check(config, processes, arguments)
    if config.max_epochs < checkpoint["epoch"]:
        raise BadInput(
            f"--max-epochs {config.max_epochs}, but the run has done {checkpoint['epoch']} already"
        )
    try:
        config, task, reasons = choose_open_settings(config, processes, checkpoint)
    except BadInput as error:
        raise BadInput(f"{folder} was trained so, and needs the same to resume: {error}") from None
    as_before = "as when the run began"
    return config, task, {**reasons, "device": as_before, "precision": as_before}, checkpoint


def parse(arguments: list[str], default: Config) -> Config:
    """The flags as given. For --help and for wrong flags tyro exits by itself. Raises BadInput."""
    config = tyro.cli(Config, args=arguments, default=default)
    for name in ("resume", "run_dir", *PAIR_FILES):
        path = getattr(config, name)
        if path != getattr(default, name):
            path = from_home(path, flag(name))
            if name in PAIR_FILES:  # a run may be resumed from another folder
                path = os.path.abspath(path)
            config = dataclasses.replace(config, **{name: path})
    return config


def from_home(path: str, flag: str) -> str:
    """The path, with the home folder for ~, also where the shell leaves it: --run-dir=~/runs/a.

    Raises BadInput.
    """
    if not path:
        raise BadInput(f"{flag} is empty: give a path, or leave it out")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise BadInput(f"{flag} {path}: there is no such home folder; ./{path} is a plain folder")
    return expanded


def load_run(folder: Path) -> dict:
    """The state of the run to resume. Raises BadInput."""
    try:
        return load_resumable(folder)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise BadInput(f"--resume {folder} cannot be read: {error.strerror}") from None


def config_of_checkpoint(checkpoint: dict, origin: object) -> Config:
    """The settings in a checkpoint. Raises BadInput when this version does not know one of them."""
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := checkpoint["config"].keys() - known:
        names = ", ".join(sorted(unknown))
        raise BadInput(f"{origin} was trained with settings unknown to this version: {names}")
    return Config(**checkpoint["config"])


def keep_saved_settings(saved: Config, given: Config) -> Config:
    """The settings of a resumed run. Raises BadInput where they would change its past."""
    changed = []
    for field in dataclasses.fields(Config):
        old, new = getattr(saved, field.name), getattr(given, field.name)
        chosen_at_start = new == "auto" and field.name in ("accelerator", "amp")
        if new is None or chosen_at_start:
            given = dataclasses.replace(given, **{field.name: old})
            continue
        # --pairs may name another place of the same file, but not a file instead of digits.
        changeable = field.name in CHANGEABLE_ON_RESUME and (field.name, old) != ("pairs", None)
        if old != new and not changeable:
            changed.append(f"{flag(field.name)} (it was {old}, now {new})")
    if changed:
        not_named = {"resume"} if saved.pairs else {"resume", "pairs"}
        allowed = ", ".join(flag(name) for name in sorted(CHANGEABLE_ON_RESUME - not_named))
        raise BadInput(
            f"{', '.join(changed)} cannot change in a resumed run. Leave it out, or start a new "
            f"run. These may change: {allowed}"
        )
    return given


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(config: Config, processes: Processes, arguments: list[str]) -> None:
    """Raise BadInput for any value that cannot work, before anything is created.

    arguments: what was typed, so that it can be repeated.
    """
    for name in (
        "devices", "max_epochs", "num_datas", "batch_size", "num_heads", "dim", "num_layers",
        "ffn_dim", "num_categories", "seq_len", "accumulate", "log_every", "save_top_k",
    ):  # fmt: skip
        require(name, config, lambda value: value >= 1, "must be 1 or more")
    for name in ("warmup_steps", "num_workers", "save_every"):
        require(name, config, lambda value: value >= 0, "must be 0 (off) or more")
    for name in ("weight_decay", "clip_norm"):
        require(
            name, config, lambda value: 0 <= value < math.inf, "must be 0 (off) or more, and finite"
        )
    for name in ("dropout", "holdout", "label_smoothing", "average"):
        require(name, config, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    require("lr", config, lambda value: 0 < value < math.inf, "must be above 0, and finite")
    require("seed", config, lambda value: 0 <= value < 2**32, "must be from 0 to 4294967295")
    for name, value in vars(config).items():
        most = LARGEST.get(name, 10**9)
        if isinstance(value, int) and value > most:
            raise BadInput(f"{flag(name)} {value} must be {most} or less")
    if config.dim % config.num_heads:
        divisors = ", ".join(str(n) for n in range(1, config.dim + 1) if config.dim % n == 0)
        raise BadInput(
            f"--dim {config.dim} is not divisible by --num-heads {config.num_heads}; "
            f"these fit: {divisors}"
        )
    if config.devices != processes.world_size and (config.devices > 1 or config.resume):
        started = "one process was started"
        if processes.world_size > 1:
            started = f"torchrun started {processes.world_size}"
        command = f"{python_command('train.py', config.devices)} {shlex.join(arguments)}"
        raise BadInput(
            f"--devices {config.devices}, but {started}. Start several processes with torchrun, a "
            f"single one without; here: {command}"
        )
    origin, project = "--wandb-project", config.wandb_project
    if project is None:
        origin, project = "WANDB_PROJECT", default_project()
    if not project or set(project) & set("/\\#?%:"):
        raise BadInput(f"{origin} {project!r} must be a name without / \\ # ? % :")
    check_pair_files(config)


def check_pair_files(config: Config) -> None:
    """Raise BadInput where flags of the one task are given with the other."""
    if (config.val_pairs is None) != (config.test_pairs is None):
        raise BadInput("--val-pairs and --test-pairs belong together: give both, or neither")
    if config.pairs is None:
        if config.val_pairs:
            raise BadInput("--val-pairs and --test-pairs need --pairs, the file to train on")
        return
    for name in ("num_datas", "num_categories"):
        if getattr(config, name) is not None:
            raise BadInput(f"{flag(name)} is for digits; leave it out with --pairs")
    if config.val_pairs and config.holdout is not None:
        raise BadInput("--holdout: with --val-pairs all of --pairs is trained on; leave it out")


def check_batch_size(config: Config, task: Task, world_size: int) -> None:
    """Raise BadInput where an epoch has not even one batch."""
    global_batch = config.batch_size * world_size
    if not task.keeps_last_batch and global_batch > task.num_samples:
        raise BadInput(
            f"a batch of {global_batch} is larger than --num-datas {task.num_samples}: "
            "give a smaller --batch-size or more --num-datas"
        )
    if task.keeps_last_batch and config.batch_size > task.num_samples:
        raise BadInput(
            f"--batch-size {config.batch_size} is larger than the {task.num_samples} training lines"
        )
    if task.num_samples < world_size:
        raise BadInput(f"{task.num_samples} training lines are too few for {world_size} processes")


def require(name: str, config: Config, rule: Callable[[float], bool], words: str) -> None:
    """Raise BadInput unless the value obeys the rule, or is None, to be chosen. NaN obeys none."""
    value = getattr(config, name)
    if value is not None and not rule(value):
        raise BadInput(f"{flag(name)} {value} {words}")


def choose_open_settings(
    config: Config, processes: Processes, checkpoint: dict | None = None
) -> tuple[Config, Task, dict[str, str]]:
    """Read the task, and fill in what was left to it, to size and to hardware.

    -> the settings, the task, a reason for each choice. Raises BadInput when the task cannot be
    read, when a batch is larger than an epoch, or when the accelerator is not there.
    """
    task = make_task(config, checkpoint)
    lr = float(f"{3e-3 * (32 / config.dim) ** (6 / 5):.3g}")
    defaults = {
        "lr": (lr, "3e-3 x (32 / dim)^(6/5)"),
        "ffn_dim": (4 * config.dim, "4 x dim, the paper's ratio"),
        "wandb_project": (default_project(), ""),
        **task.defaults(config, processes.world_size),
    }
    chosen: dict[str, object] = {}
    reasons = {}
    for name, (value, reason) in defaults.items():
        if getattr(config, name) is None:
            chosen[name], reasons[name] = value, reason
    device, reasons["device"] = choose_device(config.accelerator, processes.local_rank)
    chosen["accelerator"] = "gpu" if device.type == "cuda" else device.type
    chosen["amp"], reasons["precision"] = choose_precision(config.amp, device, config.dim)
    chosen["devices"] = processes.world_size
    config = dataclasses.replace(config, **chosen)
    check_batch_size(config, task, processes.world_size)
    return config, task, reasons


def default_project() -> str:
    return os.environ.get("WANDB_PROJECT") or "transformer-scratch"


def run_name(config: Config) -> str:
    """The article's name for a run; with a file, the file's name in place of the data's."""
    data = Path(config.pairs).stem if config.pairs else f"sn-data-{config.num_datas}"
    return f"{data}-head{config.num_heads}-dim{config.dim}-lr{config.lr:g}"
