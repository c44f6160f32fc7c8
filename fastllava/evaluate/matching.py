"""Which answer belongs to which question: by `question_id`, whatever its type and wherever its line stands."""

import re
from collections.abc import Iterable, Sequence

from fastllava.evaluate.answers import Answer

_INTEGER = re.compile(r"-?[0-9]{1,18}")


def key(question_id: object) -> int | str:
    """`question_id` in the form in which ids are compared: digits are a number, so 7 and "7" are one."""
    text = str(question_id)
    return int(text) if _INTEGER.fullmatch(text) else text


def latest(answers: Iterable[Answer]) -> dict[int | str, Answer]:
    """The answers by key; a later answer to the same question counts."""
    return {key(answer.id): answer for answer in answers}


def answered_twice(answers: Sequence[Answer]) -> list[int | str]:
    """Ids that have more than one answer, in order of their second one."""
    seen: set[int | str] = set()
    twice: dict[int | str, None] = {}
    for answer in answers:
        if key(answer.id) in seen:
            twice[answer.id] = None
        seen.add(key(answer.id))
    return list(twice)


def some(names: Sequence[object]) -> str:
    """Names for a message: the first three, and how many more there are."""
    shown = ", ".join(" ".join(str(name).split())[:60].encode("utf-8", "backslashreplace").decode() for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"


def listed(names: Sequence[object], noun: str) -> str:
    """How many there are of `noun`, and the first three: "2 questions (7, 9)"."""
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'} ({some(names)})"
