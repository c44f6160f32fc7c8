"""Text from outside as a terminal may get it: what would act on the terminal, or hide, is written out.

Everything that is said to a person passes here, whoever wrote it: records, ids, paths, file names, messages of libraries.
"""

import unicodedata

_KEPT = "\n\t"


def printable(text: str) -> str:
    """`text` with control characters, bidi overrides, half characters and invisible ones as escapes; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def quoted(text: str, longest: int = 80) -> str:
    """`text` in quotes and on one line; of a long one the beginning, and how long it is."""
    if len(text) <= longest:
        return repr(text)
    return f"{text[:longest]!r}... ({len(text):,} characters)"


def shortened(text: str, longest: int = 200) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
