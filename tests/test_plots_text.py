"""Pictures of runs on a file of pairs: they count right, and show any text without a warning."""

import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager

import evaluate
from transformer_scratch import fonts, plots, plots_text
from transformer_scratch.evaluation import Prediction
from transformer_scratch.fonts import legible
from transformer_scratch.model import Transformer
from transformer_scratch.pair_file import Column
from transformer_scratch.plots_text import align, count_confusions, group_lengths
from transformer_scratch.text_pairs import Lines, TextPairs

DEJAVU, SERIF = findfont("DejaVu Sans"), findfont("DejaVu Serif")
HELD_OUT = [("ab", "x y"), ("abc", "x y z"), ("abc", "x q")]  # q: training has no such token
TRAINED = [("a", "x"), ("b", "y"), ("c", "z")]


def font(name: str, file: str, weight: int = 400) -> SimpleNamespace:
    """An entry of matplotlib's list."""
    return SimpleNamespace(name=name, fname=file, style="normal", weight=weight)


@pytest.fixture(autouse=True)
def only_dejavu(monkeypatch):
    """A machine without any other font. -> its fonts: add to them."""
    installed = [font("DejaVu Sans", DEJAVU)]
    monkeypatch.setattr(fonts, "fontManager", SimpleNamespace(ttflist=installed))
    fonts.font_with.cache_clear()
    yield installed
    fonts.font_with.cache_clear()


def task_of(trained: list, held_out: list, at_spaces: bool = False) -> TextPairs:
    """Targets are cut at spaces, sources into characters unless said otherwise."""
    columns = (Column(at_spaces), Column(True))
    tokens = {
        token
        for line in trained
        for column, field in zip(columns, line, strict=True)
        for token in column.split(field)
    }
    lines = [*trained, *held_out]
    seq_len = 2 + max(len(columns[side].split(line[side])) for line in lines for side in (0, 1))
    asked = held_out or trained
    return TextPairs(
        columns, sorted(tokens), seq_len, Lines(trained, asked, asked), set(), not held_out
    )


def answer_of(task: TextPairs, source: str, written: str | None = None) -> Prediction:
    """What a model might have said; not given: what is right."""
    pair = task.question(source)[0], task.targets[source][0]
    tokens = [*task.encode(1, pair[1] if written is None else written), task.end_id]
    return Prediction(pair, tokens, task.answers(pair))


def all_right(task: TextPairs) -> list[Prediction]:
    return [answer_of(task, source) for source in task.targets]


MISTAKES, ATTENTION = ["errors_by_length", "confusions"], ["attention_cross", "masks"]


def save(task: TextPairs, answers: list[Prediction], names: list[str], folder) -> None:
    """Save pictures of a run, with the last answer as the example; any warning is an error."""
    torch.manual_seed(0)
    model = Transformer(vocab_size=task.vocab_size, dim=8, num_heads=2, num_layers=1, pad_id=2)
    drawings = plots.draw_run(model.eval(), task, answers, answers[-1].pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = plots.save_pictures({name: drawings[name] for name in names}, folder)
    assert [file.stem for file in files] == names


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(fonts.Text) if text.get_text()]


# ------------------------------------------------------------------------------------- confusions


def test_confusions_are_those_of_a_case_worked_by_hand():
    task = task_of(TRAINED, HELD_OUT)
    answers = [
        answer_of(task, "a", "y"),  # trained: not counted in the picture
        answer_of(task, "ab", "x z y y"),  # z and one y too many
        answer_of(task, "abc", "y y z"),  # nearest is x y z: x became y
    ]
    expected = Counter({(None, "z"): 1, (None, "y"): 1, ("x", "y"): 1})
    assert count_confusions(task, answers[1:]) == expected
    assert count_confusions(task, answers) == expected + Counter({("x", "y"): 1})
    figure = plots_text.draw_confusions(task, answers)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1, 1, 1]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == ["added: y", "added: z", "x → y"]
    assert "3 mistakes in answers to 2 questions never seen" in figure.get_suptitle()


