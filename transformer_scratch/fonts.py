"""Lets a picture show any text: kana, phonemes, emoji, and characters that no font here has.

The tokens of a file of pairs can be anything. matplotlib's own font, DejaVu Sans, lacks many
scripts: it draws a box instead and warns of each. matplotlib also takes what stands between two $
for mathematics, and fails where that has no sense. So whatever comes from a task goes through
legible on its way into a picture, and save_pictures calls choose_fonts, which gives each text the
installed fonts that it needs. Most texts need none, and then no other font is even opened: there
may be hundreds of them.
"""

import unicodedata
from functools import cache

import transformer_scratch.own_matplotlib  # noqa: F401 - imports matplotlib, so it comes first

# isort: split
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

OWN = "DejaVu Sans"  # comes with matplotlib
WEIGHTS = range(300, 501)  # light to medium; 400 is regular
DOTTED_CIRCLE = "\u25cc"  # what an accent is written on where it stands alone


def legible(text: str, longest: int | None = None) -> str:
    """The text as a picture can show it, cut where it is wider than so many letters.

    What no font has, and what leaves no ink (a control character, a wide space), is shown as its
    code point, U+3042.
    """
    parts: list[str] = []
    for character in text:
        if character == " ":
            parts.append(" ")
        elif font_with(character) is None:
            parts.append(f" U+{ord(character):04X} ")
        elif is_mark(character) and (not parts or parts[-1].endswith(" ")):
            parts.append(DOTTED_CIRCLE + character)
        else:
            parts.append(character)
    shown = joined(parts)
    if longest is not None and width(shown) > longest:
        while parts and width(joined(parts)) >= longest:
            parts.pop()  # a code point is dropped as a whole
        shown = joined(parts) + "…"
    return shown.replace("$", r"\$")  # a $ of its own: no mathematics begins here


def joined(parts: list[str]) -> str:
    """With one space where there are several."""
    return " ".join("".join(parts).split())


def is_mark(character: str) -> bool:
    """Whether it stands on the character before it, as an accent does."""
    return unicodedata.category(character).startswith("M")


def width(text: str) -> int:
    """In letters: a mark takes no room, a Chinese character that of two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(is_mark, text))


@cache
def characters(file: str) -> frozenset[int]:
    """The code points that a font file has glyphs for: none where it cannot be read."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except Exception:  # removed or damaged since matplotlib made its list
        return frozenset()


@cache
def font_with(character: str) -> str | None:
    """The name of a font that shows the character. None: no font does, or it leaves no ink."""
    if not character.isprintable():
        return None
    own = findfont(OWN)
    if ord(character) in characters(own):
        return OWN if has_ink(own, character) else None
    for font in fontManager.ttflist:
        if (
            "lastresort" not in font.name.lower().replace(" ", "")  # its glyphs are boxes
            # Texts are upright and not bold. So only a few of each family's files are read.
            and font.style == "normal"
            and font.weight in WEIGHTS
            and ord(character) in characters(font.fname)
            and has_ink(font.fname, character)
            # A text asks for a family, and of its files gets this one: another may have less.
            and findfont(font.name) == font.fname
        ):
            return font.name
    return None


def has_ink(file: str, character: str) -> bool:
    """Whether one sees anything: a font of coloured emoji has glyphs without an outline."""
    try:
        return FT2Font(file).load_char(ord(character)).width > 0
    except Exception:
        return False


def choose_fonts(figure: Figure) -> None:
    """Give each text, after the font that it has, those with the characters which that one lacks.

    For each glyph, matplotlib takes the first font that has it.
    """
    for text in figure.findobj(Text):
        names = dict.fromkeys(map(font_with, text.get_text()))
        if others := [name for name in names if name not in (OWN, None)]:
            text.set_fontfamily([*text.get_fontfamily(), *others])
