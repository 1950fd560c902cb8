"""The rules of the house, as far as a machine can hold them: imports, sizes, requirements, tests without Lightning."""

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
SCRIPTS = [PROJECT / "train.py", PROJECT / "evaluate.py"]
FOLDERS = ["transformer_scratch", "comparison", "benchmarks", "tests", "docs", "exercises"]
ALL_FILES = [*SCRIPTS, *sorted(file for folder in FOLDERS for file in (PROJECT / folder).rglob("*.py"))]
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"}


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_imports_are_seen_wherever_they_stand(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import a.b as c\n\ndef f():\n    from d.e import g\n    if True:\n        import pytorch_lightning\n"
    )
    assert imported(file) == {"a", "d", "pytorch_lightning"}


@pytest.mark.parametrize("file", [*SCRIPTS, *PACKAGE], ids=lambda file: file.name)
def test_nothing_of_lightning_in_the_package_and_the_scripts(file):
    assert not imported(file) & LIGHTNING


def test_nothing_of_lightning_is_loaded_by_the_scripts():
    """Not by what they import, either."""
    code = "import sys, train, evaluate; print(*{name.split('.')[0] for name in sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "transformer_scratch" in process.stdout
    assert not set(process.stdout.split()) & (LIGHTNING | {"comparison"})


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: file.name)
def test_imports_go_one_way(file):
    """From the scripts to the package to torch; only the command line's file knows tyro."""
    assert not imported(file) & {"train", "evaluate", "comparison", "benchmarks", "tests", "docs", "exercises", "."}
    assert "tyro" not in imported(file) or file.name == "config.py"


@pytest.mark.parametrize("file", [*SCRIPTS, *PACKAGE], ids=lambda file: file.name)
def test_the_transformer_is_not_pytorchs(file):
    used = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert not {name for name in used if name.startswith("Transformer") and name != "Transformer"}
    assert "MultiheadAttention" not in used


def test_files_stay_short():
    lengths = {str(file.relative_to(PROJECT)): len(file.read_text().splitlines()) for file in ALL_FILES}
    assert len(lengths) > 30
    assert not {name: length for name, length in lengths.items() if length > 300}


def test_the_loop_is_read_in_one_sitting():
    text = (PROJECT / "train.py").read_text()
    assert len(text.splitlines()) <= 250
    (loop,) = [
        node for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == "epoch"
    ]  # fmt: skip
    assert loop.end_lineno - loop.lineno + 1 <= 120
    hidden_by_trainers = (
        "model.train()", ".to(device)", "with autocast", ".backward()", "unscale_", "clip_grad_norm_", "scaler.step",
        "scaler.update", "scheduler.step", "zero_grad", "wandb.log", "model.eval()", "save_state",
    )  # fmt: skip
    for step in hidden_by_trainers:
        assert step in ast.get_source_segment(text, loop), f"{step} stands in plain sight"


def test_the_table_of_faults_and_the_tests_name_each_other():
    """docs/reliability.md tells of every test in tests/reliability/, and of none that is not there."""
    told = set(re.findall(r"`(test_\w+)`", (PROJECT / "docs/reliability.md").read_text()))
    tests = {
        name: file
        for file in (PROJECT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert not told - tests.keys()
    assert not {name for name, file in tests.items() if file.parent.name == "reliability"} - told


@pytest.mark.parametrize(
    "file, names",
    [
        ("requirements.txt", {"torch", "wandb", "tyro", "tqdm", "pytest", "matplotlib"}),
        ("comparison/requirements.txt", {"pytorch-lightning"}),
    ],
)
def test_requirements_are_pinned_exactly(file, names):
    lines = [line.split("#")[0].strip() for line in (PROJECT / file).read_text().splitlines()]
    pins = dict(re.fullmatch(r"([\w-]+)==(\d+(?:\.\d+)+)", line).groups() for line in lines if line)
    assert pins.keys() >= names
    if file == "requirements.txt":
        assert pins.keys() == names and pins["torch"] == "2.13.0"


# ------------------------------------------------------------------------------- pytest with requirements.txt alone


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter that has everything installed here but Lightning."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    installed = [path for entry in sys.path if entry.endswith("site-packages") for path in Path(entry).iterdir()]
    for path in installed:
        if not path.name.lower().replace("-", "_").startswith(tuple(LIGHTNING)):
            (site_packages / path.name).symlink_to(path)
    return folder / "bin/python"


def run_pytest(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "REQUIRE_COMPARISON"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=kept | environment)


def test_without_lightning_its_tests_are_left_out_with_one_line(bare_python):
    process = run_pytest(bare_python, "--collect-only", "-m", "")
    assert process.returncode == 0, process.stdout[-3000:]
    assert process.stdout.count("the comparison with Lightning was left out") == 1
    assert "tests/test_comparison" not in process.stdout and "tests/test_attention.py" in process.stdout
    assert "skipped" not in process.stdout


def test_where_the_comparison_is_required_its_absence_is_an_error(bare_python):
    process = run_pytest(bare_python, "tests/test_attention.py", REQUIRE_COMPARISON="1")
    assert process.returncode == 4
    assert "pip install -r comparison/requirements.txt" in process.stderr
    makefile, ci = (PROJECT / "Makefile").read_text(), (PROJECT / ".ci/run").read_text()
    assert makefile.count("REQUIRE_COMPARISON=1 $(PYTHON) -m pytest") == 2 and "make test" in ci