def test_a_token_that_training_has_not_is_counted_by_its_own_name():
    task = task_of(TRAINED, HELD_OUT)
    answers = [answer_of(task, "abc", "x")]  # nearest is x q: that q is missing
    assert count_confusions(task, answers) == Counter({("unknown: q", None): 1})
    assert count_confusions(task, [answer_of(task, "abc", "")]) == Counter(
        {("x", None): 1, ("unknown: q", None): 1}  # an empty answer
    )


def test_mistakes_counted_are_the_edits_of_the_token_error_rate():
    task = task_of(TRAINED, [("abcabc", "x y z x y z"), ("ca", "z x")])
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        length = int(torch.randint(9, (), generator=generator))
        written = " ".join("xyz"[i] for i in torch.randint(3, (length,), generator=generator))
        for source in ("abcabc", "ca"):
            answer = answer_of(task, source, written)
            assert count_confusions(task, [answer]).total() == answer.edits
            right = answer.nearest[:-1]
            pairs = align(right, answer.tokens[:-1])
            assert [i for i, _ in pairs if i is not None] == list(range(len(right)))
            assert [j for _, j in pairs if j is not None] == list(range(length))


def test_only_the_most_frequent_are_drawn():
    names = [f"t{number}" for number in range(30)]
    task = task_of([("a", " ".join(names))], [("aa", " ".join(names))])
    figure = plots_text.draw_confusions(task, [answer_of(task, "aa", "")])
    assert len(figure.axes[0].patches) == plots_text.MOST_CONFUSIONS
    assert figure.axes[0].get_title() == "the 20 most frequent of 30 kinds of mistakes"


# -------------------------------------------------------------------------------------- by length


def test_shares_by_length_are_counted_for_trained_and_unseen():
    task = task_of(TRAINED, HELD_OUT)
    right = [answer_of(task, source) for source in ("a", "b", "abc")]
    answers = [*right, answer_of(task, "c", "x"), answer_of(task, "ab", "y")]
    figure = plots_text.draw_errors_by_length(task, answers)
    top, bottom = figure.axes
    # Lengths 1, 2 and 3 in one group: only two are unseen, and only one length is trained.
    assert [bar.get_height() for bar in top.patches] == pytest.approx([2 / 3, 1 / 2])
    assert [bar.get_height() for bar in bottom.patches] == [3, 2]
    assert "2 of 3 trained, 1 of 2 never seen in training" in figure.get_suptitle()
    assert {"66%", "50%", "1–3"} <= {*texts(figure)}


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ([{7: 1}], [[7]]),
        ([{1: 30, 2: 30, 3: 4, 4: 4, 9: 5}], [[1], [2], [3, 4, 9]]),
        ([{1: 30, 2: 30, 3: 4}], [[1], [2, 3]]),  # what is left over joins its neighbour
        ([{1: 30, 2: 30}, {2: 3, 4: 1}], [[1, 2, 4]]),
    ],
)
def test_lengths_with_few_questions_are_grouped(counts, groups):
    assert group_lengths([Counter(count) for count in counts]) == groups


@pytest.mark.parametrize("each", [1, 10, 1_000])
def test_there_are_never_too_many_groups(each):
    groups = group_lengths([Counter(dict.fromkeys(range(1, 500), each))])
    assert len(groups) <= plots_text.MOST_GROUPS
    assert [length for group in groups for length in group] == list(range(1, 500))


# ------------------------------------------------------------------------------------ every case


@pytest.mark.parametrize(
    ("trained", "held_out", "written", "pictures"),
    [
        pytest.param(TRAINED, HELD_OUT, None, MISTAKES, id="no mistakes"),
        pytest.param(TRAINED, HELD_OUT, "", MISTAKES, id="empty answers"),
        pytest.param(TRAINED, HELD_OUT, "x q", MISTAKES, id="mistakes"),
        pytest.param(TRAINED, [], None, MISTAKES, id="nothing held out"),
        pytest.param(TRAINED, [], "z z", MISTAKES, id="nothing held out, mistakes"),
        pytest.param([("a", "x")], [], "", MISTAKES + ATTENTION, id="one question, one token"),
        pytest.param(
            TRAINED,
            [("a" * 60, "x " * 70)],
            "y " * 69,
            MISTAKES + ATTENTION,
            id="long",
            marks=pytest.mark.slow,
        ),
        pytest.param(TRAINED, [("z", "q")], "x", MISTAKES + ATTENTION, id="an unknown question"),
    ],
)
def test_pictures_of_runs_of_all_kinds(trained, held_out, written, pictures, tmp_path):
    task = task_of(trained, held_out)
    save(task, [answer_of(task, source, written) for source in task.targets], pictures, tmp_path)


