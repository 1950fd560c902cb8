"""A file of pairs as a task: its tokens, its splits, what is chosen for it, how it is evaluated."""

import io
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from torch import nn

import evaluate as evaluate_script
import train as train_script
from transformer_scratch import output, text_pairs
from transformer_scratch.batches import BatchSampler, PairDataset, make_loader, make_loaders
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.config import check_batch_size, load_config
from transformer_scratch.errors import BadInput
from transformer_scratch.evaluation import Prediction
from transformer_scratch.model import Transformer
from transformer_scratch.processes import ALONE
from transformer_scratch.run_folder import read_metrics
from transformer_scratch.summary import print_start
from transformer_scratch.text_pairs import TextPairs, choose_holdout

CPU = torch.device("cpu")
TINY = ["--dim=8", "--num-layers=1", "--warmup-steps=0", "--wandb=disabled"]
Lines = list[tuple[str, str]]

# The files of the run that is evaluated. Spelling and sound: cut into characters, and at spaces.
TRAIN = [("kat", "K AE T"), ("kat", "K A T"), ("tak", "T AE K"), ("ak", "A K"), ("take", "T A K")]
VAL = [("ka", "K AE"), ("ka", "K A")]
# A trained source, and one with two unknown tokens, whose target has another.
TEST = [("tat", "T AE T"), ("tat", "T A T"), ("kat", "K AE T"), ("zatz", "Z A T")]
VOCABULARY = ["A", "AE", "K", "T", "a", "e", "k", "t"]
A, AE, K, T = range(4, 8)
START, END, PAD, UNKNOWN = range(4)


def write(name: str, lines: Lines) -> str:
    text = "".join(f"{source}\t{target}\n" for source, target in lines)
    Path(name).write_text(text, encoding="utf-8", newline="\n")
    return name


def load(*flags: object) -> tuple:
    """-> the settings, the task, and the reason for each choice."""
    return load_config([*TINY, *map(str, flags)])[:3]


def task_of(lines: Lines, *flags: object) -> TextPairs:
    return load("--pairs", write("pairs.tsv", lines), *flags)[1]


def three_files() -> list[str]:
    """Write the files above. -> the flags."""
    files = {"pairs": TRAIN, "val-pairs": VAL, "test-pairs": TEST}
    names = ("train.tsv", "val.tsv", "test.tsv")
    return [f"--{flag}={write(name, files[flag])}" for flag, name in zip(files, names, strict=True)]


def words(count: int, seed: int = 0) -> list[str]:
    """So many different words of two to six letters."""
    draw = random.Random(seed)
    found = {}
    while len(found) < count:
        found["".join(draw.choices("abcde", k=draw.randint(2, 6)))] = None
    return list(found)


def turned_round(count: int) -> Lines:
    return [(word, word[::-1]) for word in words(count)]


def sources(lines: Lines) -> set[str]:
    return {source for source, _ in lines}


# ------------------------------------------------------------------------------------------ tokens


def test_the_first_ids_are_start_end_padding_and_unknown_then_the_trained_tokens():
    task = load(*three_files())[1]
    assert (task.start_id, task.end_id, task.pad_id, task.unknown_id) == (0, 1, 2, 3)
    assert task.vocabulary == VOCABULARY and task.vocab_size == 12
    assert task.encode_source(("kate", "")) == [START, 10, 8, 11, 9, END]
    assert task.encode_target(("", "K AE T")) == [START, K, AE, T, END]
    assert task.tokens([0, 1, 2, 3, 4, 11]) == ["start", "end", "pad", "unknown", "A", "t"]


def test_a_token_of_both_columns_is_one_id():
    task = task_of([("ab", "ba"), ("bc", "cb")])
    assert task.vocabulary == ["a", "b", "c"]
    assert task.encode_source(("ab", ""))[1:3] == [4, 5] == task.encode_target(("", "ab"))[1:3]


def test_only_trained_lines_make_tokens():
    lines = [*turned_round(40), *((letter, f"a{letter}") for letter in "uvwxyz")]
    task = task_of(lines, "--holdout", 0.5)
    trained = {token for line in task.asked.train for field in line for token in field}
    assert task.vocabulary == sorted(trained)
    assert {token for line in lines for field in line for token in field} > trained


