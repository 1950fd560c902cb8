"""Exercises: a right solution passes, a usual mistake is named, by one message that can be read.

The student's own files in exercises/ are not tested, except those that are still as handed out.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

# What a student would write, with nothing but the exercise's text.
SOLUTIONS = {
    "attention": """
import math

def attention_weights(query, key, mask=None):
    scores = query @ key.transpose(-2, -1)
    scores = scores / math.sqrt(query.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)

def scaled_dot_product_attention(query, key, value, mask=None):
    return attention_weights(query, key, mask) @ value
""",
    "masks": """
import torch

def padding_mask(ids, pad_id):
    return (ids != pad_id)[:, None, None, :]

def causal_mask(length):
    return torch.ones(length, length, dtype=torch.bool).tril()
""",
    "multi_head": """
from torch import nn
from transformer_scratch.attention import scaled_dot_product_attention

class MultiHeadAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def split_heads(self, x):
        batch, length, dim = x.shape
        return x.view(batch, length, self.num_heads, -1).transpose(1, 2)

    def forward(self, x, memory, mask=None):
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(memory))
        value = self.split_heads(self.value(memory))
        heads = scaled_dot_product_attention(query, key, value, mask)
        heads = heads.transpose(1, 2)
        joined = heads.reshape(x.shape)
        return self.output(joined)
""",
    "positions": """
import torch

def positional_encoding(length, dim):
    position = torch.arange(length)[:, None]
    angle = position / 10000 ** (torch.arange(0, dim, 2) / dim)
    encoding = torch.empty(length, dim)
    encoding[:, 0::2] = angle.sin()
    encoding[:, 1::2] = angle.cos()
    return encoding

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
    "loss_scaler": """
import torch
from torch import nn
from train import token_loss

def train_update(model, batches, optimizer, scheduler, scaler, clip_norm, pad_id):
    for batch in batches:
        weight = batch.num_tokens / batch.mean_update_tokens
        with torch.amp.autocast("cpu", dtype=torch.float16):
            loss = token_loss(model, batch, pad_id)
        scaler.scale(loss * weight).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scale_before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < scale_before
    if not skipped:
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, skipped
""",
}

# Where the exercise is a part of the program, that part.
PROGRAM = {
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
}

# Other ways to write the same: exercise -> replacements in its solution.
ALSO_RIGHT = {
    "attention": [
        [("scores = scores / math.sqrt(query.size(-1))", "scores /= math.sqrt(query.size(-1))")],
        [
            (
                "    scores = query @ key.transpose(-2, -1)\n"
                "    scores = scores / math.sqrt(query.size(-1))\n",
                "    query /= math.sqrt(query.size(-1))\n    scores = query @ key.mT\n",
            ),
        ],
        [("scores.masked_fill(~mask, -math.inf)", "mask.log() + scores")],
    ],
    "multi_head": [
        [
            (
                "x.view(batch, length, self.num_heads, -1).transpose(1, 2)",
                "__import__('torch').stack(x.chunk(self.num_heads, dim=2), dim=1)",
            )
        ],
    ],
    "positions": [
        [("return x +", "x = x.clone(); x +="), ("x.size(2))\n", "x.size(2)); return x\n")]
    ],
    "loop": [
        [
            ("        optimizer.zero_grad()\n", ""),
            ("in batches:\n", "in batches:\n        model.zero_grad(set_to_none=False)\n"),
        ],
        [("loss * weight", "loss * batch.num_tokens / batch.mean_update_tokens")],
    ],
    "loss_scaler": [
        [
            ("    optimizer.zero_grad()\n", ""),
            ("    for batch in", "    optimizer.zero_grad()\n    for batch in"),
        ],
        [("scaler.get_scale() < scale_before", "not torch.isfinite(grad_norm)")],
    ],
}

