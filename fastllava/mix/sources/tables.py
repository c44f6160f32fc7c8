"""What the generic sources share: files in any form, and which column holds what."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastllava.config.keys import MOST_IMAGES
from fastllava.console.printable import quoted
from fastllava.mix import fields
from fastllava.mix.conversation import BadRow
from fastllava.mix.keys import FileList, Section
from fastllava.mix.rows import Row
from fastllava.mix.run import Run


class TableFiles(Section):
    """Files of one's own."""

    rows: FileList = Field(description="JSON (an array, or one object a line), CSV, TSV or Parquet; or a list of such files")
    under: str | None = Field(default=None, description="the key under which the list lies, where a JSON file holds an object")
    pictures: Literal["refuse", "save"] = Field(
        default="refuse",
        description="pictures that lie in the rows, as in Parquet of Hugging Face: refused, or saved in the source's folder of images",
    )


_HEADS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def image_of(row: Mapping[str, Any], column: str, files: TableFiles, run: Run) -> str:
    """The path in the column; a picture that lies there itself is saved first, where the config says so. Raises BadRow."""
    value = row.get(column)
    if isinstance(value, dict):
        # The image of Hugging Face's tables: the bytes of a file, or its path.
        held = value.get("bytes")
        value = held if isinstance(held, bytes) else value.get("path") if held is None else value
    if not isinstance(value, bytes):
        return fields.text({column: value}, column) if column in row else fields.text(row, column)
    if files.pictures == "refuse":
        raise BadRow("field", f"{quoted(column)} holds the picture itself; write files.pictures: save, or its file's path in the column")
    return _saved(value, quoted(column), run.images)


def too_many(images: int, run: Run) -> BadRow:
    """What is wrong with an annotation of so many images, more than a record may show."""
    remedy = f"write max_images: {images}, and data.max_images for the training" if images <= MOST_IMAGES else "split it"
    return BadRow("max_images", f"names {images} images, and max_images allows {run.max_images}; {remedy}")


def _saved(data: bytes, what: str, folder: Path | None) -> str:
    """The name under which a picture has been saved in the folder, by its content. Raises BadRow, and OSError."""
    ending = next((ending for head, ending in _HEADS.items() if data.startswith(head)), None)
    if ending is None or folder is None:
        problem = "is no JPEG, PNG, WebP, GIF or BMP" if folder else "is a picture, and the mix names no images folder to save it in"
        raise BadRow("field", f"{what} {problem}")
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.{ending}"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial"
        partial.write_bytes(data)
        partial.rename(folder / name)
    return name


def id_of(row: Mapping[str, Any], column: str | None, number: Row) -> str | int:
    """The id in the column; without one the row's number in its file."""
    return fields.name(row, column) if column else f"{number.file.stem}_{number.key}"
