"""An exercise fails as handed out, saying what to do, and passes with the program's own code."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

EXERCISES = ["attention", "masks", "multi_head", "positions", "loop", "resume"]

SOLUTIONS = {
    "attention": """
from transformer_scratch.attention import attention_weights, scaled_dot_product_attention
""",
    "masks": "from transformer_scratch.attention import causal_mask, padding_mask\n",
    "multi_head": "from transformer_scratch.attention import MultiHeadAttention\n",
    "positions": """
from transformer_scratch.model import positional_encoding

def add_positions(x):
    return x + positional_encoding(x.size(1), x.size(2))
""",
    "loop": """
from torch import nn
from train import token_loss

def train_epoch(model, batches, optimizer, scheduler, clip_norm, pad_id):
    losses = []
    model.train()
    for batch in batches:
        weight = batch.num_tokens / batch.mean_update_tokens
        loss = token_loss(model, batch, pad_id)
        (loss * weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
""",
    "resume": """
from transformer_scratch.random_state import RandomState

def state_to_save(model, optimizer, scheduler, step):
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": RandomState().state_dict(),
        "step": step,
    }

def resume_from(state, model, optimizer, scheduler):
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    RandomState().load_state_dict(state["rng"])
    return state["step"]
""",
}

# exercise -> (a line of the solution, a mistake in its place, what the check must say)
MISTAKES = {
    "loop": [
        ("model.train()", "pass", "call model.train() first"),
        ("optimizer.zero_grad()", "pass", "optimizer.zero_grad()"),
        ("(loss * weight).backward()", "loss.backward()", "loss * (batch.num_tokens"),
        ("nn.utils.clip_grad_norm_(model.parameters(), clip_norm)", "pass", "clip it"),
        ("scheduler.step()", "pass", "scheduler.step() after each"),
    ],
    "resume": [
        ('model.load_state_dict(state["model"])', "pass", "the weights are not those"),
        ('optimizer.load_state_dict(state["optimizer"])', "pass", "AdamW has forgotten"),
        ('scheduler.load_state_dict(state["scheduler"])', "pass", "the schedule starts again at 0"),
        ('RandomState().load_state_dict(state["rng"])', "pass", "dropout would draw other numbers"),
        ('return state["step"]', "return 0", "three updates were done before"),
    ],
    "positions": [
        ("x.size(1), x.size(2))", "len(x), x.size(2))[:, None]", "along the batch axis"),
    ],
}


def check(folder: Path, solutions: dict[str, str], names: list[str]) -> subprocess.CompletedProcess:
    """Run the checks as a student does, on a copy of the exercises with these files replaced."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "exercises", folder / "exercises", ignore=ignore)
    for name, text in solutions.items():
        (folder / "exercises" / f"{name}.py").write_text(text, encoding="utf-8")
    files = [folder / "exercises" / f"check_{name}.py" for name in names]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    # The number of threads is left to PyTorch: the checks must not depend on it.
    environment.pop("OMP_NUM_THREADS", None)
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        env=environment,
    )


def gaps(name: str) -> list[str]:
    """The functions that an exercise leaves to the student."""
    tree = ast.parse((PROJECT / "exercises" / f"{name}.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if isinstance(function.body[-1], ast.Raise)]


@pytest.mark.slow
def test_handed_out_they_fail_and_say_what_to_do(tmp_path):
    finished = check(tmp_path, {}, EXERCISES)
    assert finished.returncode == 1, finished.stdout
    assert " passed" not in finished.stdout
    for name in EXERCISES:
        # resume_from is never reached: it needs a state to resume from.
        for function in set(gaps(name)) - {"resume_from"}:
            message = f"NotImplementedError: {function} is yours to write"
            assert message in finished.stdout, function


@pytest.mark.slow
def test_with_the_programs_own_code_they_pass(tmp_path):
    finished = check(tmp_path, SOLUTIONS, EXERCISES)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


def test_the_solutions_are_lines_of_the_program():
    """The loop is no function in the program; its lines are."""
    program = (PROJECT / "train.py").read_text(encoding="utf-8")
    for call in (
        "model.train()",
        "loss * weight",
        "nn.utils.clip_grad_norm_(",
        "scheduler.step()",
        "optimizer.zero_grad()",
    ):
        assert call in SOLUTIONS["loop"] and call in program, call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "mistake", "message"),
    [(name, *case) for name, cases in MISTAKES.items() for case in cases],
)
def test_a_mistake_is_named(name, line, mistake, message, tmp_path):
    assert SOLUTIONS[name].count(line) == 1
    finished = check(tmp_path, {name: SOLUTIONS[name].replace(line, mistake)}, [name])
    assert finished.returncode == 1 and message in finished.stdout, finished.stdout


def test_a_normal_test_run_leaves_them_out():
    """Plain pytest collects tests/ alone, and test_*.py for want of another setting."""
    settings = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in settings and "python_files" not in settings
    assert not list((PROJECT / "exercises").glob("*test*.py"))
