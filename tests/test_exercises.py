"""Every exercise fails as handed out, saying what is to do, and passes with the program's own code put in."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT

EXERCISES = ["attention", "masks", "multi_head", "positions", "loop", "resume"]

SOLUTIONS = {
    "attention": "from transformer_scratch.attention import attention_weights, scaled_dot_product_attention\n",
    "masks": "from transformer_scratch.attention import causal_mask, padding_mask\n",
    "multi_head": "from transformer_scratch.attention import CrossAttention as MultiHeadAttention\n",
    "positions": """
from transformer_scratch.model import positional_encoding

def add_positions(x):
    return x + positional_encoding(x.size(1), x.size(2))
""",
    "loop": """
from torch import nn
from train import token_loss

def train_epoch(model, batches, optimizer, scheduler, clip_norm):
    losses = []
    model.train()
    for batch in batches:
        loss = token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses
""",
    "resume": """
from transformer_scratch.runtime import rng_state, set_rng_state

def state_to_save(model, optimizer, scheduler, step):
    return dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), step=step,
        rng=rng_state(),
    )

def go_on_from(saved, model, optimizer, scheduler):
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    set_rng_state(saved["rng"])
    return saved["step"]
""",
}

# exercise -> (a line of the solution, a mistake in its place, what the check must say)
MISTAKES = {
    "loop": [
        ("model.train()", "pass", "call model.train() first"),
        ("optimizer.zero_grad(set_to_none=True)", "pass", "optimizer.zero_grad()"),
        ("nn.utils.clip_grad_norm_(model.parameters(), clip_norm)", "pass", "clip it"),
        ("scheduler.step()", "pass", "scheduler.step() after each"),
    ],
    "resume": [
        ('model.load_state_dict(saved["model"])', "pass", "the weights are not those"),
        ('optimizer.load_state_dict(saved["optimizer"])', "pass", "AdamW has forgotten its averages"),
        ('scheduler.load_state_dict(saved["scheduler"])', "pass", "the schedule starts again at 0"),
        ('set_rng_state(saved["rng"])', "pass", "dropout would draw other numbers"),
    ],
    "positions": [
        ("positional_encoding(x.size(1), x.size(2))", "positional_encoding(len(x), x.size(2))[:, None]", "batch axis")
    ],
}


def check(folder, solutions: dict[str, str], names: list[str]) -> subprocess.CompletedProcess:
    """Run the checks on a copy of the exercises with these files replaced."""
    shutil.copytree(PROJECT / "exercises", folder / "exercises", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in solutions.items():
        (folder / "exercises" / f"{name}.py").write_text(text)
    files = [folder / "exercises" / f"check_{name}.py" for name in names]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}", *files],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip


@pytest.mark.slow
def test_handed_out_they_fail_and_say_what_is_to_do(tmp_path):
    finished = check(tmp_path, {}, EXERCISES)
    assert finished.returncode == 1, finished.stdout
    assert " passed" not in finished.stdout
    for name in EXERCISES:
        # go_on_from is never reached: it needs a state to go on from.
        for function in set(gaps(name)) - {"go_on_from"}:
            assert f"NotImplementedError: {function} is yours to write" in finished.stdout, function


def gaps(name: str) -> list[str]:
    """The functions that an exercise leaves to the student."""
    tree = ast.parse((PROJECT / "exercises" / f"{name}.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if isinstance(function.body[-1], ast.Raise)]


@pytest.mark.slow
def test_with_the_programs_own_code_they_pass(tmp_path):
    finished = check(tmp_path, SOLUTIONS, EXERCISES)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout and "failed" not in finished.stdout


def test_the_solutions_are_lines_of_the_program():
    """The loop and resume are not functions in the program; their lines are."""
    program = (PROJECT / "train.py").read_text()
    for line in SOLUTIONS["resume"].splitlines():
        if "load_state_dict" in line:
            assert line.strip() in program
    for call in ("model.train()", "nn.utils.clip_grad_norm_(", "scheduler.step()", "optimizer.zero_grad("):
        assert call in SOLUTIONS["loop"] and call in program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "mistake", "message"), [(name, *case) for name, cases in MISTAKES.items() for case in cases]
)
def test_a_mistake_is_named(name, line, mistake, message, tmp_path):
    assert SOLUTIONS[name].count(line) == 1
    finished = check(tmp_path, {name: SOLUTIONS[name].replace(line, mistake)}, [name])
    assert finished.returncode == 1 and message in finished.stdout, finished.stdout


def test_a_normal_test_run_leaves_them_out():
    """pytest collects tests/ alone, and takes test_*.py for tests unless a setting says otherwise."""
    settings = (PROJECT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings and "python_files" not in settings
    assert not list((PROJECT / "exercises").glob("*test*.py"))
