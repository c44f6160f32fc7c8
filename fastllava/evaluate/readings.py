"""What an answer plainly says, beside what an official rule takes it for: where they differ a score says by how much."""

import re
from collections.abc import Sequence

from fastllava.evaluate.matching import listed

_LETTER = re.compile(r"\s*(?:the answer is\s*)?\(?([a-e])(?:[.):,]|\s*$)", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\b(yes|no|not)\b|n['\u2019]t\b", re.IGNORECASE)


def option(text: str) -> str | None:
    """The option that `text` begins with or calls the answer: A of "A.", "(A)", "a" and "The answer is A"; None when there is none."""
    found = _LETTER.match(text)
    return None if found is None else found.group(1).upper()


def yes_or_no(text: str) -> str | None:
    """The first yes or no in `text`; None when there is none."""
    found = _YES_OR_NO.search(text)
    return None if found is None else "yes" if found.group().lower() == "yes" else "no"


def otherwise(answers: Sequence[tuple[object, str]], figure: str, official: float, plain: float) -> str:
    """The warning about `answers`, ids and texts, that the official rule does not take for what they say."""
    shown = [f"{name}: {text[:20]!r}" for name, text in answers]
    return (
        f"the official rule takes {listed(shown, 'answer')} for something else than they say: {figure} is {official:.4f} by the rule, "
        f"and {plain:.4f} by what they say"
    )
