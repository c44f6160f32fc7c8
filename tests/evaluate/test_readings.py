"""What answers plainly say, which official rules take for something else at times."""

import pytest

from fastllava.evaluate.readings import option, yes_or_no

OPTIONS = {
    "A": "A",
    "b": "B",
    " C ": "C",
    "D.": "D",
    "(E)": "E",
    "A. a cat": "A",
    "B: x": "B",
    "The answer is C": "C",
    "the answer is (D).": "D",
}
NONE = ("", "F", "A cat", "Apple", "The answer is Apple")
SAID = {
    "Yes": "yes",
    "NO": "no",
    "No.": "no",
    "It is not": "no",
    "There isn't": "no",
    "Yes, but it is not clear": "yes",
    "The answer is yes": "yes",
}
NEITHER = ("", "Sure", "None", "Know", "Eyes")


@pytest.mark.parametrize(("text", "says"), [*OPTIONS.items(), *((text, None) for text in NONE)])
def test_options(text: str, says: str | None) -> None:
    """A letter by itself, with a point, colon or bracket behind it, or called the answer; no word that begins with one."""
    assert option(text) == says


@pytest.mark.parametrize(("text", "says"), [*SAID.items(), *((text, None) for text in NEITHER)])
def test_yes_or_no(text: str, says: str | None) -> None:
    """The first of the words yes, no and not."""
    assert yes_or_no(text) == says