# exercise -> for each usual mistake the line, what stands in its place, what the check says
MISTAKES = {
    "attention": [
        ("key.transpose(-2, -1)", "key.mT.mT", "RuntimeError"),
        ("softmax(dim=-1)", "softmax(dim=-2)", "softmax runs over axis 2"),
        ("softmax(dim=-1)", "softmax(dim=1)", "softmax runs over axis 1"),
        ("scores.softmax(dim=-1)", "scores", "must sum to 1: softmax over the keys"),
        ("scores = scores / math.sqrt(query.size(-1))", "pass", "not divided by sqrt(d_k)"),
        ("math.sqrt(query.size(-1))", "query.size(-1)", "the square root of d_k, not by d_k"),
        ("math.sqrt(query.size(-1))", "math.sqrt(key.size(-2))", "d_k is the head dim, 8"),
        ("softmax(dim=-1)", "softmax(dim=-1) / math.sqrt(8)", "before the softmax, not the"),
        ("~mask, -math.inf", "mask, -math.inf", "the wrong way round"),
        ("~mask, -math.inf", "~mask, 0", "must get weight 0"),
        ("scores = scores.masked_fill(~mask, -math.inf)", "pass", "must get weight 0"),
        (
            "scores = scores.masked_fill(~mask, -math.inf)",
            "return scores.softmax(dim=-1).masked_fill(~mask, 0)",
            "mask the scores before the softmax",
        ),
        ("(query, key, mask) @", "(query, key) @", "must pass its mask on"),
        ("math.sqrt(query.size(-1))", "math.sqrt(8)", "wrong for one of 4: d_k is query.size"),
        ("~mask, -math.inf", "~mask[:, :, :, :], -math.inf", "too many indices"),
        ("return scores.softmax(dim=-1)", "return scores.double().softmax(dim=-1)", "float64"),
        ("return scores.softmax(dim=-1)", "scores.softmax(dim=-1)", "returns None"),
    ],
    "masks": [
        ("[:, None, None, :]", "", "(B, 1, 1, S)"),
        ("!= pad_id", "== pad_id", "the wrong way round"),
        ("ids != pad_id", "ids != 13", "with pad_id=12"),
        ("(ids != pad_id)", "(ids != pad_id).float()", "the mask must be bool"),
        ("tril()", "triu()", "which is the future"),
        ("tril()", "tril(-1)", "attend to itself"),
        (", dtype=torch.bool", "", "the mask must be bool"),
        ("torch.ones(length, length", "torch.ones(4, 4", "with length 6"),
    ],
    "multi_head": [
        (".transpose(1, 2)\n\n", "\n\n", "(B, H, T, K) is (2, 3, 5, 4)"),
        (
            "x.view(batch, length, self.num_heads, -1).transpose(1, 2)",
            "x.view(batch, self.num_heads, length, -1)",
            "a view straight to (B, H, T, K)",
        ),
        (
            "x.view(batch, length, self.num_heads, -1).transpose(1, 2)",
            "x.view(batch, length, -1, self.num_heads).permute(0, 3, 1, 2)",
            "head 0 must hold the first 4 numbers",
        ),
        ("self.query(x)", "self.query(memory)", "queries come from x"),
        ("self.key(memory)", "self.key(x)", "come from memory, not from x"),
        ("self.value(memory)", "self.value(x)", "come from memory, not from x"),
        ("attention(query, key, value", "attention(key, query, value", "in this order"),
        ("attention(query, key, value", "attention(query, value, key", "in this order"),
        ("self.query(x)", "x", "the shape is right, the numbers are not"),
        ("self.output(joined)", "x + self.output(joined)", "residual connection"),
        ("self.num_heads, -1", "3, -1", "with two heads"),
        ("value, mask)", "value, mask[:, 0] if mask is not None else None)", "the mask must reach"),
        ("heads = heads.transpose(1, 2)", "pass", "a view straight from (B, H, T, K)"),
        ("self.output(joined)", "joined", "W^O is missing"),
        ("value, mask)", "value)", "the mask must reach"),
    ],
    "positions": [
        ("torch.arange(length)", "torch.arange(1, length + 1)", "position 0, the first, is sin(0)"),
        (
            "    encoding[:, 0::2] = angle.sin()\n    encoding[:, 1::2] = angle.cos()\n",
            "    encoding = torch.cat([angle.sin(), angle.cos()], dim=1)\n",
            "sines and cosines alternate",
        ),
        ("torch.arange(0, dim, 2)", "torch.arange(dim // 2)", "PE(5, 2) = sin(5 / 10000^(2/8))"),
        ("dim, 2) / dim)", "dim, 2) / 8)", "10000^(2/4)"),
        ("torch.empty(length, dim)", "torch.empty(length, dim).double()", "must be float32"),
        ("x.size(1), x.size(2))", "len(x), x.size(2))", "positions run along axis 1, T"),
        ("return x + pos", "return x * pos", "the encoding must be added to x"),
        ("return x + pos", "return x - pos", "added, not subtracted"),
        ("x.size(1), x.size(2))", "len(x), x.size(2))[:, None]", "along the batch axis"),
        ("return x + positional", "return 0 * x + positional", "the encoding must be added to x"),
    ],
    "loop": [
        ("model.train()", "pass", "model.train() first"),
        ("optimizer.zero_grad()", "pass", "optimizer.zero_grad() once a batch"),
        ("(loss * weight).backward()", "pass", "there is no gradient at the update"),
        ("(loss * weight).backward()", "loss.backward()", "loss * (batch.num_tokens"),
        ("nn.utils.clip_grad_norm_(model.parameters(), clip_norm)", "pass", "not at most 0.1"),
        ("clip_grad_norm_(", "clip_grad_value_(", "not at most 0.1"),
        ("optimizer.step()", "pass", "the weights have not moved"),
        ("scheduler.step()", "pass", "scheduler.step() after each update"),
        ("optimizer.step()", "scheduler.step(); optimizer.step()", "moves before the update"),
        ("losses.append(loss.item())", "pass", "the loss of each of the 5 batches; yours: []"),
        ("loss.item()", "(loss * weight).item()", "the plain mean over the tokens"),
        ("batch, pad_id)", "batch, pad_id, label_smoothing=0.1)", "the plain mean over the tokens"),
        ("batch, pad_id)", "batch, 0)", "the plain mean over the tokens"),
        ("loss * weight", "loss / batch.mean_update_tokens", "loss * (batch.num_tokens"),
        ("scheduler.step()", "scheduler.step(); scheduler.step()", "once an update"),
        ("loss.item()", "loss", "return numbers, loss.item()"),
        ("in batches:", "in list(batches)[::-1]:", "the first loss is"),
        ("loss = token_loss", "token_loss(model, batch, pad_id); loss = token_loss", "too often"),
    ],
    "resume": [
        ('model.load_state_dict(state["model"])', "pass", "the weights are not those"),
        ('optimizer.load_state_dict(state["optimizer"])', "pass", "AdamW has forgotten"),
        ('scheduler.load_state_dict(state["scheduler"])', "pass", "the schedule starts again at 0"),
        ('RandomState().load_state_dict(state["rng"])', "pass", "dropout would draw other numbers"),
        ('return state["step"]', "pass", "resume_from returns None"),
        ('"step": step', '"step": 0', "resume_from returns 0"),
        ("scheduler.state_dict()", "scheduler", "tensors, numbers and strings"),
        (
            'optimizer.load_state_dict(state["optimizer"])',
            'optimizer.load_state_dict(state["optimizer"])\n'
            '    for old in optimizer.state.values(): old["step"] *= 0',
            "AdamW has forgotten",
        ),
    ],
    "loss_scaler": [
        (", dtype=torch.float16", "", "not computed in fp16"),
        ("scaler.scale(loss * weight)", "(loss * weight)", "the loss is not scaled"),
        ("loss * weight", "loss", "loss * (batch.num_tokens / batch.mean_update_tokens)"),
        ("loss * weight", "loss / len(batches)", "loss * (batch.num_tokens /"),
        ("    scaler.unscale_(optimizer)", "        scaler.unscale_(optimizer)", "1 of 3"),
        ("scaler.unscale_(optimizer)", "pass", "scaler.unscale_(optimizer) before clipping"),
        (
            "    scaler.unscale_(optimizer)\n    grad_norm = nn.utils.clip_grad_norm_("
            "model.parameters(), clip_norm)\n",
            "    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)\n"
            "    scaler.unscale_(optimizer)\n",
            "clipped while it was still scaled",
        ),
        ("model.parameters(), clip_norm", "model.parameters(), 1e9", "not at most 0.1"),
        ("scaler.step(optimizer)", "optimizer.step()", "use gradients that have overflowed"),
        ("    scaler.step(optimizer)\n", "", "has no scaler.step(optimizer) before it"),
        ("    scaler.update()\n", "", "scaler.update() is missing"),
        ("    if not skipped:", "    if True:", "must not move the schedule"),
        ("        scheduler.step()", "        pass", "the schedule has moved 0 times"),
        ("    optimizer.zero_grad()\n", "", "the gradients of the update before"),
        (".backward()", ".backward(); optimizer.zero_grad()", "of the batches before are gone"),
        ("get_scale() < scale", "get_scale() != scale", "the scale has grown, not fallen"),
        ("return grad_norm, skipped", "return grad_norm, False", "this update was skipped"),
        ("return grad_norm", "return clip_norm", "is the one after clipping"),
        ("return grad_norm", "return grad_norm * scaler.get_scale()", "multiplied by the scale"),
        ("return grad_norm, skipped", "return skipped, grad_norm", "return the norm first"),
        ("    optimizer.zero_grad()", "        optimizer.zero_grad()", "a skipped update, too"),
        ("        scaler.scale(loss", "    scaler.scale(loss", "have gone forward and 1 backward"),
        ("loss * weight", "loss * weight / len(batches)", "loss * (batch.num_tokens /"),
        ("loss * weight", "loss / batch.mean_update_tokens", "loss * (batch.num_tokens /"),
        (
            "        scaler.scale(loss * weight).backward()\n",
            "        scaler.scale(loss * weight).backward()\n        scaler.unscale_(optimizer)\n"
            "        scaler.step(optimizer)\n        scaler.update()\n",
            "scaler.unscale_() after 1 of 3 batches",
        ),
        (
            "        scaler.scale(loss * weight).backward()\n",
            "        scaler.scale(loss * weight).backward()\n        scaler.step(optimizer)\n",
            "scaler.step() after 1 of 3 batches",
        ),
    ],
}


