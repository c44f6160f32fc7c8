"""Answers files, as the original writes them: one JSON object a line, in the order of the questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.errors import UserError


@dataclass(frozen=True)
class Answer:
    """A line of an answers file."""

    line: int
    """Its place among the file's lines that are not empty, from 0."""
    id: int | str
    """Its `question_id`, with the type that the file gives it."""
    prompt: str
    text: str
    fields: dict[str, Any]
    """The whole line."""


@dataclass(frozen=True)
class Answers:
    """An answers file."""

    path: Path
    rows: Sequence[Answer]
    broken: Sequence[int]
    """Numbers, from 1, of lines that are no answer: no JSON, or without `question_id` and `text`."""

    def whole(self) -> Sequence[Answer]:
        """All rows. Raises UserError when the file has broken lines."""
        if self.broken:
            others = f" (nor are {len(self.broken) - 1:,} more)" if len(self.broken) > 1 else ""
            raise UserError(
                f"--answers: line {self.broken[0]} of {self.path} is no answer{others}; "
                "write a JSON object with question_id and text, or take the line out"
            )
        return self.rows


def read_answers(path: Path) -> Answers:
    """The answers in the file `path`. Raises UserError when it cannot be read or holds none."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8: {error.reason}"
        raise UserError(f"--answers: {path} cannot be read ({reason}); give a file of one JSON object a line") from None
    rows: list[Answer] = []
    broken: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, text = row.get("prompt", ""), row["text"]
            if not isinstance(prompt, str) or not isinstance(text, str) or type(row["question_id"]) not in (int, str):
                raise TypeError
            (str(row["question_id"]) + prompt + text).encode()  # half a surrogate pair can be read, but written nowhere
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken.append(number)
            continue
        rows.append(Answer(len(rows) + len(broken), row["question_id"], prompt, text, row))
    if not rows:
        raise UserError(f"--answers: {path} holds no answer; write one JSON object with question_id and text a line")
    return Answers(path, rows, broken)
