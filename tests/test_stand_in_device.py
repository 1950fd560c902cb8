"""Training and evaluation on a stand-in for a GPU: the same numbers as on the CPU, and no waiting.

The host tells a GPU what to do and goes on. Where it needs a number back it waits, and then the GPU
waits for it. Which lines do that is counted by stand_in_device.py; here is how often they may.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT
from metrics import read_metrics

import evaluate

# Dropout in half precision rounds in another way on a GPU: it draws whole numbers there.
FLAGS = "--dim 16 --num-layers 1 --batch-size 32 --max-epochs 1 --log-every 5 --wandb disabled"
PRECISIONS = {"off": "--dropout 0.1", "bf16": "--dropout 0", "fp16": "--dropout 0"}
LONGEST_ANSWER = 15


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


def training(amp: str, updates: int) -> str:
    """The command of a training of so many updates, one reading of the loss for every five."""
    run = f"--num-datas {32 * updates} --run-dir {amp}-{updates}"
    return f"train.py {FLAGS} --amp {amp} {PRECISIONS[amp]} {run}"


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict:
    """What was counted by name of the command, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("stand_in")
    commands = {(amp, updates): training(amp, updates) for amp in PRECISIONS for updates in (5, 10)}
    commands["greedy"] = "evaluate.py --run off-10 --no-pictures"
    commands["beam"] = "evaluate.py --run off-10 --beam 3 --source '8 4' '3 3'"
    done = on_stand_in([*commands.values()], folder)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {"folder": folder, **dict(zip(commands, results, strict=True))}


def more(counted: dict, amp: str, what: str) -> dict:
    """What five more updates have added. Decoding, which depends on the answers, is left out."""
    short, long = (counted[amp, updates][what] for updates in (5, 10))
    added = {name: long.get(name, 0) - short.get(name, 0) for name in {*short, *long}}
    return {name: n for name, n in added.items() if n and not name.startswith("decoding.py")}


def by_file(waits: dict) -> Counter:
    files = Counter()
    for line, number in waits.items():
        files[line.partition(":")[0]] += number
    return files


@pytest.mark.parametrize("amp", PRECISIONS)
def test_training_computes_the_same_numbers(amp, counted, train):
    train(*training(amp, 10).split()[1:], "--accelerator", "cpu")
    rows = read_metrics(counted["folder"] / f"{amp}-10")
    assert rows == read_metrics(Path(f"{amp}-10"))
    assert len(rows) == 12 and "test/exact_match" in rows[-1]


@pytest.mark.parametrize("amp", PRECISIONS)
def test_no_update_waits_for_the_device(amp, counted):
    """Reading the losses does, once every five updates; the loss scaler once in every update."""
    waits = more(counted, amp, "waits")
    scale = {line: number for line, number in waits.items() if "scaler.get_scale()" in line}
    assert list(scale.values()) == ([5] if amp == "fp16" else [])
    assert by_file(waits) == {"run_folder.py": 1} | ({"train.py": 5} if scale else {})


@pytest.mark.parametrize("amp", PRECISIONS)
def test_all_weights_are_updated_in_one_operation(amp, counted):
    operations = more(counted, amp, "operations")
    assert operations["_fused_adamw_"] == operations["_foreach_lerp_"] == 5
    assert "addcdiv_" not in operations and "_foreach_addcdiv_" not in operations


def test_greedy_decoding_waits_once_a_position(counted):
    result = json.loads((counted["folder"] / "off-10/evaluation.json").read_text(encoding="utf-8"))
    longest = max(len(answer["prediction"]) for answer in result["predictions"])
    positions = min(longest + 1, LONGEST_ANSWER)  # with the end token
    waits = by_file(counted["greedy"]["waits"])
    assert waits["decoding.py"] == positions
    assert waits["evaluation.py"] == 2, "the questions on their way there, the answers back"


def test_a_beam_search_waits_once_a_position(counted):
    waits = by_file(counted["beam"]["waits"])
    assert 2 <= waits["decoding.py"] <= LONGEST_ANSWER
    assert waits["evaluation.py"] == 2


def test_evaluation_finds_the_same(counted, tmp_path):
    run = counted["folder"] / "off-10"
    shutil.copytree(run, tmp_path / "run")
    evaluate.main(["--run", "run", "--accelerator", "cpu", "--no-pictures"])
    here, there = (
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "run", run)
    )
    assert here == there and here["num_seen"] == 80


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


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WAITING)
def test_a_line_that_waits_is_named(mistake, tmp_path):
    file, old, new, named = WAITING[mistake]
    project = copy_of_project(tmp_path / "project", file, old, new)
    amp = "off" if mistake == "clipping checks the norm" else "fp16"  # which lets infinity pass
    done = on_stand_in([training(amp, updates) for updates in (5, 10)], tmp_path, project)
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout.splitlines()[-1])
    waits = more({(amp, 5): short, (amp, 10): long}, amp, "waits")
    wrong = {line: number for line, number in waits.items() if named in line}
    assert sum(wrong.values()) >= 5, f"not named: {waits}"


@pytest.mark.slow
def test_decoding_that_asks_twice_is_named(tmp_path):
    line = "        if len(unfinished) == 0:\n"
    mistake = ("transformer_scratch/decoding.py", line, f"        token.max().item()\n{line}")
    project = copy_of_project(tmp_path / "project", *mistake)
    done = on_stand_in([training("off", 5)], tmp_path, project)
    assert done.returncode == 0, done.stderr
    (counted,) = json.loads(done.stdout.splitlines()[-1])
    once, twice = (
        sum(number for line, number in counted["waits"].items() if text in line)
        for text in ("nonzero()", "decoding.py: token.max().item()")
    )
    assert once == twice > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new, named",
    [
        ("train.py", "batch = batch.to(device)", "pass", "embedding"),
        ("train.py", "    model.to(device)", "    pass", "embedding"),
        (
            "transformer_scratch/model.py",
            "positions = self.positions\n",
            "positions = self.positions.cpu()\n",
            "add",
        ),
    ],
)
def test_tensors_of_two_devices_are_refused(file, old, new, named, tmp_path):
    project = copy_of_project(tmp_path / "project", file, old, new)
    done = on_stand_in([training("off", 5)], tmp_path, project)
    assert done.returncode == 1
    assert f"aten.{named}" in done.stderr and "expected all tensors on one device" in done.stderr
