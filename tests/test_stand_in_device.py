"""Training and evaluation on a stand-in for a GPU: the same numbers as on the CPU, and no waiting.

The host tells a GPU what to do and goes on. Where it needs a number back it waits, and then the GPU
waits for it. Which lines do that is counted by stand_in_device.py; here is how often they may.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT
from metrics import read_metrics
from stand_in_device import count_wait
from stand_in_device import waits as stand_in_waits

import evaluate

slow = pytest.mark.slow
UPDATES, LOG_EVERY, POSITIONS = 4, 2, 9  # the last is the length of the longest answer
FLAGS = (
    "--dim 16 --num-layers 1 --num-categories 4 --holdout 0.125 --max-epochs 1 --batch-size 16 "
    f"--num-datas {16 * UPDATES} --log-every {LOG_EVERY} --wandb disabled"
)
# In half precision a GPU rounds what dropout has left in another way than a CPU.
DROPOUT = {"off": 0.1, "bf16": 0, "fp16": 0}

# What may wait because it happens once a run, once an epoch or at each save.
NOW_AND_THEN = (
    "train.py: model.to(device)",
    "train.py: judged.load_state_dict(weights)",
    "checkpoint.py: return content.detach().cpu()",
    "progress.py: return {**vars(self), ",
    "run_folder.py: name: None if part is None else part.state_dict()",
    "processes.py: total = self.sum(",  # the means of validation and test
    "processes.py: return (self.sum(weighted_sum.clone()) / total).item()",
    "evaluation.py: source = source.padded(",
    "evaluation.py: for pair, row in zip(chunk, decoded.tolist(), strict=True):",
    "decoding.py: unfinished = ",  # once a position, as is tested below
)


def on_stand_in(commands: list[str], folder: Path, project: Path = PROJECT):
    return subprocess.run(
        [sys.executable, str(project / "tests/stand_in_device.py"), *commands],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),
    )


def training(amp: str) -> str:
    return f"train.py {FLAGS} --amp {amp} --dropout {DROPOUT[amp]} --run-dir run"


@pytest.fixture(
    scope="module",
    params=[pytest.param("off", marks=slow), pytest.param("bf16", marks=slow), "fp16"],
)
def counted(request, tmp_path_factory) -> SimpleNamespace:
    """What was counted in a training and in two evaluations; the precision and the run's folder."""
    folder = tmp_path_factory.mktemp("stand_in")
    commands = [
        training(request.param),
        "evaluate.py --run run --no-pictures",
        "evaluate.py --run run --beam 3 --source '0 3' '3 3'",
    ]
    done = on_stand_in(commands, folder)
    assert done.returncode == 0, done.stderr
    trained, greedy, beam = json.loads(done.stdout.splitlines()[-1])
    return SimpleNamespace(
        trained=trained, greedy=greedy, beam=beam, amp=request.param, run=folder / "run"
    )


def waits_of_updates(counted: dict) -> dict[str, int]:
    waits = counted["waits"].items()
    return {line: number for line, number in waits if not line.startswith(NOW_AND_THEN)}


def in_file(name: str, counted: dict) -> int:
    return sum(number for line, number in counted["waits"].items() if line.startswith(name))


def test_training_computes_the_same_numbers(counted, train):
    train(*training(counted.amp).split()[1:], "--accelerator", "cpu")
    rows = read_metrics(counted.run)
    assert rows == read_metrics(Path("run"))
    assert len(rows) == UPDATES + 2 and "test/exact_match" in rows[-1]


def test_no_update_waits_for_the_device(counted):
    """Only reading the losses does, every --log-every updates; in fp16 the scaler, once in each."""
    waits = waits_of_updates(counted.trained)
    reading, *scale = sorted(waits.items(), key=lambda item: item[1])
    assert reading[0].startswith("run_folder.py: numbers = ")
    assert reading[1] == UPDATES / LOG_EVERY
    assert [number for _, number in scale] == ([UPDATES] if counted.amp == "fp16" else [])
    assert all("scaler.get_scale()" in line for line, _ in scale)


def test_all_weights_are_updated_in_one_operation(counted):
    operations = counted.trained["operations"]
    assert operations["_fused_adamw_"] == operations["_foreach_lerp_"] == UPDATES
    assert "addcdiv_" not in operations and "_foreach_addcdiv_" not in operations


def test_greedy_decoding_waits_once_a_position(counted):
    result = json.loads((counted.run / "evaluation.json").read_text(encoding="utf-8"))
    longest = max(len(answer["prediction"]) for answer in result["predictions"])
    with_end = min(longest + 1, POSITIONS)
    assert in_file("decoding.py", counted.greedy) == with_end
    assert in_file("evaluation.py", counted.greedy) == 2, "questions there, answers back"


def test_a_beam_search_waits_once_a_position(counted):
    assert 2 <= in_file("decoding.py", counted.beam) <= POSITIONS
    assert in_file("evaluation.py", counted.beam) == 2


def test_evaluation_finds_the_same(counted):
    shutil.copytree(counted.run, "run")
    evaluate.main(["--run", "run", "--accelerator", "cpu", "--no-pictures"])
    here, there = (
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in (Path("run"), counted.run)
    )
    assert here == there and here["num_unseen"] > 0


