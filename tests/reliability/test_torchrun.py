"""The real torchrun: it restarts what was killed, stops all processes, and spans two hosts."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT
from test_processes import HALF
from test_signals import wait_for, wait_for_step
from trainings import NEW, RESUME, SMALL, fingerprint, steps_done

from transformer_scratch.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--standalone", "--nproc-per-node", "2"]
TRAIN = str(PROJECT / "train.py")
SAVING = ["--log-every", "1", "--save-every", "2"]


@contextlib.contextmanager
def launched(
    *flags: str, before: tuple = (), folder: str = ".", **environment: str
) -> Iterator[subprocess.Popen]:
    """A torchrun of train.py in a session of its own; its output goes to output.txt."""
    with open(Path(folder, "output.txt"), "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*before, *TORCHRUN, *flags],
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which takes its processes along
            process.wait()


def children(parent: int) -> list[int]:
    command = ["pgrep", "-P", str(parent)]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return [int(pid) for pid in found.stdout.split()]


def output(folder: str = ".") -> str:
    return Path(folder, "output.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (1, 0, 1)], ids=str)
def test_killed_processes_come_back_by_themselves(undisturbed, ranks):
    restarts = ["--max-restarts", str(len(ranks))]
    with launched(*TWO, *restarts, TRAIN, *HALF, *NEW, *SAVING) as process:
        for number, rank in enumerate(ranks):
            wait_for_step(3 + 3 * number)
            os.kill(sorted(children(process.pid))[rank], signal.SIGKILL)
        assert process.wait(180) == 0, output()
    assert fingerprint(Path("run")) == undisturbed(*HALF, processes=2)
    assert output().count("(resumed)") == len(ranks)


@pytest.mark.slow
def test_one_process_under_torchrun_comes_back_too_and_without_a_run_dir(undisturbed):
    one = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "1"]
    with launched(*one, TRAIN, *SMALL, *SAVING) as process:
        wait_for(lambda: list(Path("runs").glob("*/metrics.jsonl")))
        [run] = Path("runs").glob("*")
        wait_for_step(5, run)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(180) == 0, output()
    assert [folder.name for folder in Path("runs").glob("*")] == [run.name]
    assert fingerprint(run) == undisturbed(*SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_and_saves(undisturbed, number):
    with launched(*TWO, TRAIN, *HALF, *NEW, *SAVING, "--num-workers", "1") as process:
        wait_for_step(3)
        process.send_signal(number)
        process.wait(60)
    assert load_checkpoint(Path("run/last.pt"))["step"] == steps_done(Path("run"))
    assert "nothing is lost" in output()
    with launched(*TWO, TRAIN, *RESUME) as process:
        assert process.wait(120) == 0, output()
    assert fingerprint(Path("run")) == undisturbed(*HALF, processes=2)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: for the network, two hosts. -> their names."""
    names = [f"ts{uuid.uuid4().hex[:6]}{host}" for host in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    ends = [f"cable netns {name}" for name in names]
    commands += [f"ip link add {ends[0]} type veth peer name {ends[1]}"]
    for number, name in enumerate(names, start=1):
        commands += [
            f"ip -n {name} addr add 10.77.0.{number}/24 dev cable",
            f"ip -n {name} link set cable up",
            f"ip -n {name} link set lo up",
        ]
    for command in commands:
        subprocess.run(command.split(), check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.root
@pytest.mark.parametrize("killed", [None, 0, 1])
def test_two_hosts_without_a_common_disk(two_hosts, undisturbed, killed):
    with contextlib.ExitStack() as stack:
        processes = []
        for host, name in enumerate(two_hosts):
            Path(name).mkdir()
            nodes = f"--nnodes 2 --node-rank {host} --master-addr 10.77.0.1 --nproc-per-node 1"
            flags = [*nodes.split(), "--max-restarts", "2", TRAIN, *HALF, *NEW, *SAVING]
            inside = ("ip", "netns", "exec", name)
            torchrun = launched(*flags, before=inside, folder=name, GLOO_SOCKET_IFNAME="cable")
            processes.append(stack.enter_context(torchrun))
        if killed is not None:
            wait_for(lambda: list(Path().glob("*/run/last.pt")))
            [last] = Path().glob("*/run/last.pt")
            wait_for_step(5, last.parent)
            os.kill(children(processes[killed].pid)[0], signal.SIGKILL)
        for process, name in zip(processes, two_hosts, strict=True):
            assert process.wait(180) == 0, output(name)
    [last] = Path().glob("*/run/last.pt")  # one host has it all
    assert fingerprint(last.parent) == undisturbed(*HALF, processes=2)