def test_pictures_of_a_run_with_an_enormous_vocabulary(tmp_path):
    tokens = " ".join(map(str, range(50_000)))
    task = task_of([("a", tokens)], [("aa", "1 2"), ("ab", "5")])
    answers = [answer_of(task, "aa", "3 4"), answer_of(task, "ab", " ".join(tokens.split()[:99]))]
    save(task, answers, MISTAKES, tmp_path)


def test_without_a_mistake_the_picture_says_so():
    task = task_of(TRAINED, HELD_OUT)
    assert "None: every answer is right." in texts(
        plots_text.draw_confusions(task, all_right(task))
    )


def test_attention_pictures_name_the_tokens_of_the_text_known_or_not():
    task = task_of([("ab", "x")], [("aé", "x")])
    assert plots_text.source_tokens(task, ("aé", "x")) == ["start", "a", "unknown: é", "end"]
    model = Transformer(vocab_size=task.vocab_size, dim=8, num_heads=1, num_layers=1, pad_id=2)
    answers = all_right(task)
    figure = plots.draw_run(model.eval(), task, answers, ("aé", "x"))["attention_cross"]()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["start", "a", "unknown: é", "end"]
    assert figure.get_suptitle().endswith("\naé → x end")


# ------------------------------------------------------------------------------------------ fonts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ẽ̞ tɕː", "ẽ̞ tɕː"),
        ("あ", "U+3042"),
        ("aあいb い", "a U+3042 U+3044 b U+3044"),
        ("\u0303", "◌\u0303"),  # an accent alone
        ("a \u0303 b", "a ◌\u0303 b"),
        ("あ\u0303", "U+3042 ◌\u0303"),
        ("a\u0000\u001b\r\u2028b", "a U+0000 U+001B U+000D U+2028 b"),
        ("\u00a0\u3000\u200d\ufe0f\u2800", "U+00A0 U+3000 U+200D U+FE0F U+2800"),  # without ink
        ("\U000f0000\ue000", "U+F0000 U+E000"),  # private: every font means something else
        ("שלום", "שלום"),
        (r"\frac{a_1^2", r"\frac{a_1^2"),
        ("", ""),
    ],
)
def test_text_is_shown_as_far_as_there_are_glyphs(text, shown):
    assert legible(text) == shown


def test_long_text_is_cut_between_characters():
    assert legible("abcdef", 6) == "abcdef"
    assert legible("abcdefg", 6) == "abcde…"
    assert legible("abc def", 5) == "abc…"
    assert legible("ã" * 6, 6) == "ã" * 6  # accents take no room
    assert legible("aあいう", 12) == "a U+3042…"
    assert legible("$" * 9, 4) == r"\$\$\$…"


@pytest.mark.parametrize("text", ["$x_1$", r"\$", r"$\frac$", "$$$", r"a\$b$", "$^", "x_{1}^2"])
def test_mathematics_is_not_begun(text):
    axes = Figure().subplots()
    drawn, is_mathematics = axes.text(0, 0, legible(text))._preprocess_math(legible(text))
    assert drawn == text and not is_mathematics


WEIRD = ["あ", "😀", "\u0320", "$", "$x$", "_", "^", "\\", r"\frac{", "{", "\x07", "\x1b", "א", "%"]


