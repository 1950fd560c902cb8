"""The state is saved before anything is shown, and output that fails ends nothing.

A terminal may be closed, a reader like `head` may leave, the disk that output goes to may be full,
or the program is started without any output.
"""

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import tqdm
from conftest import PROJECT
from plants import act_at_output, act_at_step, chain, kill, lose_output, signal_at_step
from test_signals import wait_for_step
from trainings import NEW, RESUME, SMALL, fingerprint, steps_done

import evaluate as evaluate_script
import train as train_script
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.output import lenient_output

SIGTERM_AT_4 = functools.partial(signal_at_step, 4, signal.SIGTERM)
LOST = ["terminal gone", "reader gone", "disk full"]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "stop", "output", "number", "saved"),
    # output: what is shown for the number-th time when the kill comes; saved: epoch and step
    [
        # The loss is read at updates 4 and 6, and 10 and 12.
        pytest.param([], None, "the epoch is printed", 1, (1, 6), id="epoch: print"),
        pytest.param([], None, "W&B gets a row", 2, (1, 6), id="epoch: W&B", marks=slow),
        pytest.param([], SIGTERM_AT_4, "the bar moves", 4, (0, 4), id="SIGTERM: bar", marks=slow),
        pytest.param([], SIGTERM_AT_4, "the bar shows the loss", 1, (0, 4), id="SIGTERM: loss"),
        pytest.param([], SIGTERM_AT_4, "W&B gets a row", 1, (0, 4), id="SIGTERM: W&B", marks=slow),
        pytest.param(
            ["--save-every", "4"], None, "the bar shows the loss", 1, (0, 4), id="save: loss"
        ),
    ],
)
def test_the_state_is_saved_before_anything_is_shown(run, flags, stop, output, number, saved):
    plant = functools.partial(act_at_output, output, number, kill)
    code, _ = run(*SMALL, *NEW, *flags, plant=chain(plant, stop) if stop else plant)
    assert code == -signal.SIGKILL
    last = load_checkpoint(Path("run/last.pt"))
    assert (last["epoch"], last["step"]) == saved


# ------------------------------------------------------------------------------------ one program


@contextmanager
def output_lost(how: str) -> Iterator[None]:
    """Whatever is written to stdout and stderr fails. Not a fixture: pytest puts its own there."""
    if how == "disk full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        other_end, descriptor = os.openpty() if how == "terminal gone" else os.pipe()
        os.close(other_end)
    stream = os.fdopen(descriptor, "w")
    if how == "closed file":
        stream.close()
    with redirect_stdout(stream), redirect_stderr(stream):
        yield
        assert sys.stdout is sys.stderr is stream
    stream.close()  # nothing is left in its buffer that could fail now


however_it_gets_lost = pytest.mark.parametrize("how", [*LOST, "closed file"])


@however_it_gets_lost
def test_neither_print_nor_the_bar_fails(how):
    with output_lost(how), lenient_output():
        for _ in tqdm.tqdm(range(3), mininterval=0):
            print("x" * 100_000)
            print("x", flush=True)


@however_it_gets_lost
def test_help_and_bad_input_keep_their_exit_codes(how):
    for flags, code in ((["--help"], 0), (["--dim", "0"], 2), (["--no-such-flag"], 2)):
        with output_lost(how), pytest.raises(SystemExit) as end:
            train_script.main(flags)
        assert end.value.code == code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train_script.main([*SMALL, "--max-epochs", "1", "--run-dir", str(run)])
    return run


@however_it_gets_lost
def test_an_evaluation_is_written_though_nobody_reads_it(trained, how):
    (trained / "evaluation.json").unlink(missing_ok=True)
    with output_lost(how):
        evaluate_script.main(["--run", str(trained), "--no-pictures"])
    result = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert len(result["predictions"]) == 100


# ------------------------------------------------------------------------------- whole trainings


@pytest.mark.parametrize(
    "how", ["terminal gone", *(pytest.param(how, marks=slow) for how in LOST[1:])]
)
def test_a_run_whose_output_gets_lost_ends_undisturbed(run, undisturbed, how):
    plant = functools.partial(act_at_step, 4, functools.partial(lose_output, how))
    assert run(*SMALL, *NEW, plant=plant)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
@pytest.mark.parametrize("how", LOST)
def test_a_stop_is_saved_and_its_exit_code_true_without_output(run, undisturbed, how):
    plant = chain(
        functools.partial(act_at_step, 3, functools.partial(lose_output, how)), SIGTERM_AT_4
    )
    assert run(*SMALL, *NEW, plant=plant)[0] == 143
    assert load_checkpoint(Path("run/last.pt"))["step"] == 4
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_started_without_any_stream(run, undisturbed):
    """No file of the run may get the number of the output, and with it what is printed."""
    plant = chain(functools.partial(lose_output, "closed"), report_streams_at_step_4)
    assert run(*SMALL, *NEW, plant=plant)[0] == 0
    assert Path("streams.txt").read_text(encoding="utf-8").split() == ["/dev/null"] * 3
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def report_streams_at_step_4() -> None:
    def report() -> None:
        streams = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in range(3)]
        Path("streams.txt").write_text("\n".join(streams), encoding="utf-8")

    act_at_step(4, report)


# --------------------------------------------------------------------------- as a shell starts them


@slow
@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        "2>&-",
        "<&-",
        ">&- 2>&- <&-",
        "> /dev/full",
        "2> /dev/full",
        "> /dev/full 2>&1",
        "| head -n 1",
        "2>&1 | head -c 1",
    ],
)
def test_both_scripts_do_their_work_whatever_becomes_of_their_output(undisturbed, redirection):
    for script in (f"train.py {' '.join([*SMALL, *NEW])}", "evaluate.py --run run --no-pictures"):
        command = f"set -o pipefail; {sys.executable} {PROJECT}/{script} {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
    assert Path("run/evaluation.json").exists()


@slow
def test_help_for_a_reader_who_leaves():
    command = f"set -o pipefail; {sys.executable} {PROJECT}/train.py --help | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@slow
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("exec ", 129),
        # After disown and under nohup a SIGHUP is ignored, but the terminal is gone all the same.
        ("trap '' HUP; exec ", 0),
        ("exec nohup ", 0),
    ],
)
def test_a_terminal_that_is_closed(undisturbed, shell, code):
    """The real thing: the program runs in a terminal of its own, whose window goes away."""
    long = [*SMALL, "--max-epochs", "12"]
    pid, window = pty.fork()
    if pid == 0:
        command = " ".join([shell + sys.executable, str(PROJECT / "train.py"), *long, *NEW])
        os.execvp("sh", ["sh", "-c", command])
    wait_for_step(3)
    os.close(window)
    started = time.monotonic()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    if code:
        assert time.monotonic() - started < 10
        assert load_checkpoint(Path("run/last.pt"))["step"] == steps_done(Path("run")) >= 3
        command = [sys.executable, str(PROJECT / "train.py"), *RESUME]
        subprocess.run(command, capture_output=True, check=True)
    assert fingerprint(Path("run")) == undisturbed(*long)
