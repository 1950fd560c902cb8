"""Each tagged line of train.py is needed: a training without it is seen to differ."""

import pytest
from conftest import PROJECT, TINY

from comparison.hidden_steps.observe import observe
from comparison.hidden_steps.remove_lines import FLAGS, INSTEAD, ON_META, measure, remove, tags

SOURCE = (PROJECT / "train.py").read_text(encoding="utf-8")
# Twenty updates in two epochs.
TRAINING = "--lr 0.01 --warmup-steps 5 --average 0 --amp off --wandb disabled"

# What must be among the effects.
QUICK = {
    "train mode": "losses differ from update 11 on",
    "clipping": "losses differ",
    "averaging": "val/loss_epoch",
    "zero_grad": "losses differ from update 3 on",
    "reading the loss only now and then": "the loop waits for the device 20 times instead of 2",
    "a checkpoint for resuming": "--resume goes back to update 0, not 20",
}
SLOW = {
    "seeding": "losses differ from update 1 on",
    "model to the device": "stops in batch 1: RuntimeError: ",
    "batch to the device": "stops in batch 1: RuntimeError: ",
    "gradients averaged over the processes": "losses differ from update 2 on",
    "no gradients outside training": "KiB for a backward pass that never comes, instead of 0",
    "a new order every epoch": "losses differ from update 11 on",
    "no_sync": "the processes exchange gradients 20 times instead of 6",
    "autocast": "losses differ from update 1 on",
    "backward": "losses differ from update 2 on",
    "accumulation": "20 updates instead of 6",
    "unscale before clipping": "losses differ",
    "optimizer step": "losses differ from update 2 on",
    "scaler update": "stops in batch 2: RuntimeError: unscale_() is being called after step()",
    "schedule": "losses differ from update 3 on",
    "logging": "W&B gets 0 rows of updates instead of 2",
    "eval mode": "losses differ from update 11 on",
    "epoch mean": "train/loss_epoch",
    "validation": "val/loss_epoch",
    "the best k": "2 epoch files are kept instead of 1",
    "the best weights, not the last": "test/loss_epoch",
}
OWN_FLAGS = {
    "gradients averaged over the processes": "--batch-size 16",
    "no_sync": "--batch-size 16",
    # The last epoch is not the best.
    "the best weights, not the last": "--lr 8 --max-epochs 3 --warmup-steps 100",
}


@pytest.fixture(scope="module")
def references() -> dict:
    """Trainings with all lines; those of the same flags run once."""
    return {}


@pytest.mark.parametrize(
    "tag", [*QUICK, *(pytest.param(tag, marks=pytest.mark.slow) for tag in SLOW)]
)
def test_a_training_without_the_line_differs(tag, references):
    found = measure(
        tag, SOURCE, [*TINY, *TRAINING.split(), *OWN_FLAGS.get(tag, "").split()], references
    )
    assert any({**QUICK, **SLOW}[tag] in effect for effect in found), found


def test_a_ctrl_c_is_heard_though_the_training_crashes_after_it():
    """On the stand-in for a GPU all do."""
    line = "    choose_kernels()\n"
    press = "    import os, signal\n    os.kill(os.getpid(), signal.SIGINT)\n"
    assert SOURCE.count(line) == 1
    with pytest.raises(KeyboardInterrupt):
        observe(SOURCE.replace(line, line + press), [*TINY, *TRAINING.split()], on_meta=True)


def test_a_line_that_does_nothing_has_no_effect(references):
    idle = "        pass  # [hidden: nothing]\n"
    source = SOURCE.replace("        model.train()", f"{idle}        model.train()")
    assert "[hidden: nothing]" in source
    assert measure("nothing", source, [*TINY, *TRAINING.split()], references) == []


def test_replacements_and_flags_are_for_tags_that_exist():
    assert INSTEAD.keys() | FLAGS.keys() | ON_META <= set(tags(SOURCE))


def test_train_py_is_still_a_program_without_any_of_the_lines():
    for tag in tags(SOURCE):
        compile(remove(SOURCE, tag), f"train.py without {tag}", "exec")


def test_one_line_is_removed_and_the_rest_stays():
    changed = remove(SOURCE, "train mode").splitlines()
    different = [(a, b) for a, b in zip(SOURCE.splitlines(), changed, strict=True) if a != b]
    assert [after for _, after in different] == ["        pass"]
    assert "model.train()" in different[0][0]


def test_a_tag_that_is_missing_or_there_twice_is_refused():
    with pytest.raises(ValueError, match="0 lines have the tag"):
        remove(SOURCE, "no such tag")
    with pytest.raises(ValueError, match="2 lines have the tag"):
        remove(SOURCE + "pass  # [hidden: seeding]\n", "seeding")