@pytest.mark.slow
def test_tokens_of_all_kinds_break_no_picture(tmp_path, capsys):
    trained = [(" ".join(WEIRD), " ".join(WEIRD[::-1])), ("a", "U+3042 end start <pad>")]
    task = task_of(trained, [("a " + " ".join(WEIRD[:8]), " ".join(WEIRD))], at_spaces=True)
    answers = [answer_of(task, source, " ".join(WEIRD[4:] + WEIRD)) for source in task.targets]
    save(task, answers, [*MISTAKES, *ATTENTION, "attention_self"], tmp_path)
    assert capsys.readouterr().err == ""


@pytest.fixture
def kana_in_serif(only_dejavu, monkeypatch):
    """A font that claims to have あ, at the end of the list: after one that cannot be read."""
    only_dejavu.append(font("Gone", "/no/such/font.ttf"))
    only_dejavu.append(font("Last Resort", SERIF))
    only_dejavu.append(font("DejaVu Serif", SERIF, weight=700))
    only_dejavu.append(font("DejaVu Sans Mono", SERIF))  # a family for which another file is taken
    only_dejavu.append(font("DejaVu Serif", SERIF))
    read, opened = fonts.characters, []

    def characters(file: str) -> frozenset[int]:
        opened.append(file)
        return frozenset({ord("あ")}) if file == SERIF else read(file)

    monkeypatch.setattr(fonts, "characters", characters)
    return opened


def test_an_installed_font_is_taken_where_it_has_the_character(kana_in_serif):
    assert legible("あ い") == "あ U+3044"
    figure = Figure()
    plain, other = figure.text(0, 0, "a"), figure.text(0, 0, "aあ")
    before = plain.get_fontfamily()
    fonts.choose_fonts(figure)
    assert plain.get_fontfamily() == before  # for most texts nothing changes
    assert other.get_fontfamily() == [*before, "DejaVu Serif"]


def test_a_font_that_comes_with_matplotlib_is_found_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fonts, "fontManager", fontManager)
    assert fonts.font_with("𝒜") == "STIXGeneral"
    figure = Figure(layout="constrained")
    plots.label_tokens(figure.subplots(), ["𝒜", "あ"], ["a"], most=9)
    figure.suptitle(legible("𝒜 a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.save_pictures({"one": lambda: figure}, tmp_path)
    assert capsys.readouterr().err == ""


def test_the_tokens_of_the_axes_get_the_font_too(kana_in_serif, tmp_path):
    """Where axes make their labels anew, the font would be lost."""
    figure = Figure()
    plots.label_tokens(figure.subplots(), ["あ", "a"], ["あ", "a"], most=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no あ really
        plots.save_pictures({"one": lambda: figure}, tmp_path)
    axes = figure.axes[0]
    for label in (axes.get_xticklabels()[0], axes.get_yticklabels()[0]):
        assert label.get_text() == "あ" and label.get_fontfamily()[-1] == "DejaVu Serif"


def test_no_other_font_is_opened_where_dejavu_sans_has_all(kana_in_serif):
    legible("tɕã → x\n\ue000")  # what is not printable is not looked for
    assert {*kana_in_serif} == {DEJAVU}


def test_a_glyph_without_ink_is_none(kana_in_serif, monkeypatch):
    monkeypatch.setattr(fonts, "has_ink", lambda file, character: file != SERIF)
    assert legible("あ") == "U+3042"


@pytest.mark.slow
def test_evaluate_draws_the_pictures_of_a_file_without_a_word(train, tmp_path, capsys):
    Path("kana.tsv").write_text(
        "".join(f"{kana}$\tk ã̠ {kana}\n" for kana in "あいうえお"), encoding="utf-8"
    )
    train("--pairs=kana.tsv", "--dim=8", "--num-layers=1", "--max-epochs=1", "--run-dir=run")
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.main(["--run", "run"])
    names = "errors_by_length confusions attention_cross attention_self positions masks"
    captured = capsys.readouterr()
    assert captured.err == ""
    pictures = [f"{name}.png" for name in [*names.split(), "curves", "schedule"]]
    assert f"pictures        {', '.join(pictures)}\n" in captured.out
    assert {file.name for file in (tmp_path / "run/pictures").iterdir()} == {*pictures}
