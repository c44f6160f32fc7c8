"""Tables between tabs as the original reads them, with pandas: some words are missing cells, and a column of digits is of numbers."""

import base64
import binascii
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.errors import UserError

MISSING = frozenset(("", "NA", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None")) | {
    f"{sign}1.#{word}" for sign in ("", "-") for word in ("IND", "QNAN")
}
"""Cells that pandas 2 takes for missing, quoted or not."""
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*|[+-]?(inf|infinity)", re.ASCII | re.IGNORECASE)
_BOOLEANS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_LARGEST_CELL = 2**30
"""Characters. Python's csv takes 131,072 unless told otherwise, and a picture in base64 has more."""


@dataclass(frozen=True)
class TableImage:
    """A picture that a table holds in base64, read from there when it is needed."""

    path: Path
    start: int
    """Where its row begins in the file, in bytes."""
    end: int
    column: int
    name: str
    """The row, for messages."""

    def read(self) -> bytes:
        """The bytes of the image file. Raises UserError when the cell holds none."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.end - self.start).decode("utf-8")
        cells = next(csv.reader(text.splitlines(keepends=True), delimiter="\t"))
        cell = cells[self.column] if self.column < len(cells) else ""
        try:
            return base64.b64decode("" if cell in MISSING else cell) or self._none()
        except binascii.Error:
            return self._none()

    def __str__(self) -> str:
        return f"{self.name} of {self.path}"

    def _none(self) -> bytes:
        raise UserError(f"{self.path}: {self.name} has no picture in base64; get the file again from where it came")


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    """Its place, for messages."""
    cells: dict[str, str]
    """Texts as the file has them, by column, without the picture; columns that the row lacks are empty."""
    image: TableImage | None

    def text(self, column: str) -> str | None:
        """The text of a cell; None when pandas takes it for missing."""
        cell = self.cells.get(column, "")
        return None if cell in MISSING else cell


@dataclass(frozen=True)
class Table:
    """A table without its pictures."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Row]

    def column(self, name: str) -> list[Any]:
        """A column as pandas makes it: all integers, all numbers or all truth values where every cell is one, None where one is missing."""
        cells = [row.text(name) for row in self.rows]
        there = [cell for cell in cells if cell is not None]
        if there and len(there) == len(cells) and all(_INTEGER.fullmatch(cell) and abs(int(cell)) < 2**63 for cell in there):
            return [int(cell) for cell in there]
        if there and all(_NUMBER.fullmatch(cell) for cell in there):
            return [None if cell is None else float(cell) for cell in cells]
        if there and all(cell in _BOOLEANS for cell in there):
            return [None if cell is None else _BOOLEANS[cell] for cell in cells]
        return cells


def read_table(path: Path, image: str = "image") -> Table:
    """The table in `path`, whose first row names the columns. Pictures in the column `image` stay in the file. Raises UserError."""
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
    try:
        records = _records(path)
        _, _, columns = next(records, (0, 0, [""]))
        at = columns.index(image) if image in columns else None
        rows = []
        for start, end, cells in records:
            name = f"row {len(rows) + 1}"
            if len(cells) > len(columns):
                raise UserError(f"{path}: {name} has {len(cells)} cells for {len(columns)} columns; get the file again from where it came")
            kept = dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))
            kept.pop(image, None)
            rows.append(Row(name, kept, None if at is None else TableImage(path, start, end, at, name)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} cannot be read as a table between tabs ({reason}); get it again from where it came") from None
    return Table(path, columns, rows)


def _records(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """The records of the file with the bytes at which each begins and ends, one in memory at a time. Empty lines are passed over."""
    at, ended = 0, False

    def lines() -> Iterator[str]:
        nonlocal at, ended
        for line in file:
            first, at = not at, at + len(line)
            yield line.decode("utf-8-sig" if first else "utf-8")
        ended = True

    with path.open("rb") as file:
        reader = csv.reader(lines(), delimiter="\t")
        start = 0
        for cells in reader:
            if ended:
                raise csv.Error("a quotation mark is opened and never closed")
            if len(cells) > 1 or (cells and cells[0].strip(" ")):
                yield start, at, cells
            start = at
