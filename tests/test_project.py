"""Rules of the house that a machine can hold: imports, requirements, tests without Lightning."""

import ast
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import PROJECT

PACKAGE = sorted((PROJECT / "transformer_scratch").rglob("*.py"))
SCRIPTS = [PROJECT / name for name in ("train_minimal.py", "train.py", "evaluate.py")]
PAPER = ["attention", "blocks", "model"]
LIGHTNING = {
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
}


def read(name: str | Path) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_imports_are_seen_wherever_they_stand(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import a.b as c\n\ndef f():\n    from d import e\n    if True:\n        import g\n",
        encoding="utf-8",
    )
    assert imported(file) == {"a.b", "d", "d.e", "g"}


@pytest.mark.parametrize("file", [*SCRIPTS, *PACKAGE], ids=lambda file: file.name)
def test_scripts_and_package_do_not_import_lightning(file):
    assert not packages(imported(file)) & LIGHTNING


def test_scripts_do_not_load_lightning_through_others():
    code = "import sys, train, train_minimal, evaluate; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, cwd=PROJECT, capture_output=True, encoding="utf-8", check=True
    )
    loaded = packages(set(process.stdout.split()))
    assert "transformer_scratch" in loaded
    assert not loaded & (LIGHTNING | {"comparison"})


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: file.name)
def test_imports_go_one_way(file):
    """From the scripts to the package to torch."""
    above = {"train", "train_minimal", "evaluate"}
    beside = {"comparison", "benchmarks", "tests", "docs", "exercises", ""}
    assert not packages(imported(file)) & (above | beside)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_files_import_only_torch_and_each_other(name):
    modules = imported(Path(f"transformer_scratch/{name}.py"))
    assert packages(modules) <= {"math", "torch", "transformer_scratch"}
    ours = {module.split(".")[1] for module in modules if module.startswith("transformer_scratch.")}
    assert ours <= set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_files_do_not_pack(name):
    assert not re.search(r"pack(ed|ing)?\b", read(f"transformer_scratch/{name}.py"), re.IGNORECASE)


@pytest.mark.parametrize("file", [*SCRIPTS, *PACKAGE], ids=lambda file: file.name)
def test_the_transformer_is_not_pytorchs(file):
    nodes = ast.walk(ast.parse(read(file)))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {name.split(".")[-1] for name in imported(file) if name.startswith("torch")}
    assert not {name for name in used if re.match("Transformer.|MultiheadAttention", name)}


def test_the_minimal_training_fits_on_a_screen():
    assert len(read("train_minimal.py").splitlines()) <= 80


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("train mode", "model.train()"),
        ("batch to the device", ".to(device)"),
        ("autocast", "with autocast"),
        ("backward", ".backward()"),
        ("unscale before clipping", "scaler.unscale_"),
        ("clipping", "clip_grad_norm_"),
        ("optimizer step", "scaler.step("),
        ("scaler update", "scaler.update()"),
        ("zero_grad", "zero_grad()"),
        ("schedule", "scheduler.step()"),
        ("logging", "log("),
        ("eval mode", "judged.eval()"),
        ("averaging", "average_weights("),
        ("epoch mean", ".mean("),
        ("the best k", "save_top_k"),
        ("a checkpoint for resuming", "run.save("),
    ],
)
def test_a_hidden_step_is_a_line_of_the_loop(tag, code):
    """Inside the loop over epochs of train.py, not in a function that it calls."""
    text = read("train.py")
    loops = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.For)]
    (loop,) = [node for node in loops if getattr(node.target, "id", None) == "epoch"]
    lines = text.splitlines()[loop.lineno - 1 : loop.end_lineno]
    assert any(code in line and f"# [hidden: {tag}]" in line for line in lines)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("requirements.txt", {"torch", "wandb", "tyro", "tqdm", "pytest", "matplotlib"}),
        ("comparison/requirements.txt", {"pytorch-lightning"}),
    ],
)
def test_requirements_are_pinned_exactly(file, names):
    lines = [line.split("#")[0].strip() for line in read(file).splitlines()]
    pins = dict(re.fullmatch(r"([\w-]+)==(\d+(?:\.\d+)+)", line).groups() for line in lines if line)
    assert pins.keys() >= names


# --------------------------------------------------------- pytest with requirements.txt alone


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter that has everything installed here but Lightning."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    entries = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    for path in [path for entry in entries for path in entry.iterdir()]:
        if not path.name.lower().replace("-", "_").startswith(tuple(LIGHTNING)):
            (site_packages / path.name).symlink_to(path)
    return folder / "bin/python"


def run_pytest(
    python: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "REQUIRE_COMPARISON"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=PROJECT, capture_output=True, encoding="utf-8", env=kept | environment
    )


@pytest.mark.slow  # it imports every test
def test_without_lightning_its_tests_are_left_out_with_one_line(bare_python):
    process = run_pytest(bare_python, "--collect-only", "-m", "")
    assert process.returncode == 0, process.stdout[-3000:]
    assert process.stdout.count("the comparison with Lightning was left out") == 1
    assert "tests/test_comparison" not in process.stdout
    assert "tests/test_attention.py" in process.stdout
    assert not re.search(r"\d skipped", process.stdout)


@pytest.mark.slow
def test_where_the_comparison_is_required_its_absence_is_an_error(bare_python):
    process = run_pytest(bare_python, "tests/test_attention.py", REQUIRE_COMPARISON="1")
    assert process.returncode == 4
    assert "pip install -r comparison/requirements.txt" in process.stderr
    recipes = [line for line in read("Makefile").splitlines() if "-m pytest" in line]
    assert recipes and all("REQUIRE_COMPARISON=1" in line for line in recipes)