def test_a_library_that_lies_in_the_project_is_not_named(monkeypatch):
    """A .venv does. What waits is the line of ours that called it."""
    monkeypatch.setattr(sys, "prefix", str(PROJECT / ".venv"))
    library = {"count_wait": count_wait}
    exec(compile("def step():\n    count_wait()", PROJECT / ".venv/torch.py", "exec"), library)
    library["step"]()
    assert stand_in_waits.popitem() == ('test_stand_in_device.py: library["step"]()', 1)


# ------------------------------------------------------------------------------ planted mistakes

# File, line, what is written instead, and the line that the stand-in names.
WAITING = {
    "a number is read": (
        "train.py",
        '"grad_norm": grad_norm}',
        '"grad_norm": grad_norm.item()}',
        "grad_norm.item()",
    ),
    "a tensor decides": (
        "train.py",
        "            progress.batch += 1\n",
        "            progress.batch += 1\n            assert update_loss < 1e9\n",
        "assert update_loss < 1e9",
    ),
    "a loss is printed": (
        "train.py",
        "            bar.update()\n",
        '            bar.set_description(f"{progress.epoch_loss:.3f}")\n            bar.update()\n',
        "bar.set_description(",
    ),
    "a tensor is brought to the host": (
        "train.py",
        "update_loss += loss.detach() * share",
        "update_loss += loss.detach().cpu() * share",
        "loss.detach().cpu()",
    ),
    "the loss is read in every update": (
        "train.py",
        "if stop_signal or save_due or log_due:",
        "if True:",
        "numbers = torch.stack",
    ),
    "the device is asked for padding": (
        "transformer_scratch/model.py",
        "memory = self.encode(source, source_is_padded)",
        "memory = self.encode(source, bool((source == self.pad_id).any()))",
        "memory = self.encode(source, bool(",
    ),
    "a mask picks out elements": (
        "train.py",
        "logits.flatten(0, 1),\n        batch.target.flatten(),",
        "logits[batch.target != pad_id],\n        batch.target[batch.target != pad_id],",
        "logits[batch.target != pad_id]",
    ),
    "clipping checks the norm": (
        "train.py",
        "clip_grad_norm_(model.parameters(), max_norm)",
        "clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True)",
        "error_if_nonfinite=True",
    ),
    "a batch has gaps in memory": (
        "transformer_scratch/batches.py",
        "decoder_input=target[:, :-1].contiguous()",
        "decoder_input=target[:, :-1]",
        "decoder_input.to(device, non_blocking=True)",
    ),
    "a copy blocks": (
        "transformer_scratch/batches.py",
        "source.to(device, non_blocking=True)",
        "source.to(device)",
        "source.to(device)",
    ),
    "the scale is read twice": (
        "train.py",
        "            skipped = scale < scale_before\n",
        "            skipped = scaler.get_scale() < scale_before\n",
        "skipped = scaler.get_scale() < scale_before",
    ),
}


def copy_of_project(folder: Path, file: str, old: str, new: str) -> Path:
    for name in ("train.py", "evaluate.py", "tests/stand_in_device.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "transformer_scratch", folder / "transformer_scratch")
    text = (folder / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has changed: {old!r} stands there {text.count(old)} times"
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def train_a_copy(folder: Path, amp: str, *mistake: str) -> subprocess.CompletedProcess:
    return on_stand_in([training(amp)], folder, copy_of_project(folder / "project", *mistake))


@slow
@pytest.mark.parametrize("mistake", WAITING)
def test_a_line_that_waits_is_named(mistake, tmp_path):
    *change, named = WAITING[mistake]
    # In fp16 a norm may be infinite.
    amp = "off" if mistake == "clipping checks the norm" else "fp16"
    done = train_a_copy(tmp_path, amp, *change)
    assert done.returncode == 0, done.stderr
    (counted,) = json.loads(done.stdout.splitlines()[-1])
    waits = waits_of_updates(counted)
    assert sum(number for line, number in waits.items() if named in line) >= UPDATES, waits


@slow
def test_decoding_that_asks_twice_is_named(tmp_path):
    line = "        if len(unfinished) == 0:\n"
    change = ("transformer_scratch/decoding.py", line, f"        token.max().item()\n{line}")
    # Greedy decoding is meant; a beam search has the same line further down.
    done = train_a_copy(tmp_path, "off", *change)
    assert done.returncode == 0, done.stderr
    (counted,) = json.loads(done.stdout.splitlines()[-1])
    asked = in_file("decoding.py: token.max().item()", counted)
    assert asked == in_file("decoding.py: unfinished", counted) > 0


@slow
@pytest.mark.parametrize(
    "change",
    [
        ("train.py", "batch = batch.to(device)", "pass"),
        ("train.py", "    model.to(device)", "    pass"),
        ("transformer_scratch/model.py", "+ positions[", "+ positions.cpu()["),
    ],
)
def test_tensors_of_two_devices_are_refused(change, tmp_path):
    done = train_a_copy(tmp_path, "off", *change)
    assert done.returncode == 1
    assert "in embed\n" in done.stderr and "expected all tensors on one device" in done.stderr
