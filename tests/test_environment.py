"""What surrounds a program does not reach its results: settings of matplotlib, the locale, a folder
that cannot be written."""

import ast
import errno
import io
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY

import evaluate
import train as train_script
from benchmarks import decoding
from benchmarks.lib.measure import Timing
from transformer_scratch import plots

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--max-epochs", "3", "--lr", "0.02", "--wandb", "disabled"]
    train_script.main([*TINY, *flags, "--run-dir", str(run)])
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run of three epochs, to be evaluated."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def usual(trained, tmp_path_factory) -> dict[str, bytes]:
    """The pictures of an evaluation in the usual surroundings."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("usual") / "run"))
    evaluate.main(["--run", str(run)])
    return pictures(run)


def pictures(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "pictures").iterdir()}


def loss_by_epoch(run: Path) -> dict[int, float]:
    rows = plots.read_metrics(run)
    return {row["epoch"]: row["val/loss_epoch"] for row in rows if "val/loss_epoch" in row}


# -------------------------------------------------------------------- the settings of matplotlib

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
NO_SUCH_BACKEND = {"MPLBACKEND": "no-such-backend"}
NOT_UTF8 = "# réglages".encode("latin-1")
FULL_OF_MISTAKES = b"backend: no-such-backend\ntext.usetex: perhaps\nno_such_name: 1\nno colon"
UNUSUAL = b"""
savefig.format: pdf
savefig.bbox: tight
savefig.dpi: 20
figure.figsize: 1, 1
font.family: No Such Font
axes.facecolor: red
path.sketch: 1, 100, 2
"""
KNOWS_NO_HOME = "import pwd; pwd.getpwuid = {}.__getitem__; "  # nor does the system's list of users


@slow
def test_evaluation_from_a_notebook_of_a_user_who_likes_tex(script, run):
    """A notebook hands its backend on to the commands it starts, where it need not exist."""
    Path("matplotlibrc").write_text("text.usetex: True", encoding="utf-8")
    process = script("evaluate.py", "--run", run, **NOTEBOOK)
    assert (process.returncode, process.stderr) == (0, "")
    names = "answers attention_cross attention_self positions masks curves schedule"
    assert pictures(run).keys() == {f"{name}.png" for name in names.split()}


@slow
@pytest.mark.parametrize(
    ("environment", "file", "text"),
    [
        (NOTEBOOK, "set/matplotlibrc", b"text.usetex: True"),
        (NO_SUCH_BACKEND, "set/matplotlibrc", UNUSUAL),
        ({"MPLBACKEND": "module://no.such"}, "matplotlibrc", UNUSUAL),
        ({}, "set/matplotlibrc", FULL_OF_MISTAKES),
        ({}, "set/matplotlibrc", NOT_UTF8),
        ({}, "matplotlibrc", NOT_UTF8),
        ({}, "set/stylelib/my.mplstyle", NOT_UTF8),
        ({"MPLCONFIGDIR": "/dev/null/set"}, "unused", b""),
        ({"HOME": "/dev/null", "MPLCONFIGDIR": ""}, "unused", b""),
    ],
)
def test_pictures_are_the_same_whatever_the_user_has_set(
    script, usual, run, environment, file, text
):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(text)
    process = script("evaluate.py", "--run", run, **{"MPLCONFIGDIR": "set"} | environment)
    assert (process.returncode, process.stderr) == (0, "")
    assert pictures(run) == usual


@slow
def test_pictures_for_a_user_without_a_home_folder(usual, run):
    code = f"{KNOWS_NO_HOME} import evaluate; evaluate.main(['--run', {str(run)!r}])"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert pictures(run) == usual


@slow
def test_pictures_for_wandb_are_drawn_too(script):
    flags = ["--max-epochs", "1", "--run-dir", "run", "--wandb", "offline"]
    process = script("train.py", *TINY, *flags, **NOTEBOOK, WANDB_MODE="offline")
    assert process.returncode == 0 and "warning" not in process.stderr, process.stderr
    drawn = {file.name.split("_")[0] for file in Path("run/wandb").rglob("media/images/**/*.png")}
    assert drawn == {"answers", "attention"}


@slow
@pytest.mark.comparison
@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("comparison.train_lightning", "a backend"),
        ("comparison.train_lightning", "a home"),
        ("benchmarks.overhead", "a style"),
    ],
)
def test_lightning_can_be_imported(module, without):
    """It imports matplotlib, and all that the user has set with it."""
    code, environment = f"import {module}", {**os.environ, "PYTHONPATH": str(PROJECT)}
    if without == "a backend":
        environment |= NO_SUCH_BACKEND
    elif without == "a home":
        del environment["HOME"]
        code = KNOWS_NO_HOME + code
    else:
        Path("set/stylelib").mkdir(parents=True)
        Path("set/stylelib/my.mplstyle").write_bytes(NOT_UTF8)
        environment |= {"MPLCONFIGDIR": "set"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()


@slow
def test_what_a_notebook_has_set_is_neither_used_nor_changed(usual, run):
    from matplotlib import rc_context, rcParams

    odd = {
        "text.usetex": True,
        "figure.figsize": (1, 1),
        "savefig.dpi": 20,
        "savefig.bbox": "tight",
    }
    with rc_context(odd):
        before = dict(rcParams)
        evaluate.main(["--run", str(run)])
        assert dict(rcParams) == before
    assert pictures(run) == usual


@slow
def test_a_benchmark_draws_whatever_a_notebook_has_set(tmp_path):
    from matplotlib import rc_context

    sizes = []
    for settings in ({}, {"text.usetex": True, "savefig.bbox": "tight", "figure.dpi": 300}):
        with rc_context(settings):
            decoding.main(["--quick", "--output", str(tmp_path)])
        header = (tmp_path / "decoding.png").read_bytes()[:24]
        sizes.append((int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")))
    assert sizes == [(600, 360)] * 2


@slow
def test_the_backend_of_a_notebook_is_still_there_afterwards():
    """Whichever module imports matplotlib first."""
    Path("my_backend.py").write_bytes(b"from matplotlib.backends.backend_agg import *")
    code = (
        "import os; before = {**os.environ}; import transformer_scratch.own_matplotlib;"
        "assert os.environ == before;"
        "import matplotlib.pyplot; print(matplotlib.pyplot.get_backend())"
    )
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}."}
    backend = "module://my_backend"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"MPLBACKEND": backend, "MPLCONFIGDIR": "/dev/null/set"},
        capture_output=True,
        encoding="utf-8",
    )
    assert (process.stdout, process.stderr) == (f"{backend}\n", "")


# ------------------------------------------------------------------- a picture that is not drawn


def fails(*_: object) -> None:
    raise ZeroDivisionError("a picture\nwith a bug")


def test_it_costs_a_warning_and_the_others_are_drawn(run, monkeypatch, capsys):
    """A mistake in the code, damaged metrics, and something that is in the way."""
    monkeypatch.setattr(plots, "draw_masks", fails)
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    folder = run / "pictures"
    (folder / "answers.png").mkdir(parents=True)
    (folder / "masks.png").write_bytes(b"of an earlier evaluation")
    evaluate.main(["--run", str(run)])
    output = capsys.readouterr()
    taken, mistake, damaged = output.err.splitlines()
    assert taken == f"warning: no answers.png in {folder}: Is a directory"
    assert mistake == f"warning: no masks.png in {folder}: ZeroDivisionError: a picture with a bug"
    assert damaged.startswith(f"warning: no curves.png, schedule.png in {folder}: UnicodeDecode")
    drawn = {"attention_cross.png", "attention_self.png", "positions.png"}
    assert {file.name for file in folder.iterdir()} == drawn | {"answers.png"}
    assert output.out.splitlines()[-1] == f"next            look at {folder}/attention_cross.png"


def test_matplotlib_is_broken(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformer_scratch.plots", None)  # it cannot be imported
    evaluate.main(["--run", str(run)])
    assert (run / "evaluation.json").exists()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: no pictures: ModuleNotFoundError")


def test_a_benchmark_whose_picture_fails_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "draw", fails)
    decoding.main(["--quick", "--output", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["decoding.json"]
    assert "warning: no decoding.png" in capsys.readouterr().err


# -------------------------------------------------------------- a run that cannot be written to


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_run_that_cannot_be_written_is_evaluated(run, monkeypatch, capsys, number):
    """A read-only disk, somebody else's folder, a full disk, a full quota."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        patch.setattr(Path, "mkdir", fail)
        evaluate.main(["--run", str(run)])
    output = capsys.readouterr()
    assert "prediction  : " in output.out and "trained pairs   " in output.out
    assert "written" not in output.out and "look at" not in output.out
    first, second = output.err.splitlines()
    reason = os.strerror(number)
    assert first == f"warning: {run}/evaluation.json could not be written: {reason}"
    assert second.startswith("warning: no answers.png, ")
    assert second.endswith(f" in {run}/pictures: {reason}")
    assert not list(run.glob("*.tmp"))


