"""The pictures of a run show what the model did, for every size of task; training never loads
matplotlib."""

import json
import subprocess
import sys
from itertools import groupby

import pytest
import torch
from conftest import PROJECT

import evaluate
from transformer_scratch import plots
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import Prediction
from transformer_scratch.model import Transformer

PICTURES = "answers attention_cross attention_self positions masks curves schedule"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(vocab_size=14, dim=16, num_heads=2, num_layers=2, pad_id=13).eval()


def answers_all_right_but(task: Digits, wrong: list) -> dict:
    """Predictions for every pair; the named ones stop at once."""
    targets = {pair: [*task.answer(pair), task.end_id] for pair in task.all_pairs()}
    return {
        pair: Prediction(pair, [task.end_id] if pair in wrong else target, [target])
        for pair, target in targets.items()
    }


def test_recorded_attention_is_what_the_modules_really_compute(model):
    recorded, outputs = plots.record_attention(model, [11, 8, 4, 12], [11, 8, 7]), {}
    layers = [
        (f"decoder.{i}.{kind}", getattr(block, kind))
        for i, block in enumerate(model.decoder)
        for kind in ("self_attention", "cross_attention")
    ]
    assert {name for name, _ in layers} < set(recorded)
    for name, module in layers:
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: (inputs, output)})
        )
    with torch.inference_mode():
        model(torch.tensor([[11, 8, 4, 12]]), torch.tensor([[11, 8, 7]]))
        for name, module in layers:
            (_, memory, *_), expected = outputs[name]
            value = module.split_heads(module.value(memory))
            heads = recorded[name].weights @ value[0]  # (H, T, K)
            torch.testing.assert_close(module.output(heads.transpose(0, 1).flatten(1)), expected[0])


def test_recording_leaves_the_model_as_it_was(model):
    plots.record_attention(model, [11, 8, 4, 12], [11])
    assert not any("attend" in vars(module) for module in model.modules())


def test_masks_in_the_picture_are_those_of_the_model(model):
    recorded = plots.record_attention(model, [11, 8, 4, 12, 13, 13], [11, 8, 7, 13])
    assert recorded["encoder.0.self_attention"].allowed.tolist() == [[True] * 4 + [False] * 2] * 6
    assert recorded["decoder.1.cross_attention"].allowed.tolist() == [[True] * 4 + [False] * 2] * 4
    assert recorded["decoder.0.self_attention"].allowed.equal(
        torch.ones(4, 4, dtype=torch.bool).tril()
    )


def test_grid_shows_right_wrong_and_held_out():
    task = Digits(holdout=0.2, seed=1)
    held_out, trained = task.splits.test[0], task.splits.train[0]
    figure = plots.draw_answers(task, answers_all_right_but(task, [held_out, trained]))
    grid = figure.axes[0].collections[0].get_array()
    assert (grid == 0).sum() == 79 and (grid == 1).sum() == 19
    assert grid[trained] == 2 and grid[held_out] == 3
    assert "right: 79 of 80 trained pairs, 19 of the 20 it has never seen" in figure.get_suptitle()


def test_a_square_of_the_grid_ends_at_its_edge(tmp_path):
    from matplotlib.image import imread  # not above, where it would come before own_matplotlib

    task = Digits(holdout=0.2)
    with plots.rc_context(plots.STYLE):
        figure = plots.draw_answers(task, answers_all_right_but(task, []))
        figure.savefig(tmp_path / "answers.png")
    pixels = imread(tmp_path / "answers.png")
    for last in range(10):  # down the middle of a column of squares
        across, low = figure.axes[0].transData.transform((last, 9.4)).round().astype(int)
        high = round(figure.axes[0].transData.transform((last, -0.4))[1])
        reds = pixels[len(pixels) - high : len(pixels) - low, across, 0]
        seen = ["blue" if red < 0.3 else "light" if red < 0.8 else "edge" for red in reds]
        squares = [name for name, _ in groupby(seen) if name != "edge"]
        assert squares == ["light" if task.was_trained((i, last)) else "blue" for i in range(10)]


@pytest.mark.parametrize(("digits", "holdout"), [(10, 0.0), (30, 0.2)])
def test_grid_of_other_tasks(digits, holdout):
    task = Digits(digits, digits + 6, holdout=holdout)
    figure = plots.draw_answers(task, answers_all_right_but(task, [(0, 1)]))
    assert figure.axes[0].collections[0].get_array().shape == (digits, digits)
    assert ("never seen" in figure.get_suptitle()) == bool(holdout)


def test_attention_maps_have_every_head_and_the_tokens_on_the_axes(model):
    task = Digits()
    answers = list(answers_all_right_but(task, []).values())
    drawings = plots.draw_run(model, task, answers, (8, 4))
    panels = drawings["attention_cross"]().axes[:4]
    assert [axes.get_title() for axes in panels] == [
        f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2)
    ]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["start", "8", "4", "end"]
    written = task.tokens(task.answers((8, 4))[0])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == written


def test_curves_and_schedule_show_the_numbers_of_the_run():
    rows = [{"step": 1, "train/loss_step": 2.5, "lr": 0.1, "grad_norm": 3.0}]
    rows += [{"step": 2, "train/loss_step": 2.0, "lr": 0.2, "grad_norm": None, "skipped": True}]
    rows += [{"step": 2, "train/loss_epoch": 2.2, "val/loss_epoch": 1.9, "val/exact_match": 0.5}]
    rows += [{"step": 2, "test/loss_epoch": 1.8, "test/exact_match": 0.25}]
    left, right = plots.draw_curves(rows, vocab_size=14).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2.5], [2, 2.0]]
    assert right.lines[1].get_xydata().tolist() == [[2, 0.25]]
    top, bottom = plots.draw_schedule(rows, clip_norm=1.0).axes
    assert top.lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert bottom.lines[0].get_xydata().tolist() == [[1, 3.0]]
    assert bottom.lines[2].get_xydata().tolist() == [[2, 1.0]]  # the skipped update


@pytest.mark.slow
def test_evaluate_draws_them_all_and_names_the_next_to_look_at(train, tiny, tmp_path, capsys):
    train(*tiny, "--max-epochs", "1", "--run-dir", "run")
    evaluate.main(["--run", "run"])
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.split() == ["next", "look", "at", "run/pictures/answers.png"]
    files = {file.stem: file for file in (tmp_path / "run" / "pictures").iterdir()}
    assert sorted(files) == sorted(PICTURES.split())
    for file in files.values():
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_a_line_of_metrics_that_a_kill_left_half_written_is_left_out(tmp_path):
    assert plots.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lr"', encoding="utf-8")
    assert plots.read_metrics(tmp_path) == [{"step": 1}]


def test_pictures_can_be_left_out(train, tiny, tmp_path):
    train(*tiny, "--max-epochs", "1", "--run-dir", "run", "--holdout", "0")
    evaluate.main(["--run", "run", "--no-pictures"])
    assert not (tmp_path / "run" / "pictures").exists()
    text = (tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(text)["exact_match_unseen"] is None


@pytest.mark.slow
def test_neither_script_loads_matplotlib_before_it_draws():
    code = "import sys, train, evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
