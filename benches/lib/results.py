"""Rows of results as they lie on disk: JSON lines, appended as soon as they are measured."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benches.lib.world import SOURCES, code_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
CANNOT, OUT_OF_MEMORY = "cannot run here: ", "out of memory"
"""How the `void` of a row begins that says nothing against the code."""

NAMES = (
    "what",
    "check",
    "room",
    "kernel",
    "bucket",
    "size",
    "stage",
    "shape",
    "implementation",
    "variant",
    "toggle",
    "value",
    "lever",
    "pass",
)
"""Fields that tell rows of one file apart."""

Row = dict[str, Any]
Say = Callable[[str], None]


class Sheet:
    """The rows of one command: to the screen in words, and to a file where one is given.

    With `resume` each row names the code that made it, and `has` knows the rows that the same code has left in the file.
    """

    def __init__(
        self, path: Path | None = None, say: Say = lambda line: None, resume: bool = False, sources: Sequence[str] = SOURCES
    ) -> None:
        self.path, self.say, self.rows = path, say, []
        self.code = code_of(sources) if resume else None
        self.known: list[Row] = [] if path is None or not resume else [row for row in read(path) if row.get("code") == self.code]

    def add(self, row: Row, words: Callable[[Row], str] | None = None) -> None:
        """Keep one row more. `words` puts into words what it found, where it is not void."""
        self.rows.append(row)
        if words is not None:
            found = f"void, {row['void']}" if row.get("void") else words(row)
            self.say(": ".join(part for part in (named(row), found) if part))
        if self.path is not None:
            append(self.path, row if self.code is None else row | {"code": self.code})

    def has(self, **wanted: Any) -> bool:
        """Whether there is a row with these values already, from this command or an earlier one."""
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.known)


def named(row: Row) -> str:
    """What a row is about; a kernel's name begins with its room's."""
    return " ".join(str(row[key]) for key in NAMES if key in row and not (key == "room" and "kernel" in row))


def append(path: Path, row: Row) -> None:
    """Write one line more; the folder is made when it is not there, and a last line that a kill has cut is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    line = json.dumps(row, allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def mend(path: Path) -> None:
    """Drop a last line that a kill has cut."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def read(path: Path) -> list[Row]:
    """The whole lines of a file of rows; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def latest(path: Path, keys: Sequence[str]) -> list[Row]:
    """The rows of a file, of those that agree in `keys` the last one only, in the order in which each was first there."""
    return list({tuple(row[key] for key in keys): row for row in read(path)}.values())


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that are wrong or broke: void for a reason that is neither the machine nor its memory."""
    return [row for row in rows if row.get("void") and not row["void"].startswith((CANNOT, OUT_OF_MEMORY)) and not row.get("peer")]


def short_of_memory(row: Row) -> bool:
    """Whether a row is void for want of memory."""
    return (row["void"] or "").startswith(OUT_OF_MEMORY)


def finite(value: float | None) -> float | None:
    """`value`, or None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def first_line(text: object) -> str:
    """The first line of a message that has any, else nothing."""
    return next(iter(str(text).strip().splitlines()), "")
