"""Tags, table and page tell the truth; in a real browser the page lights up both sides."""

import importlib.util
import json
import math
import re
import socket
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

from comparison.hidden_steps import page, table
from comparison.hidden_steps.remove_lines import tags
from comparison.hidden_steps.table import HIDDEN, Hidden, line_of
from comparison.parity import Parity

pytestmark = pytest.mark.comparison
README = (PROJECT / "comparison/README.md").read_text(encoding="utf-8")
SOURCE = (PROJECT / "train.py").read_text(encoding="utf-8")


def example(folder: Path) -> Path:
    losses = [(3 * math.exp(-step / 80), 3 * math.exp(-step / 80)) for step in range(300)]
    parity = Parity(losses, {}, skipped=(0, 0), weights_equal=True)
    held = ", ".join(["averaged", "optimizer_states", "pytorch-lightning_version"] * 4)
    rows = [
        ("val/loss_epoch, epoch 0", "0.25", "0.75"),
        ("weights at the end", "", "equal"),
        ("in the checkpoint written last", held, held),
    ]
    return page.write_page(folder, parity, rows)


def test_every_tag_is_explained_in_the_order_of_the_loop():
    assert [step.tag for step in HIDDEN] == tags(SOURCE)


def test_the_readme_has_the_table_as_it_is_printed():
    assert table.table() in README


def test_lightning_has_the_functions_that_are_named():
    for step in HIDDEN:
        file, name = step.where.split(":")
        package, _, rest = file.partition("/")
        folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
        text = (folder / rest).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), step


def test_tests_that_the_readme_names_exist():
    tests = (PROJECT / "tests/test_comparison_parity.py").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", README)
    assert named and all(f"def {name}(" in tests for name in named)


def test_a_missing_tag_or_twin_line_is_noticed(monkeypatch):
    with pytest.raises(ValueError, match="no line with the tag"):
        line_of(SOURCE, "nothing")
    monkeypatch.setattr(page, "HIDDEN", [Hidden("seeding", "", "", "", "no such text")])
    with pytest.raises(ValueError, match="no line with 'no such text'"):
        page.twin_tags("a = 1\n")


