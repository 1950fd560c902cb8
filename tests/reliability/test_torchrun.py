"""The real torchrun: it restarts what was killed, stops all processes together, and reaches over two hosts."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_processes import HALF, undisturbed_two  # noqa: F401 - a fixture
from test_signals import PROJECT, wait_for
from trainings import fingerprint

from transformer_scratch.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
NEW = ["--run-dir", "run", "--log-every", "1", "--save-every", "2"]


@contextlib.contextmanager
def launched(*flags: str, before: tuple = (), folder: str = ".", **environment: str) -> Iterator[subprocess.Popen]:
    """A torchrun of train.py in a session of its own; its output goes to output.txt."""
    with open(Path(folder, "output.txt"), "w") as output:
        process = subprocess.Popen(
            [*before, *TORCHRUN, *flags], stdout=output, stderr=output, cwd=folder, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which takes its processes along
            process.wait()


def children(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_step(step: int, run: str = "run") -> None:
    line = b'{"step": %d, ' % step
    wait_for(lambda: Path(run, "metrics.jsonl").exists() and line in Path(run, "metrics.jsonl").read_bytes(), 120)


def output(folder: str = ".") -> str:
    return Path(folder, "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (1, 0, 1)], ids=str)
def test_killed_processes_come_back_by_themselves(undisturbed_two, ranks):  # noqa: F811
    restarts = ["--max-restarts", str(len(ranks))]
    with launched(
        "--standalone", "--nproc-per-node", "2", *restarts, str(PROJECT / "train.py"), *HALF, *NEW
    ) as process:
        for number, rank in enumerate(ranks):
            wait_for_step(3 + 3 * number)
            os.kill(sorted(children(process.pid))[rank], signal.SIGKILL)
        assert process.wait(180) == 0, output()
    assert fingerprint(Path("run")) == undisturbed_two
    assert output().count("(resumed)") == len(ranks)


@pytest.mark.slow
def test_one_process_under_torchrun_comes_back_too_and_without_a_run_dir(undisturbed):
    flags = [*HALF, "--batch-size", "32", *NEW[2:]]
    with launched(
        "--standalone", "--nproc-per-node", "1", "--max-restarts", "1", str(PROJECT / "train.py"), *flags
    ) as process:
        wait_for(lambda: list(Path("runs").glob("*/metrics.jsonl")), 120)
        [run] = Path("runs").glob("*")
        wait_for_step(5, run)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(180) == 0, output()
    assert [folder.name for folder in Path("runs").glob("*")] == [run.name]
    assert fingerprint(run) == undisturbed(*HALF, "--batch-size", "32")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_stops_all_and_saves(undisturbed_two, number):  # noqa: F811
    standalone = ["--standalone", "--nproc-per-node", "2", str(PROJECT / "train.py")]
    with launched(*standalone, *HALF, *NEW, "--num-workers", "1") as process:
        wait_for_step(3)
        process.send_signal(number)
        process.wait(60)
    steps = Path("run/metrics.jsonl").read_text().count('"lr"')
    assert load_checkpoint(Path("run/last.pt"))["step"] == steps
    assert "nothing is lost" in output()
    with launched(*standalone, "--resume", "run") as process:
        assert process.wait(120) == 0, output()
    assert fingerprint(Path("run")) == undisturbed_two


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: as far as the network goes, two hosts. -> their names."""
    names = [f"ts{uuid.uuid4().hex[:6]}{host}" for host in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
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
def test_two_hosts_without_a_common_disk(two_hosts, undisturbed_two, killed):  # noqa: F811
    with contextlib.ExitStack() as stack:
        processes = []
        for host, name in enumerate(two_hosts):
            Path(name).mkdir()
            flags = f"--nnodes 2 --node-rank {host} --nproc-per-node 1 --master-addr 10.77.0.1 --max-restarts 2".split()
            flags += [str(PROJECT / "train.py"), *HALF, *NEW]
            in_namespace = ("ip", "netns", "exec", name)
            torchrun = launched(*flags, before=in_namespace, folder=name, GLOO_SOCKET_IFNAME="cable")
            processes.append(stack.enter_context(torchrun))
        if killed is not None:
            wait_for(lambda: list(Path().glob("*/run/last.pt")), 120)
            [last] = Path().glob("*/run/last.pt")
            wait_for_step(5, last.parent)
            os.kill(children(processes[killed].pid)[0], signal.SIGKILL)
        for process, name in zip(processes, two_hosts, strict=True):
            assert process.wait(180) == 0, output(name)
    [last] = Path().glob("*/run/last.pt")  # one host has it all
    assert fingerprint(last.parent) == undisturbed_two