# As `python -m pytest FILE` in each of these folders, but PyTorch is imported only once.
IN_EACH_FOLDER = """
import os, sys, pytest, train

for folder in sys.argv[2:]:
    if not os.fork():
        os.chdir(folder)
        with open("output", "w", encoding="utf-8") as sys.stdout:
            code = pytest.main([sys.argv[1]])
        os._exit(code)
    os.wait()
"""


def copy(folder: Path, solutions: dict[str, str]) -> None:
    """A copy of the project, with these files replaced."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("exercises", "transformer_scratch"):
        shutil.copytree(PROJECT / name, folder / name, ignore=ignore)
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder)
    for name, text in solutions.items():
        (folder / "exercises" / f"{name}.py").write_text(text, encoding="utf-8")


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python as a student does, who has set no variable."""
    ours = ("OMP_", "WANDB_", "PYTEST_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        env={**environment, **variables},
    )


def check(folder: Path, name: str, texts: list[str]) -> list[str]:
    """What the check of an exercise prints on a narrow terminal, for each text of its file."""
    folders = [folder / str(number) for number in range(len(texts))]
    for place, text in zip(folders, texts, strict=True):
        copy(place, {name: text})
    file = f"exercises/check_{name}.py"
    finished = python(folders[0], "-c", IN_EACH_FOLDER, file, *map(str, folders), COLUMNS="80")
    assert finished.returncode == 0, finished.stderr
    return [(place / "output").read_text(encoding="utf-8") for place in folders]


