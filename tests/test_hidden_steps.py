"""Each tagged line of train.py is needed: without it something changes. A tag on an idle line would fail here."""

import re

import pytest
from conftest import PROJECT, TINY

from comparison.without import FLAGS, INSTEAD, ON_META, measure, tags, take_out

SOURCE = (PROJECT / "train.py").read_text()
QUICK = [*TINY, "--lr", "0.01", "--warmup-steps", "5", "--amp", "off", "--wandb", "disabled"]


# What has to be among the effects, in a training of twenty updates in two epochs.
EXPECTED = {
    "seeding": "losses differ from update 1 on",
    "model to the device": "stops after 0 batches: RuntimeError: ",
    "no gradients outside training": "MiB for a backward pass that never comes, instead of 0.0",
    "train mode": "losses differ from update 11 on",
    "a new order every epoch": "losses differ from update 11 on",
    "batch to the device": "stops after 0 batches: RuntimeError: ",
    "autocast": "losses differ from update 1 on",
    "backward": "losses differ from update 2 on",
    "accumulation": "20 updates instead of 6",
    "unscale before clipping": "losses differ from update 2 on",
    "clipping": "losses differ from update 2 on",
    "optimizer step": "losses differ from update 2 on",
    "scaler update": "stops after 2 batches: RuntimeError: unscale_() is being called after step()",
    "schedule": "losses differ from update 3 on",
    "zero_grad": "losses differ from update 3 on",
    "reading the loss only now and then": "the loop waits for the device 20 times instead of 2",
    "logging": "W&B gets 0 rows of updates instead of 2",
    "eval mode": "losses differ from update 11 on",
    "epoch mean": "train/loss_epoch",
    "validation": "val/loss_epoch",
    "the best k": "2 epoch files kept instead of 1",
    "a checkpoint to go on from": "--resume goes back to update 0, not 20",
    "the best weights, not the last": "test/loss_epoch",
}
# Two processes take longer to start than to train.
SLOW = {
    "gradients averaged over the processes": "losses differ from update 2 on",
    "no_sync": "the processes exchange gradients",
}
FASTER = {  # so that the last epoch is not the best one
    "the best weights, not the last": ["--lr", "8", "--max-epochs", "3", "--warmup-steps", "100"],
    "the best k": ["--lr", "1"],
}


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.mark.parametrize("tag", EXPECTED)
def test_what_a_line_is_for(tag, references):
    found, _ = measure(tag, SOURCE, [*QUICK, *FASTER.get(tag, [])], references)
    assert any(EXPECTED[tag] in effect for effect in found), found


@pytest.mark.slow
@pytest.mark.parametrize("tag", SLOW)
def test_what_a_line_is_for_on_two_processes(tag, references):
    found, _ = measure(tag, SOURCE, [*QUICK, "--batch-size", "16"], references)
    assert any(SLOW[tag] in effect for effect in found), found


def test_every_tag_is_measured_and_stands_once():
    assert sorted(tags(SOURCE)) == sorted({**EXPECTED, **SLOW})
    assert set(INSTEAD) | set(FLAGS) | ON_META <= set(tags(SOURCE))


def test_a_line_that_does_nothing_has_no_effect():
    source = SOURCE.replace(
        "        model.train()", "        pass  # [hidden: nothing]\n        model.train()"
    )
    assert measure("nothing", source, QUICK, {})[0] == []


def test_a_tag_that_is_missing_or_stands_twice_is_refused():
    with pytest.raises(ValueError, match="0 lines have the tag"):
        take_out(SOURCE, "no such tag")
    with pytest.raises(ValueError, match="2 lines have the tag"):
        take_out(SOURCE + "pass  # [hidden: seeding]\n", "seeding")
    assert re.search(r"^ {8}pass$", take_out(SOURCE, "train mode"), re.MULTILINE)
