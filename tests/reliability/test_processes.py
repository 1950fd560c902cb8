"""Two processes train as one, stop as one, and fail with one message.

Two processes add up their sums in another order than one, so they agree with it to rounding, not
bit for bit: in float32 to about the fifth digit after a few updates, since Adam divides small
gradients by small numbers; in float64 to the eleventh. A run of two processes that is stopped and
resumed, however, repeats itself bit for bit.
"""

import functools
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from plants import bad_number_at_batch, in_float64, kill_in_save, raise_at_step, signal_at_step
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.run_folder import read_metrics

HALF = [*SMALL, "--batch-size", "16"]  # the updates of SMALL, shared by two
SIGTERM_AT_4 = functools.partial(signal_at_step, 4, signal.SIGTERM)
slow = pytest.mark.slow


def weights_and_losses(folder: Path) -> tuple[dict, list[float], float]:
    rows = read_metrics(folder)
    losses = [row["train/loss_step"] for row in rows if "lr" in row]
    return load_checkpoint(folder / "last.pt")["model"], losses, rows[-2]["val/loss_epoch"]


@pytest.mark.parametrize(
    ("flags", "plant", "tolerance"),
    [
        pytest.param("--accumulate 4", in_float64, 1e-10, id="float64, accumulation"),
        pytest.param("", None, 1e-4, id="float32", marks=slow),
        pytest.param("", in_float64, 1e-10, id="float64", marks=slow),
        pytest.param(
            "--holdout 0 --num-datas 2000", in_float64, 1e-10, id="batches left over", marks=slow
        ),
    ],
)
def test_two_processes_with_half_the_batch_make_the_updates_of_one(
    run, run_two, flags, plant, tolerance
):
    flags = ["--dropout", "0", *flags.split()]
    assert run(*SMALL, *flags, "--run-dir", "one", plant=plant)[0] == 0
    assert run_two(*HALF, *flags, "--run-dir", "two", plants=(plant, plant))[0] == [0, 0]
    one, one_losses, one_val = weights_and_losses(Path("one"))
    two, two_losses, two_val = weights_and_losses(Path("two"))
    assert two_losses == pytest.approx(one_losses, rel=tolerance)
    assert two_val == pytest.approx(one_val, rel=tolerance)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=slow), 1])
def test_a_signal_to_either_process_stops_both_at_the_same_update(run_two, undisturbed, rank):
    plants = [None, None]
    plants[rank] = SIGTERM_AT_4
    codes, outputs = run_two(*HALF, *NEW, plants=plants)
    assert codes == [143, 143]
    assert load_checkpoint(Path("run/last.pt"))["step"] == 4
    assert re.search(
        r"torchrun --standalone --nproc-per-node 2 \S*train.py --resume run", outputs[0]
    )
    assert outputs[1] == ""
    assert run_two(*RESUME)[0] == [0, 0]
    assert fingerprint(Path("run")) == undisturbed(*HALF, processes=2)


@slow
def test_a_bad_number_in_one_process_stops_both_with_one_message(run_two):
    plant = functools.partial(bad_number_at_batch, 4, math.nan)
    codes, outputs = run_two(*HALF, *NEW, "--save-every", "2", plants=(None, plant))
    assert codes == [1, 1]
    assert "bad numbers at step 4" in outputs[0]
    assert outputs[1] == ""
    assert load_checkpoint(Path("run/last.pt"))["step"] == 2


@slow
def test_bad_input_is_refused_by_both_with_one_message(run_two):
    Path("run").mkdir()
    Path("run/notes.txt").touch()
    codes, outputs = run_two(*HALF, *NEW)
    assert codes == [2, 2]
    assert "is not an empty folder" in outputs[0]
    assert outputs[1] == ""


@slow
@pytest.mark.parametrize(
    ("rank", "plant"),
    [
        (1, functools.partial(signal_at_step, 4, signal.SIGKILL)),
        (0, functools.partial(kill_in_save, "half written", 2)),
    ],
)
def test_when_one_process_is_killed_the_other_says_so_in_a_line(run_two, undisturbed, rank, plant):
    plants = [None, None]
    plants[rank] = plant
    codes, outputs = run_two(*HALF, *NEW, "--save-every", "3", plants=plants)
    assert codes[rank] == -signal.SIGKILL, outputs[rank]
    assert codes[1 - rank] == 1
    assert f"error in process {1 - rank}: another process has ended" in outputs[1 - rank]
    assert "Traceback" not in outputs[1 - rank]
    assert run_two(*RESUME)[0] == [0, 0]
    assert fingerprint(Path("run")) == undisturbed(*HALF, processes=2)


@slow
def test_too_little_memory_in_one_process_names_it(run_two):
    plant = functools.partial(raise_at_step, 2, torch.OutOfMemoryError("CUDA out of memory"))
    codes, outputs = run_two(*HALF, *NEW, plants=(None, plant))
    assert codes == [1, 1]
    assert "error in process 1: out of memory" in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]


@slow
def test_only_the_main_process_needs_the_folder(run_two, undisturbed):
    """As on two hosts without a common disk: the second process never sees the folder."""
    folders = [Path.cwd() / "host0", Path.cwd() / "host1"]
    for folder in folders:
        folder.mkdir()
    codes, _ = run_two(*HALF, *NEW, plants=(SIGTERM_AT_4, None), folders=folders)
    assert codes == [143, 143]
    assert run_two(*RESUME, folders=folders)[0] == [0, 0]
    assert fingerprint(folders[0] / "run") == undisturbed(*HALF, processes=2)
    assert not list(folders[1].glob("run/*"))
    codes, outputs = run_two(*RESUME, folders=folders)
    assert codes == [0, 0]
    assert "has finished its 2 epochs already" in outputs[0]


@slow
def test_the_number_of_processes_cannot_change_in_a_resumed_run(run, run_two):
    assert run_two(*HALF, *NEW, plants=(SIGTERM_AT_4, None))[0] == [143, 143]
    code, output = run(*RESUME)
    assert code == 2
    assert "--devices 2, but one process was started" in output
    assert "torchrun --standalone --nproc-per-node 2" in output

    assert run(*SMALL, "--run-dir", "alone", plant=SIGTERM_AT_4)[0] == 143
    codes, outputs = run_two("--resume", "alone")
    assert codes == [2, 2]
    assert "--devices 1, but torchrun started 2" in outputs[0]


@slow
def test_evaluation_of_long_sequences_leaves_the_distributed_model_alone(run_two):
    """Decoding goes on to --seq-len, and training after it, also in a resumed run."""
    long = [*HALF, "--seq-len", "600"]
    assert run_two(*long, *NEW)[0] == [0, 0]
    assert run_two(*RESUME, "--max-epochs", "3")[0] == [0, 0]
    assert read_metrics(Path("run"))[-1]["step"] == 18