def changed(text: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def only_message(output: str) -> str:
    """The one line that says what is wrong. pytest's summary, which would cut it off, is absent."""
    assert "1 failed" in output and "short test summary" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("E ")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_right_solution_passes(name, tmp_path):
    copy(tmp_path / "project", SOLUTIONS)
    finished = python(tmp_path / "project", "-m", "pytest", f"exercises/check_{name}.py")
    assert finished.returncode == 0, finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_passes_with_any_number_of_threads(threads, tmp_path):
    copy(tmp_path / "project", SOLUTIONS)
    files = [f"exercises/check_{name}.py" for name in SOLUTIONS]
    finished = python(tmp_path / "project", "-m", "pytest", *files, OMP_NUM_THREADS=threads)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.slow
def test_the_programs_own_code_passes(tmp_path):
    copy(tmp_path / "project", PROGRAM)
    files = [f"exercises/check_{name}.py" for name in PROGRAM]
    finished = python(tmp_path / "project", "-m", "pytest", *files)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ALSO_RIGHT)
def test_other_right_solutions_pass(name, tmp_path):
    texts = [changed(SOLUTIONS[name], *replacements) for replacements in ALSO_RIGHT[name]]
    for output in check(tmp_path, name, texts):
        assert "failed" not in output and " passed in " in output, output


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, tmp_path):
    texts = [changed(SOLUTIONS[name], (line, mistake)) for line, mistake, _ in MISTAKES[name]]
    outputs = check(tmp_path, name, texts)
    for (line, mistake, message), output in zip(MISTAKES[name], outputs, strict=True):
        assert message in only_message(output), f"{line!r} -> {mistake!r}:\n{output}"


