"""The two forms of a short answer, held to the official code's recorded ones and, for everyone, to their rules one by one."""

import json
from pathlib import Path

import pytest

from fastllava.evaluate.vqa_text import evalai_form, vqa_form, vqa_trimmed


def test_both_forms_equal_the_official_ones(official: Path) -> None:
    """All recorded texts, in both forms."""
    rows = json.loads((official / "scorers" / "normalise" / "normalise.json").read_text(encoding="utf-8"))
    assert {row["raw"]: evalai_form(row["raw"]) for row in rows} == {row["raw"]: row["llava"] for row in rows}
    assert {row["raw"]: vqa_form(vqa_trimmed(row["raw"])) for row in rows} == {row["raw"]: row["vqa"] for row in rows}


@pytest.mark.parametrize(
    ("text", "evalai", "vqa"),
    [
        # White space, articles, numbers as words.
        ("  The\tcat\nand a dog ", "cat and dog", "cat and dog"),
        ("None", "0", "0"),
        ("ten of thirty-one", "10 of thirty 1", "10 of thirty 1"),
        ("a an the", "", ""),
        ("", "", ""),
        # Commas, question marks and possessives are where the forms differ.
        ("green,blue", "greenblue", "green blue"),
        ("green, blue", "green blue", "green blue"),
        ("12,500", "12500", "12500"),
        ("why?not", "whynot", "why not"),
        ("the cook's hat", "cook 's hat", "cook's hat"),
        ("it's", "it 's", "it's"),
        ("12,500 (about)-ish", "12500 about ish", "12500 aboutish"),
        # A mark with a space beside it anywhere goes everywhere; one without becomes a space.
        ("up-down", "up down", "up down"),
        ("up - down-left", "up downleft", "up downleft"),
        ("<i>up</i>", "i up i", "i up i"),
        ("50$ & 20% #2: ok", "50$ & 20% #2: ok", "50$ & 20% #2: ok"),
        # Periods stay before digits, of any script in one form and of 0 to 9 in the other; only 32 go.
        ("3.50", "3.50", "3.50"),
        ("p.m.", "pm", "pm"),
        (".\u0663", ".\u0663", "\u0663"),
        ("." * 34 + "x", "..x", "..x"),
        ("1\u0663,4", "1\u06634", "1\u0663 4"),
        # Contractions get the one apostrophe that they lack.
        ("dont", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("couldntve", "couldntve", "couldntve"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("ow'sat", "ow 'sat", "ow'sat"),
        ("'ow'sat", "'ow 'sat", "'ow's'at"),
        ("Im", "im", "im"),
        ("don\u2019t", "don\u2019t", "don\u2019t"),
        # Lower case of two Pythons.
        ("\u0130", "i\u0307", "i"),
        ("\u039f\u03a3", "\u03bf\u03c2", "\u03bf\u03c3"),
        ("\u180ered\u180eblue", "\u180ered\u180eblue", "red blue"),
    ],
)
def test_rules(text: str, evalai: str, vqa: str) -> None:
    """What each form makes of a text that shows one rule; held to the official rules under Python 3.11 and 2.7."""
    assert evalai_form(text) == evalai
    assert vqa_form(vqa_trimmed(text)) == vqa


def test_text_is_put_on_one_line_in_any_case() -> None:
    """What the VQA evaluation does before it looks whether all labels are the same."""
    assert vqa_trimmed(" \u180e\x0b a\tb\nC \u180e ") == "a b C"