def test_an_older_evaluation_stays_where_a_new_one_cannot_be_written(run, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (run / "evaluation.json").write_text("older", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        evaluate.main(["--run", str(run), "--no-pictures"])
    assert capsys.readouterr().err.startswith("warning: ")
    assert (run / "evaluation.json").read_text(encoding="utf-8") == "older"
    assert not list(run.glob("*.tmp"))


@pytest.mark.root
def test_a_folder_without_permission(run):
    """Root may write everywhere, so the right to do so is given up first."""
    run.chmod(0o555)
    command = ["setpriv", "--bounding-set=-dac_override", sys.executable]
    command += [str(PROJECT / "evaluate.py"), "--run", str(run)]
    process = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert process.returncode == 0 and "trained pairs" in process.stdout
    assert process.stderr.count("Permission denied") == process.stderr.count("\n") == 2


# ------------------------------------------------------------------- folders and files by name


@pytest.mark.parametrize(
    "flags",
    [
        ["--run=~/run"],
        ["--run=~/run", "--checkpoint", "last"],
        ["--checkpoint=~/run/epoch=1.pt"],
        ["--run", "~/elsewhere", "--checkpoint", "~/run/best.pt"],
    ],
)
def test_the_home_folder(run, monkeypatch, tmp_path, flags):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    evaluate.main([*flags, "--no-pictures"])
    folder = "elsewhere" if "~/elsewhere" in flags else "run"
    assert (tmp_path / folder / "evaluation.json").exists() and not Path("~").exists()


@pytest.mark.parametrize("flag", ["--run", "--checkpoint"])
def test_the_home_folder_of_nobody(flag, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([flag, "~no-such-user/run"])
    assert end.value.code == 2
    assert f"error: {flag} ~no-such-user/run: there is no such home" in capsys.readouterr().err


@pytest.mark.comparison
def test_the_home_folder_for_a_comparison(monkeypatch, tmp_path):
    from comparison.compare import new_folder

    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/new") == tmp_path / "new"


def test_the_best_of_the_others_takes_the_place_of_a_damaged_best(run, capsys):
    """Dates mean nothing: a copy of a folder has new ones, in any order."""
    losses = loss_by_epoch(run)
    by_loss = sorted(losses, key=losses.get)
    for newness, epoch in enumerate(by_loss):
        os.utime(run / f"epoch={epoch}.pt", (newness, newness))
    (run / "best.pt").write_bytes(b"damaged")
    evaluate.main(["--run", str(run), "--no-pictures"])
    assert f"checkpoint      {run}/epoch={by_loss[0]}.pt" in capsys.readouterr().out


@pytest.mark.comparison
def test_lightnings_newest_checkpoint_is_that_of_the_last_epoch(tmp_path):
    from comparison import compare, parity

    for file in ("plain/last.pt", "lightning/epoch=10.ckpt", "lightning/epoch=9.ckpt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        torch.save({Path(file).stem: 0}, tmp_path / file)
    os.utime(tmp_path / "lightning/epoch=10.ckpt", (1, 1))
    rows = compare.table(parity.Parity([(1.0, 1.0)], {}, (0, 0), True), tmp_path)
    assert rows[-1][2].startswith("epoch=10 ")


# ------------------------------------------------------------------------------------- the locale

OTHER_LOCALE = {  # of which Python has no UTF-8 mode; what is printed is Latin-1
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "latin-1",
}


def sources() -> list[Path]:
    folders = ("transformer_scratch", "comparison", "benchmarks", "exercises", "docs", "tests")
    return [
        *PROJECT.glob("*.py"),
        *(file for name in folders for file in (PROJECT / name).rglob("*.py")),
    ]


def uses_the_locale(call: ast.Call) -> bool:
    """Whether a text is read or written in the encoding of whoever happens to run this."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in options:
        return False
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile") and owner != "os":
        texts = [getattr(value, "value", None) for value in [*call.args, *options.values()]]
        return not any(isinstance(t, str) and "b" in t and set(t) <= set("rwaxb+") for t in texts)
    return name in ("read_text", "write_text", "TextIOWrapper", "popen", "getoutput") or not {
        "text",
        "universal_newlines",
    }.isdisjoint(options)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(file)", True),
        ("open(file, 'a')", True),
        ("path.open('w')", True),
        ("path.read_text()", True),
        ("subprocess.run(command, text=True)", True),
        ("open(file, 'rb')", False),
        ("open(file, 'w', encoding='utf-8')", False),
        ("os.open(file, os.O_RDONLY)", False),
        ("subprocess.run(command, capture_output=True)", False),
    ],
)
def test_what_the_next_test_finds(code, found):
    assert uses_the_locale(ast.parse(code, mode="eval").body) == found


def test_every_text_is_opened_as_utf_8():
    found = [
        f"{file.relative_to(PROJECT)}:{node.lineno}: {ast.unparse(node)}"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and uses_the_locale(node)
    ]
    assert not found


def printed_in(encoding: str, function: Callable, *arguments: object) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with redirect_stdout(stream):
        function(*arguments)
    return stream.buffer.getvalue().decode(encoding)


def test_the_table_of_hidden_steps_can_be_printed(monkeypatch):
    monkeypatch.delitem(sys.modules, "comparison.hidden_steps.table", raising=False)
    name = "comparison.hidden_steps.table"
    text = printed_in("latin-1", runpy.run_module, name, None, "__main__")
    assert r"train loss 0.19 \u2192 4.9" in text


def test_what_the_removal_of_a_line_does_can_be_printed(monkeypatch):
    from comparison.hidden_steps import remove_lines

    monkeypatch.setattr(remove_lines, "measure", lambda *_: ["train loss 1 → 2"])
    text = printed_in("latin-1", remove_lines.main, ["zero_grad"])
    assert r"train loss 1 \u2192 2" in text


@slow
@pytest.mark.comparison
def test_microseconds_can_be_printed(monkeypatch, tmp_path):
    from benchmarks import overhead

    timings = {name: Timing([1e-6]) for name in overhead.PROGRAMS}
    monkeypatch.setattr(overhead, "measure", lambda *_: (timings, timings))
    monkeypatch.setattr(overhead, "save_picture", lambda *_: None)
    text = printed_in("ascii", overhead.main, ["--quick", "--output", str(tmp_path)])
    assert r"\xb5s around the model" in text


@slow
def test_an_effect_in_two_processes_is_reported_whatever_they_have_printed(monkeypatch):
    """A message of the system is in the language and the encoding of its user."""
    from comparison.hidden_steps import observe

    message = "raise SystemExit(b'Datei fehlt: \\xfc'.decode('latin-1'))"
    Path("script.py").write_text(message, encoding="utf-8")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    monkeypatch.setattr(observe, "PROJECT", PROJECT)
    with pytest.raises(RuntimeError, match="Datei fehlt"):
        observe.observe_two_processes(Path("script.py").resolve(), ["--devices", "2"])


@slow
@pytest.mark.comparison
def test_the_page_of_a_comparison_is_utf_8(tmp_path):
    flags = ["--max-epochs", "1", "--wandb", "disabled", "--accelerator", "cpu"]
    command = [sys.executable, "-m", "comparison.compare", "--page", *TINY, *flags]
    for name, environment in (("usual", {}), ("other", OTHER_LOCALE)):
        process = subprocess.run(
            [*command, "--run-dir", str(tmp_path / name)],
            env={**os.environ, **environment, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
        )
        assert process.returncode == 0, process.stderr.decode(errors="replace")
    page = (tmp_path / "other" / "page.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "usual" / "page.html").read_text(encoding="utf-8")
    assert not page.isascii()