def test_the_page_is_one_file_and_holds_all(tmp_path):
    html = example(tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://""", html)
    assert "max |loss difference| = 0.0, weights equal = True, steps = 300" in html
    assert "0.25" in html and "0.75" in html
    steps = json.loads(re.search(r"const steps = (\{.*\});", html).group(1))
    assert list(steps) == [step.tag for step in HIDDEN]
    assert all(all(step.values()) for step in steps.values())
    rows = re.findall(r'data-tags="([^"]+)"', html)
    assert {tag for row in rows for tag in row.split("|")} == set(steps)


def drawn(losses: list[tuple[float, float]]) -> dict:
    return page.curves(Parity(losses, {}, skipped=(0, 0), weights_equal=True))


def test_no_difference_is_drawn_against_the_smallest_there_could_be():
    losses = [(3.25, 3.25), (2.5, 2.5), (0.5, 0.5)]
    assert drawn(losses)["difference"] == "0.0,500.0 500.0,500.0 1000.0,500.0"
    next_number = torch.nextafter(torch.tensor(3.25), torch.tensor(4.0)).item()
    assert drawn(losses)["scale"] == f"{next_number - 3.25:.2g}" == "2.4e-07"


def test_a_difference_fills_its_drawing():
    curves = drawn([(3.0, 3.0), (2.0, 1.5), (1.0, 1.25)])
    assert curves["gap"] == 0.5
    assert curves["difference"] == "0.0,500.0 500.0,0.0 1000.0,750.0"


def test_a_loss_that_is_missing_is_left_out_and_counted():
    curves = drawn([(3.0, 3.0), (2.0, math.nan), (1.0, 1.0)])
    assert curves["not_drawn"] == 1
    assert curves["ours"] == "0.0,0.0 1000.0,666.7"
    assert drawn([(math.nan, math.nan)])["ours"] == ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, steered through its driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    for flag in [*flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver", port=port))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser, tmp_path):
    """The page, opened at the size of a projector. -> the browser."""
    resize(browser, 1600, 1000)
    browser.get(example(tmp_path).as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


LIT = """
const rows = document.querySelectorAll('#' + arguments[0] + ' .lit');
return [...rows].map(row => row.dataset.tags);
"""
IS_VISIBLE = """
const row = document.querySelector('#ours .lit').getBoundingClientRect();
const side = document.querySelector('#ours').getBoundingClientRect();
return row.top >= side.top && row.bottom <= side.bottom;
"""


def lit(browser, side: str) -> list[str]:
    return browser.execute_script(LIT, side)


@pytest.mark.browser
def test_a_click_lights_both_sides_and_explains(shown):
    buttons = shown.find_elements("css selector", ".tags button")
    assert [button.text for button in buttons] == [step.tag for step in HIDDEN]
    for button, step in zip(buttons, HIDDEN, strict=True):
        button.click()
        assert lit(shown, "ours") == [step.tag]
        theirs = lit(shown, "theirs")
        assert theirs and all(step.tag in row.split("|") for row in theirs)
        assert button.get_attribute("aria-pressed") == "true"
        explained = shown.find_element("id", "lightning").text
        assert explained == step.lightning.replace("`", "")
        assert shown.find_element("id", "without").text
        assert shown.execute_script(IS_VISIBLE), step.tag


ON_SCREEN = """
const free = document.querySelector('.explained').getBoundingClientRect().bottom;
return ['ours', 'theirs'].filter(side => {
  const row = document.querySelector('#' + side + ' .lit').getBoundingClientRect();
  return row.top >= free && row.bottom <= innerHeight;
});
"""


@pytest.mark.browser
def test_on_a_low_projector_a_click_brings_both_lines_onto_the_screen(shown):
    resize(shown, 1280, 600)
    for button in shown.find_elements("css selector", ".tags button"):
        button.click()
        assert shown.execute_script(ON_SCREEN) == ["ours", "theirs"], button.text


@pytest.mark.browser
def test_pointing_at_a_line_lights_the_other_side(shown):
    from selenium.webdriver import ActionChains

    row = shown.find_element("css selector", '#ours [data-tags="zero_grad"]')
    shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    ActionChains(shown).move_to_element_with_offset(row, -100, 0).perform()
    assert lit(shown, "ours") == ["zero_grad"]
    assert any("zero_grad" in row.split("|") for row in lit(shown, "theirs"))


@pytest.mark.browser
def test_the_keyboard_is_enough(shown):
    from selenium.webdriver import ActionChains, Keys

    for step in HIDDEN[:3]:
        ActionChains(shown).send_keys(Keys.TAB).perform()
        assert shown.switch_to.active_element.text == step.tag
        assert lit(shown, "ours") == [step.tag]
        outline = shown.switch_to.active_element.value_of_css_property("outline-style")
        assert outline == "solid"


BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


@pytest.mark.browser
def test_light_and_dark(shown):
    backgrounds = []
    for scheme in ("light", "dark"):
        shown.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        backgrounds.append(sum(map(int, re.findall(r"\d+", shown.execute_script(BACKGROUND))[:3])))
    assert backgrounds[0] > 650 > 200 > backgrounds[1]


def resize(browser, width: int, height: int, phone: bool = False) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.mark.browser
def test_on_a_phone_one_program_is_below_the_other(shown):
    resize(shown, 390, 844, phone=True)
    tops = [shown.find_element("id", side).rect["y"] for side in ("ours", "theirs")]
    assert tops[1] > tops[0] + 200
    shown.find_element("css selector", ".tags button").click()
    assert lit(shown, "ours") and lit(shown, "theirs")


SIZES = {"phone": (390, 844), "laptop": (1366, 768), "projector": (1920, 1080)}
# Of elements whose own text is wider than they are, the text.
CUT_OFF = """
const cells = [...document.querySelectorAll('p, th, td, dd, figcaption, .scale, .updates')];
return cells.filter(cell => cell.scrollWidth > cell.clientWidth).map(cell => cell.textContent);
"""
FONT_SIZES = """
const texts = document.querySelectorAll('p, dt, dd, button, pre, th, td, figcaption, figure span');
return [...texts].map(text => parseFloat(getComputedStyle(text).fontSize));
"""


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
def test_everything_can_be_read(shown, size):
    resize(shown, *SIZES[size], phone=size == "phone")
    width = shown.execute_script("return document.documentElement.scrollWidth")
    assert width <= SIZES[size][0]  # nothing to scroll sideways
    for button in shown.find_elements("css selector", ".tags button"):
        button.click()
        assert "`" not in shown.execute_script("return document.body.innerText")
        assert shown.execute_script(CUT_OFF) == []
    first_column = shown.find_element("css selector", "tbody th").size["width"]
    assert first_column >= min(0.35 * width, 250)
    assert min(shown.execute_script(FONT_SIZES)) >= 12