GAP = r"(\w+) is yours to write"


def as_handed_out() -> dict[str, str]:
    """The files in exercises/ in which a student has not written yet: exercise -> text."""
    texts = {}
    for name, solution in SOLUTIONS.items():
        text = (PROJECT / f"exercises/{name}.py").read_text(encoding="utf-8")
        if re.findall(GAP, text) == re.findall(r"def ([a-z]\w+)", solution):
            texts[name] = text
    return texts


@pytest.mark.slow
def test_handed_out_they_say_what_to_do(tmp_path):
    for name, text in as_handed_out().items():
        output = check(tmp_path / name, name, [text])[0]
        first = re.search(GAP, text)[1]
        assert f"NotImplementedError: {first} is yours to write" in only_message(output)


def imports(text: str) -> set[str]:
    """The names that a file imports."""
    nodes = ast.walk(ast.parse(text))
    found = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.name for node in found for alias in node.names}


def test_handed_out_they_import_what_they_need():
    for name, text in as_handed_out().items():
        assert imports(SOLUTIONS[name]) <= imports(text), name


def test_every_gap_is_known_by_its_words():
    """Otherwise the tests of what is handed out would pass over a file."""
    for name in SOLUTIONS:
        text = (PROJECT / f"exercises/{name}.py").read_text(encoding="utf-8")
        assert text.count("NotImplementedError(") == len(re.findall(GAP, text)), name


def test_the_solutions_are_lines_of_the_program():
    """The loop is no function of the program; its lines are."""
    program = (PROJECT / "train.py").read_text(encoding="utf-8")
    calls = {
        "loop": ["model.train()", "scheduler.step()", "loss * weight", "optimizer.zero_grad()"],
        "loss_scaler": [
            "scaler.scale(loss * weight).backward()",
            "scaler.unscale_(optimizer)",
            "nn.utils.clip_grad_norm_(",
            "scaler.step(optimizer)",
            "scaler.update()",
            "if not skipped:",
        ],
    }
    for name, lines in calls.items():
        for line in lines:
            assert line in SOLUTIONS[name] and line in program, line


def test_a_normal_test_run_leaves_them_out():
    """Plain pytest collects tests/ alone, and test_*.py for want of another setting."""
    settings = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in settings and "python_files" not in settings
    assert not list((PROJECT / "exercises").glob("test_*.py"))
