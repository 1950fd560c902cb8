"""The benchmarks that run Lightning beside train.py print their tables. Nothing here is timed."""

import itertools
import signal

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from benchmarks import overhead, throughput
from benchmarks.lib import programs, stopwatch
from benchmarks.lib.measure import ratio
from benchmarks.lib.stopwatch import MODELS_OWN, Stopwatch

pytestmark = pytest.mark.comparison

TINY = ["--dim", "16", "--num-layers", "1", "--batch-size", "8", "--accelerator", "cpu"]
PROGRAMS = [programs.run_train, programs.run_lightning, programs.run_barebones_lightning]


@pytest.mark.slow
def test_overhead_prints_its_table(tmp_path, capsys):
    overhead.main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in overhead.PROGRAMS)
    assert (tmp_path / "overhead.json").exists() and (tmp_path / "overhead.png").exists()


def test_throughput_against_the_twin(tmp_path, capsys, monkeypatch):
    for others in ("from_article_to_ours", "against_torch"):
        monkeypatch.setattr(throughput, others, lambda *_: {"nothing": lambda: 1.0})
    throughput.main(["--quick", "--lightning", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| the Lightning twin |" in printed and "| train.py |" in printed


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_read_after_every_update_and_leaves_no_trace(program):
    """The clock is a counter: every update makes one tick, and nothing else does."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hooks = len(_global_optimizer_post_hooks)
    clock = itertools.count()
    readings = programs.read_after_updates(program, TINY, updates=4, read=clock.__next__)
    assert readings == [0, 1, 2, 3, 4], "one to warm up, and four"
    assert len(_global_optimizer_post_hooks) == hooks
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_program_that_ends_too_early_is_noticed():
    with pytest.raises(RuntimeError, match="ended after 0 updates"):
        programs.update_seconds(lambda flags: None, TINY, updates=4)


def test_the_speed_is_compared_within_each_round(monkeypatch):
    """A machine that becomes ten times slower within a round changes that round's ratio alone."""
    calls, turns = itertools.count(), []
    costs = dict(zip(PROGRAMS, (2.0, 3.0, 2.5), strict=True))

    def update_seconds(program, flags, updates, wandb_mode):
        turns.append(program)
        return [costs[program] * (10 if next(calls) >= 10 else 1)] * updates

    monkeypatch.setitem(overhead.ROUNDS, "paper", 5)
    monkeypatch.setattr(overhead, "update_seconds", update_seconds)
    monkeypatch.setattr(overhead, "around_the_model", lambda *_: 1.0)
    steps, _ = overhead.measure("paper", quick=False)
    ours, twins = steps["train.py"], steps["Lightning, the twin"]
    assert ratio(twins, ours).median == 1.5 != twins.median / ours.median
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(a == b[::-1] for a, b in itertools.pairwise(rounds)), "A B C, then C B A"


# ----------------------------------------------------------------------------------- the stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved: clock.now += 1."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_the_stopwatch_leaves_everything_as_it_was():
    # The first AdamW of a process makes PyTorch wrap its step for good.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))])
    before = [getattr(owner, name) for owner, name in MODELS_OWN]
    with Stopwatch().running():
        meanwhile = [getattr(owner, name) for owner, name in MODELS_OWN]
    assert all(one is not other for one, other in zip(before, meanwhile, strict=True))
    assert [getattr(owner, name) for owner, name in MODELS_OWN] == before


def test_the_time_of_what_both_programs_call_does_not_count(clock):
    def take(seconds: float) -> None:
        clock.now += seconds

    watch = Stopwatch()
    take(1)
    watch.timed(take)(100)
    watch.timed(lambda: watch.timed(take)(100))()
    take(2)
    assert watch.read() == 3


def test_what_lightning_runs_in_the_closure_of_a_step_is_its_own(clock):
    parameter = torch.nn.Parameter(torch.zeros(()))
    watch = Stopwatch()
    with watch.running():
        optimizer = torch.optim.AdamW([parameter])

        def take_time(*_: object) -> None:
            clock.now += 100

        def closure() -> None:
            clock.now += 1
            parameter.grad = torch.ones(())

        optimizer.register_step_pre_hook(take_time)
        optimizer.step(closure)
        assert watch.read() == 1


def test_an_optimizer_that_grows_slower_is_not_taken_for_the_loop(clock):
    """The update is read within the optimizer's step, whose time must not count up to there."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    watch, readings = Stopwatch(), []
    with watch.running():
        optimizer = torch.optim.AdamW([parameter])

        def take_time(*_: object) -> None:
            clock.now += 100 * len(readings)

        optimizer.register_step_pre_hook(take_time)
        optimizer.register_step_post_hook(lambda *_: readings.append(watch.read()))
        for _ in range(5):
            clock.now += 1  # the loop
            parameter.grad = torch.ones(())
            optimizer.step()
    assert readings == [1, 2, 3, 4, 5]


def test_freeing_the_graph_is_part_of_the_backward_pass(clock):
    """Otherwise it would be counted wherever a loop happens to let go of its loss."""
    with Stopwatch().running():
        logits = torch.zeros(2, 3, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        weighted = loss * 2
        weighted.backward()
        assert loss.grad_fn is None and weighted.grad_fn is None
    assert logits.grad.abs().sum() > 0
