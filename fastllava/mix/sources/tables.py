"""What the generic sources share: files in any form, and which column holds what."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from fastllava.console.printable import quoted
from fastllava.mix import fields
from fastllava.mix.conversation import BadRow
from fastllava.mix.keys import FileList, Section
from fastllava.mix.rows import Row


class TableFiles(Section):
    """Files of one's own."""

    rows: FileList = Field(description="JSON (an array, or one object a line), CSV, TSV or Parquet; or a list of such files")
    under: str | None = Field(default=None, description="the key under which the list lies, where a JSON file holds an object")


def image_of(row: Mapping[str, Any], column: str) -> str:
    """The path in the column. Raises BadRow, also where the picture itself lies there."""
    value = row.get(column)
    if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.get("bytes"):
        value = value["path"]
    if isinstance(value, (bytes, dict)):
        raise BadRow("field", f"{quoted(column)} holds the picture itself; save it to a file, and write that file's path")
    return fields.text(row, column)


def id_of(row: Mapping[str, Any], column: str | None, number: Row) -> str | int:
    """The id in the column; without one the row's number in its file."""
    return fields.name(row, column) if column else f"{number.file.stem}_{number.key}"