def test_an_unknown_token_of_a_source_is_the_unknown_id():
    task = load(*three_files())[1]
    assert task.encode_source(("zatz", "")) == [START, UNKNOWN, 8, 11, UNKNOWN, END]
    source = PairDataset(task, [("zatz", "A")]).source.ids.tolist()
    assert source == [START, UNKNOWN, 8, 11, UNKNOWN, END]


class Chain(nn.Module):
    """A model whose logits depend on the token before alone, so that a loss is soon added up."""

    pad_id = PAD

    def __init__(self, vocab_size: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(vocab_size, vocab_size, generator=generator)

    def forward(self, source, decoder_input, source_is_padded):
        return self.logits[decoder_input]

    def loss(self, sequence: list[int]) -> tuple[float, int]:
        """-> the sum of the losses of a sequence's known tokens, and their number."""
        log_probs = self.logits.log_softmax(dim=-1)
        pairs = [pair for pair in pairwise(sequence) if pair[1] != UNKNOWN]
        return -sum(float(log_probs[pair]) for pair in pairs), len(pairs)


def test_an_unknown_token_of_a_target_is_left_out_of_the_loss():
    """Of a batch with padding, of a split in two batches, and of evaluate.py's."""
    task = load(*three_files())[1]
    lines = [("zatz", "Z A T"), ("ak", "A"), ("ka", "Z Z"), ("kat", "K AE T")]
    model, data = Chain(task.vocab_size), PairDataset(task, lines)
    sequences = [
        [START, UNKNOWN, A, T, END],
        [START, A, END],
        [START, UNKNOWN, UNKNOWN, END],
        [START, K, AE, T, END],
    ]
    sums, counts = zip(*map(model.loss, sequences), strict=True)
    assert counts == (3, 2, 1, 4) and data.target_tokens.tolist() == [3, 2, 1, 4]

    loader = make_loader(BatchSampler(data, batch_size=3))
    first, second = loader
    assert (first.num_tokens, second.num_tokens) == (6, 4)
    assert first.decoder_input.tolist()[0] == sequences[0][:-1], "the model reads it all the same"
    loss = train_script.token_loss(model, first, PAD)
    assert float(loss) == pytest.approx(sum(sums[:3]) / 6)

    autocast = torch.amp.autocast("cpu", enabled=False)
    loss_sum, num_tokens, _ = train_script.evaluate(model, loader, autocast, CPU)
    assert num_tokens == 10 and float(loss_sum) == pytest.approx(sum(sums))
    assert evaluate_script.mean_loss(model, data, CPU) == pytest.approx(sum(sums) / 10)


def test_an_unknown_token_of_a_target_makes_every_answer_wrong():
    """Even one that holds the unknown id in that place."""
    task = load(*three_files())[1]
    pair = next(pair for pair in task.splits.test if pair[0] == "zatz")
    prediction = Prediction(pair, [UNKNOWN, A, T, END], task.answers(pair))
    assert not prediction.exact and prediction.edits == 1 and prediction.token_matches == 3
    known = next(pair for pair in task.splits.test if pair[0] == "tat")
    assert Prediction(known, [T, A, T, END], task.answers(known)).exact


def test_several_spaces_are_one_in_lines_and_in_questions():
    task = task_of([("a  b", "x"), ("a b", "y"), ("b   a", "x y")], "--holdout", 0)
    assert task.targets == {"a b": ["x", "y"], "b a": ["x y"]}
    assert task.question("  a    b ")[0] == "a b" and task.vocabulary == ["a", "b", "x", "y"]


def test_the_training_file_alone_says_how_columns_are_cut():
    val = [("k a", "KAE"), ("ka", "K")]
    flags = ["--pairs", write("train.tsv", TRAIN), "--val-pairs", write("val.tsv", val)]
    task = load(*flags, "--test-pairs", write("test.tsv", TEST))[1]
    assert [column.at_spaces for column in task.columns] == [False, True]
    assert task.encode_source(("k a", "")) == [START, 10, UNKNOWN, 8, END]
    assert "sources are cut into characters, targets at spaces" in task.description()["tokens"]


# ------------------------------------------------------------------------------------------ splits


def test_a_tenth_of_the_sources_is_held_out_half_and_half():
    lines = [
        (word, target) for word in words(60) for target in (word, word[::-1])[: 1 + (word > "c")]
    ]
    random.Random(0).shuffle(lines)  # the lines of a source do not stand together
    assert 60 < len(lines) < 120
    task = task_of(lines)
    train, val, test = map(sources, task.asked)
    assert (len(train), len(val), len(test)) == (54, 3, 3)
    assert not train & val and not train & test and not val & test
    assert train | val | test == sources(lines)
    assert Counter(chain(*task.asked)) == Counter(lines), "each with all of its lines"
    assert [len(data) for data in task.datasets()] == list(map(len, task.asked))
    splits = task.splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [54, 3, 3]
    assert task.training.holdout == 0.1 and not splits.nothing_held_out and not task.trained


def test_of_an_odd_number_the_test_gets_one_more():
    task = task_of(turned_round(30))
    assert (len(task.splits.val), len(task.splits.test)) == (1, 2)


def test_the_seed_decides_the_split():
    lines = turned_round(40)
    first, again = (task_of(lines, "--seed", 7).asked for _ in range(2))
    assert first == again
    held_out = {frozenset(sources(task_of(lines, "--seed", seed).asked.test)) for seed in range(6)}
    assert len(held_out) > 3


@pytest.mark.parametrize("num_sources", [20, 999, 99_999, 100_000, 100_001, 123_457, 10**7])
def test_at_most_10_000_sources_are_held_out(num_sources):
    holdout, reason = choose_holdout(None, num_sources)
    assert round(holdout * num_sources) == min(round(num_sources / 10), 10_000)
    assert ("at most 10,000" in reason) == (num_sources > 100_000)
    assert choose_holdout(0.5, num_sources)[0] == 0.5, "a share that is given has no limit"


@pytest.mark.parametrize(
    ("count", "flags", "reason"),
    [
        (30, ["--holdout", 0], "none, as asked"),
        (14, [], "none: 0.1 of 14 sources is too few for two splits"),
    ],
)
def test_where_nothing_is_held_out_all_share_all_lines(count, flags, reason):
    lines = [*turned_round(count), (words(count)[0], "another")]
    config, task, _ = load("--pairs", write("pairs.tsv", lines), *flags)
    assert config.holdout == 0 and task.splits.nothing_held_out
    assert all(Counter(part) == Counter(lines) for part in task.asked)
    assert [len(data) for data in task.datasets()] == [count + 1] * 3
    assert all(len(part) == count for part in (task.splits.val, task.splits.test))
    assert all(map(task.was_trained, task.splits.every()))
    assert reason in task.description()["held out"]


def test_with_the_two_other_files_the_first_is_trained_on_whole():
    config, task, _ = load(*three_files())
    assert config.holdout is None and task.num_samples == len(TRAIN)
    assert [sorted(part) for part in task.asked] == [sorted(TRAIN), sorted(VAL), sorted(TEST)]
    assert task.trained == {"kat"}
    seen = sources(filter(task.was_trained, task.splits.every()))
    assert seen == {"kat", "tak", "ak", "take"}


def test_a_trained_source_is_seen_even_where_it_is_not_among_those_asked(monkeypatch):
    """Of 40 trained sources 3 are asked, and the two files ask two trained ones as well."""
    monkeypatch.setattr(text_pairs, "NUM_TRAINED_ASKED", 3)
    lines = turned_round(41)
    flags = ["--pairs", write("train.tsv", lines[:40])]
    asked_anyway = sources(load(*flags, "--holdout", 0)[1].asked.train)
    first, second, *_ = [line for line in lines[:40] if line[0] not in asked_anyway]
    flags += ["--val-pairs", write("val.tsv", [first])]
    task = load(*flags, "--test-pairs", write("test.tsv", [second, lines[40]]))[1]
    assert sources(task.asked.train) == asked_anyway and len(asked_anyway) == 3
    seen = sources(filter(task.was_trained, task.splits.every()))
    assert seen == asked_anyway | sources([first, second]) and len(seen) == 5


# ------------------------------------------------------------------------------ samples of an epoch


def epochs(lines: Lines, *flags: object, count: int = 3) -> tuple[TextPairs, list[list[list[int]]]]:
    """-> the task, and for each epoch the samples of each batch."""
    config, task, _ = load("--pairs", write("pairs.tsv", lines), *flags)
    sampler = make_loaders(config, task, ALONE, CPU)[0].sampler
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append([indices.samples.tolist() for indices in sampler])
        assert len(found[-1]) == len(sampler)
    return task, found


def test_an_epoch_is_every_training_line_once_and_ends_with_a_smaller_batch():
    lines = [*turned_round(26), turned_round(1)[0], (words(1)[0], "abc")]  # one line stands twice
    task, found = epochs(lines, "--batch-size", 5, "--holdout", 0)
    assert task.num_samples == 28
    for batches in found:
        assert [len(batch) for batch in batches] == [5] * 5 + [3]
        assert sorted(chain(*batches)) == list(range(28))
    assert len({str(batches) for batches in found}) == 3, "in another order each time"
    data = task.datasets()[0]
    encoded = Counter(str(task.encode_target(line)) for line in lines)
    rows = data.target.padded(torch.arange(28), PAD).tolist()
    assert encoded == Counter(str([token for token in row if token != PAD]) for row in rows)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("over", range(12))
def test_the_last_batch_is_left_out_where_a_process_would_get_no_line(world_size, over):
    """Global batches of 12 lines; DDP needs every process in each."""
    data = PairDataset(task_of(turned_round(30)), turned_round(24 + over))
    share = {"shuffle": True, "keep_last": True, "world_size": world_size}
    ranks = [BatchSampler(data, 12 // world_size, rank=rank, **share) for rank in range(world_size)]
    batches = [[indices.samples.tolist() for indices in sampler] for sampler in ranks]
    seen = sorted(sample for rank in batches for batch in rank for sample in batch)
    left_out = over if over < world_size else 0
    assert len(seen) == len(set(seen)) == 24 + over - left_out
    assert {len(rank) for rank in batches} == {2 + (over >= world_size)} == {*map(len, ranks)}
    assert all(batch for rank in batches for batch in rank)


def test_fewer_training_lines_than_processes_are_refused():
    config, task, _ = load("--pairs", write("pairs.tsv", turned_round(2)))
    check_batch_size(config, task, 2)
    with pytest.raises(BadInput, match="2 training lines are too few for 3 processes"):
        check_batch_size(config, task, 3)
    assert task.defaults(SimpleNamespace(batch_size=None, accumulate=1), 3), "it is asked before"


def test_accumulated_batches_make_the_updates_of_the_large_batch(train):
    """29 lines: two updates of 12 and one of 5, whose batches have 4 and 1."""
    file = write("pairs.tsv", turned_round(29))
    flags = [*TINY, "--pairs", file, "--holdout", 0, "--dropout", 0, "--max-epochs", 2]
    runs = [
        read_metrics(train(*flags, "--batch-size", 12 // accumulate, "--accumulate", accumulate))
        for accumulate in (1, 3)
    ]
    one, other = ([row["train/loss_step"] for row in rows if "lr" in row] for rows in runs)
    assert len(one) == 6 and other == pytest.approx(one, rel=1e-4)
    whole, parts = (
        epochs(turned_round(29), "--holdout", 0, "--batch-size", size, "--accumulate", count)[1]
        for size, count in ((12, 1), (4, 3))
    )
    for large, small in zip(whole, parts, strict=True):
        assert [len(batch) for batch in small] == [4, 4, 4, 4, 4, 4, 4, 1]
        assert [list(chain(*small[i : i + 3])) for i in range(0, 8, 3)] == large


# ---------------------------------------------------------------------------------------- defaults


def printed(config, task: TextPairs, reasons: dict[str, str], capsys) -> dict[str, str]:
    """What train.py prints at the start, by its heading."""
    model = Transformer.from_config(config, task)
    run = SimpleNamespace(is_main=True, path="run", resumed=False)
    print_start(config, reasons, model, task, run, "disabled")
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_what_is_chosen_for_a_file_is_printed_with_its_reason(capsys):
    config, task, reasons = load("--pairs", write("pairs.tsv", turned_round(40)))
    chosen = (config.holdout, config.batch_size, config.max_epochs, config.seq_len)
    assert chosen == (0.1, 36, 3_000, 8)
    rows = printed(config, task, reasons, capsys)
    assert rows["data"] == (
        "pairs.tsv: 36 training lines, 36 sources; 2 validation and 2 test sources"
    )
    assert rows["tokens"].startswith("5 known; sources are cut into characters, targets into")
    assert rows["seq_len"] == "8 (the longest line and two)"
    assert rows["epochs"] == (
        "3000 (nearest to 3,000 updates) of 36 samples, 36 an update (all training lines)"
    )
    assert "0.1 of the sources, half for validation and half for the test" in rows["held"]


def test_what_is_given_for_a_file_is_taken_without_a_reason(capsys):
    file = write("pairs.tsv", turned_round(400))
    flags = ["--holdout=0.3", "--batch-size=20", "--max-epochs=7", "--seq-len=50"]
    config, task, reasons = load("--pairs", file, *flags)
    chosen = (config.holdout, config.batch_size, config.max_epochs, config.seq_len)
    assert chosen == (0.3, 20, 7, 50)
    assert (len(task.splits.val), len(task.splits.test), task.seq_len) == (60, 60, 50)
    rows = printed(config, task, reasons, capsys)
    assert rows["seq_len"] == "50"
    assert rows["epochs"] == "7 of 280 samples, 20 an update"
    assert load("--pairs", file)[0].batch_size == 128


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulate", "world_size"),
    [
        (260, None, 1, 1),
        (300, 7, 2, 1),
        (260, 1, 1, 1),
        (9, 4, 1, 2),  # one line is left over: it is no update
        (9, 4, 1, 1),
        (10, 4, 1, 2),
        (25, 4, 5, 2),
        (2, 1, 1, 1),
    ],
)
def test_the_number_of_epochs_comes_nearest_to_3_000_updates(
    count, batch_size, accumulate, world_size
):
    task = task_of(turned_round(count), "--holdout", 0)
    given = SimpleNamespace(batch_size=batch_size, accumulate=accumulate)
    chosen = {name: value for name, (value, _) in task.defaults(given, world_size).items()}
    sampler = BatchSampler(
        task.datasets()[0],
        batch_size or chosen["batch_size"],
        shuffle=True,
        accumulate=accumulate,
        world_size=world_size,
        keep_last=True,
    )
    updates = len(sampler.updates())
    best = min(range(1, 3_001), key=lambda epochs: abs(epochs * updates - 3_000))
    assert chosen["max_epochs"] == best


def test_more_than_3_000_updates_of_an_epoch_are_one_epoch(monkeypatch):
    task = task_of(turned_round(40), "--holdout", 0)
    monkeypatch.setattr(text_pairs.TextPairs, "num_samples", 7_000)
    given = SimpleNamespace(batch_size=1, accumulate=1)
    assert task.defaults(given, 1)["max_epochs"][0] == 1


# -------------------------------------------------------------------------------------- evaluation

FLAGS = [*TINY, "--max-epochs=2", "--batch-size=2", "--average=0.5", "--lr=0.01"]
# What the model is made to answer. The last two: cut off at --seq-len, and nothing at all.
ANSWERS = {
    "tat": [T, A, T, END],
    "kat": [K, A, T, END],
    "zatz": [UNKNOWN, A, T, END],
    "ka": [K, K, END],
    "tak": [T, AE, K, END],
    "ak": [A, K, K, K, K],
    "take": [END],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run, whose files are gone, and what it has printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = io.StringIO()
        patch.setattr("sys.stdout", output)
        train_script.main([*FLAGS, *three_files()])
    for file in folder.glob("*.tsv"):
        file.unlink()
    return next((folder / "runs").iterdir()), output.getvalue()


def evaluated(run: Path, *flags: object) -> dict:
    evaluate_script.main(["--run", str(run), "--no-pictures", *map(str, flags)])
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


def loss_by_hand(model: Transformer, lines: Lines) -> float:
    """The mean over the known target tokens of some lines, each line by itself."""
    ids = {token: number for number, token in enumerate(VOCABULARY, start=4)}
    losses = []
    for source, target in lines:
        question = [START, *(ids.get(token, UNKNOWN) for token in source), END]
        answer = [START, *(ids.get(token, UNKNOWN) for token in target.split()), END]
        with torch.no_grad():
            logits = model(torch.tensor([question]), torch.tensor([answer]))[0]
        log_probs = logits.log_softmax(dim=-1)
        losses += [
            -float(log_probs[place, token])
            for place, token in enumerate(answer[1:])
            if token != UNKNOWN
        ]
    return sum(losses) / len(losses)


def model_of(weights: dict) -> Transformer:
    model = Transformer(vocab_size=12, dim=8, num_layers=1, pad_id=PAD, max_len=6)
    model.load_state_dict(weights)
    return model.eval()


def test_the_folder_of_a_run_has_the_name_of_its_file_and_keeps_the_lines_that_are_asked(trained):
    run, _ = trained
    assert run.name == "train-head1-dim8-lr0.01"
    for name, lines in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        text = (run / "pairs" / f"{name}.tsv").read_text(encoding="utf-8")
        assert sorted(text.splitlines()) == sorted("\t".join(line) for line in lines)


def test_the_start_counts_what_is_unknown_and_what_is_trained_too(trained):
    assert (
        "validation: 0 tokens of sources, 0 of targets; "
        "test: 2 tokens of sources, 1 of targets\n"
        "warning      held out and trained, too: 0 validation sources, 1 test sources\n"
    ) in trained[1]


def test_the_losses_of_validation_and_test_are_token_means_over_their_lines(trained):
    run, _ = trained
    rows = read_metrics(run)
    for epoch, row in enumerate(row for row in rows if "val/loss_epoch" in row):
        model = model_of(load_checkpoint(run / f"epoch={epoch}.pt")["model"])
        assert row["val/loss_epoch"] == pytest.approx(loss_by_hand(model, VAL), rel=1e-5)
    best = model_of(load_checkpoint(run / "best.pt")["model"])
    assert rows[-1]["test/loss_epoch"] == pytest.approx(loss_by_hand(best, TEST), rel=1e-5)


def test_evaluation_json_of_a_file(trained, monkeypatch, capsys):
    """Counted by hand, from answers that are given. The files of pairs are gone."""
    run, _ = trained
    asked = []

    def answer(model, task, pairs, beam, length_penalty):
        asked.extend(source for source, _ in pairs)
        return [Prediction(pair, ANSWERS[pair[0]], task.answers(pair)) for pair in pairs]

    monkeypatch.setattr(evaluate_script, "predict", answer)
    result = evaluated(run)
    assert sorted(asked) == sorted(ANSWERS), "a source is asked once"

    rows = {row["source"]: row for row in result.pop("predictions")}
    right = {"tat", "tak"}
    expected = {
        "tat": ("T A T", ["T AE T", "T A T"]),
        "kat": ("K A T", ["K AE T"]),  # the other is a training line's
        "zatz": ("<unknown> A T", ["Z A T"]),
        "ka": ("K K", ["K AE", "K A"]),
        "tak": ("T AE K", ["T AE K"]),
        "ak": ("A K K K K", ["A K"]),
        "take": ("", ["T A K"]),
    }
    assert rows.keys() == expected.keys()
    for source, (prediction, targets) in expected.items():
        assert rows[source] == {
            "source": source,
            "prediction": prediction,
            "targets": rows[source]["targets"],
            "exact": source in right,
            "seen": source in ("kat", "tak", "ak", "take"),
        }
        assert sorted(rows[source]["targets"]) == sorted(targets)

    model = model_of(load_checkpoint(run / "best.pt")["model"])
    lines = {*TRAIN, *VAL, *TEST} - {("kat", "K A T")}
    assert result == {
        "beam": 1,
        "exact_match_seen": 1 / 4,
        "exact_match_unseen": 1 / 3,
        "exact_match_val": 0.0,
        "exact_match_test": 1 / 3,
        "token_accuracy": (4 + 3 + 3 + 2 + 4 + 2 + 0) / (4 + 4 + 4 + 3 + 4 + 3 + 4),
        "token_error_rate": 2 / 9,
        "loss": pytest.approx(loss_by_hand(model, sorted(lines)), rel=1e-5),
        "num_seen": 4,
        "num_unseen": 3,
    }
    out = capsys.readouterr().out
    assert "66.67% of the answers, 22.22% of the tokens (edits)" in out
    assert "zatz -> <unknown> A T (unseen; right: Z A T)" in out


def test_best_pt_holds_the_vocabulary_and_loads_as_plain_weights(trained):
    run, _ = trained
    for file in ("best.pt", "epoch=0.pt", "last.pt"):
        content = torch.load(run / file, weights_only=True)
        assert content["task"]["vocabulary"] == VOCABULARY


@pytest.mark.parametrize("average", [0.5, 0])
def test_checkpoint_last_is_judged_by_its_averaged_weights(trained, monkeypatch, average):
    run, _ = trained
    if not average:
        train_script.main([*FLAGS, *three_files(), "--average", "0", "--run-dir", "plain"])
        run = Path("plain")
    last = load_checkpoint(run / "last.pt")
    used = {}
    predict = evaluate_script.predict

    def record(model, *arguments, **options):
        used.update(model.state_dict())
        return predict(model, *arguments, **options)

    monkeypatch.setattr(evaluate_script, "predict", record)
    evaluate_script.main(["--run", str(run), "--checkpoint", "last", "--source", "kat"])

    def equal(weights: dict | None) -> bool:
        return weights is not None and all(used[name].equal(weights[name]) for name in weights)

    assert equal(last["averaged"]) == bool(average) and equal(last["model"]) == (not average)
    if average:
        newest = load_checkpoint(run / "epoch=1.pt")["model"]
        assert equal(newest), "which are also those that were validated"


def test_a_large_split_is_asked_in_part(monkeypatch, train):
    """3 sources in place of 1,000: after an epoch, and of those that are trained."""
    monkeypatch.setattr(text_pairs, "NUM_TRAINED_ASKED", 3)
    monkeypatch.setattr(text_pairs.TextPairs, "most_answers", 3)
    asked = []
    predict = train_script.predict

    def record(model, task, pairs):
        asked.append(pairs)
        return predict(model, task, pairs)

    monkeypatch.setattr(train_script, "predict", record)
    lines = [*turned_round(40), *((word, f"{word}a") for word in words(40))]
    run = train(*TINY, "--pairs", write("pairs.tsv", lines), "--holdout", 0.5, "--max-epochs", 1)
    assert [len(pairs) for pairs in asked] == [3, 3, 10]
    counts = [
        len(text_pairs.read_pairs(str(run / "pairs" / name), "--run").lines)
        for name in text_pairs.FILES
    ]
    assert counts == [6, 20, 20]
    result = evaluated(run)
    assert (result["num_seen"], result["num_unseen"]) == (3, 20)
    task = load("--pairs", "pairs.tsv", "--holdout", 0.5)[1]
    assert "after each epoch 3 of them are asked" in task.description()["validation"]
    assert asked[0] == task.splits.val[:3] and asked[1] == task.splits.train


def test_which_trained_sources_are_asked_is_up_to_the_seed(monkeypatch):
    monkeypatch.setattr(text_pairs, "NUM_TRAINED_ASKED", 3)
    asked = {
        frozenset(sources(task_of(turned_round(40), "--holdout", 0, "--seed", seed).asked.train))
        for seed in range(5)
    }
    assert len(asked) > 2 and {len(part) for part in asked} == {3}


@pytest.mark.parametrize("name", ["train.tsv", "val.tsv", "test.tsv"])
@pytest.mark.parametrize("change", ["another line", "another order", "gone"])
def test_changed_lines_in_the_folder_of_a_run_are_refused(trained, capsys, name, change):
    shutil.copytree(trained[0], "run")
    file = Path("run/pairs") / name
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if change == "gone":
        file.unlink()
    else:
        lines = [*lines, "ta\tT A\n"] if change == "another line" else lines[::-1]
        file.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        evaluated(Path("run"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    expected = f"run/pairs/{name} cannot be read" if change == "gone" else "run/pairs has other"
    assert expected in error


# ---------------------------------------------------------------------------------------- --source


def ask(run: Path, *texts: str) -> None:
    evaluate_script.main(["--run", str(run), "--source", *texts])


def give(monkeypatch, content: bytes) -> None:
    """Let it come from standard input."""
    monkeypatch.setattr(
        "sys.stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)
    )


def test_any_source_is_answered(trained, capsys):
    """A trained one, one never seen, one of unknown characters, one longer than --seq-len."""
    run, _ = trained
    texts = ["kat", "katkat", "\u4f60\u597d \U0001f600", "k" * 700]
    output.warned_of.clear()
    ask(run, *texts)
    printed = capsys.readouterr()
    assert printed.err == (
        "warning: never trained, and read as one unknown token: \u4f60 \u597d   \U0001f600 "
        "in '\u4f60\u597d \U0001f600'\n"
    )
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [row[0] for row in rows] == texts and {len(row) for row in rows} == {2}
    task = load(*three_files())[1]
    model = model_of(load_checkpoint(run / "best.pt")["model"])
    pairs = [task.question(text) for text in texts]
    answers = evaluate_script.predict(model, task, pairs)
    assert [row[1] for row in rows] == [task.text(answer.tokens) for answer in answers]
    assert not (run / "evaluation.json.tmp").exists()


def test_a_source_is_composed_like_the_lines(train, capsys):
    lines = [("caf\u00e9", "a"), ("th\u00e9", "b"), ("cafe", "c")]
    run = train(*TINY, "--pairs", write("pairs.tsv", lines), "--max-epochs", 1)
    capsys.readouterr()
    ask(run, "cafe\u0301", " caf\u00e9 ")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("caf\u00e9\t")
    task = load("--pairs", "pairs.tsv")[1]
    assert UNKNOWN not in task.encode_source(task.question("cafe\u0301"))


@pytest.mark.parametrize("text", ["", "  ", "\ufeff"])
def test_an_empty_source_is_refused(trained, capsys, text):
    with pytest.raises(SystemExit) as end:
        ask(trained[0], text)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err == "error: an empty --source cannot be answered\n"


def test_answers_that_get_lost_are_an_error(trained):
    run = trained[0].resolve()
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, PROJECT / "evaluate.py", "--run", run, "--source", "kat"],
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    assert done.returncode == 2
    assert done.stderr == "error: the output could not be written: No space left on device\n"


def test_sources_from_standard_input(trained, capsys, monkeypatch):
    """One a line, blank ones skipped, with a mark, with Windows line ends, without a last one."""
    monkeypatch.setattr(evaluate_script, "ANSWERS_AT_ONCE", 2)
    give(monkeypatch, "\ufeffkat\r\n\r\nk\u2028a\n  \nzz\ntak".encode())
    ask(trained[0], "-")
    rows = capsys.readouterr().out.split("\n")
    assert [row.split("\t")[0] for row in rows] == ["kat", "k\u2028a", "zz", "tak", ""]
    ask(trained[0], "kat")
    assert capsys.readouterr().out == f"{rows[0]}\n"


def test_without_standard_input_words_are_answered_and_a_dash_is_refused(
    trained, monkeypatch, capsys
):
    """As behind `<&-`, where Python has no sys.stdin."""
    run, _ = trained
    monkeypatch.setattr("sys.stdin", None)
    ask(run, "kat")
    assert capsys.readouterr().out.startswith("kat\t")
    with pytest.raises(SystemExit) as ended:
        ask(run, "-")
    assert ended.value.code == 2 and "standard input is closed" in capsys.readouterr().err


def test_a_source_without_a_value_is_no_evaluation(trained, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate_script.main(["--run", str(trained[0]), "--source"])
    assert end.value.code == 2 and "--source is empty" in capsys.readouterr().err


def test_standard_input_that_is_not_utf_8(trained, capsys, monkeypatch):
    give(monkeypatch, b"kat\n\xe9\n")
    with pytest.raises(SystemExit) as end:
        ask(trained[0], "-")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --source -: line 2 is not UTF-8\n"


def test_questions_of_digits(train, capsys, monkeypatch):
    run = train(*TINY, "--num-datas", 64, "--batch-size", 32, "--max-epochs", 1)
    capsys.readouterr()
    ask(run, "8 4", " 0  9 ")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("\t")[0] for row in rows] == ["8 4", "0 9"]
    give(monkeypatch, b"8 4\n\n0 9\n")
    ask(run, "-")
    assert capsys.readouterr().out.splitlines() == rows
    for text in ("8", "8 10", "a b", ""):
        with pytest.raises(SystemExit) as end:
            ask(run, text)
        assert end.value.code == 2
        assert f"error: {text!r} is not a question" in capsys.readouterr().err


def test_a_pair_of_digits_is_no_question_to_a_file(trained, capsys):
    with pytest.raises(SystemExit) as end:
        evaluated(trained[0], "--pair", 8, 4)
    assert end.value.code == 2
    assert "error: --pair is for digits" in capsys.readouterr().err


@pytest.mark.slow
def test_sources_through_the_real_script(trained, script):
    process = script("evaluate.py", "--run", trained[0], "--source", "kat", "zz")
    assert process.returncode == 0, process.stderr
    assert [row.split("\t")[0] for row in process.stdout.splitlines()] == ["kat", "zz"]
