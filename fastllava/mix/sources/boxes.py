"""Boxes with phrases from a table of one's own: a row each, turned into questions for descriptions and for places."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.boxes import Box
from fastllava.mix.conversation import BadRow, Conversation
from fastllava.mix.keys import Section, SourceKeys
from fastllava.mix.regions import Region, RegionRules, conversations_of, region_in
from fastllava.mix.rows import Row
from fastllava.mix.run import Run
from fastllava.mix.sources.tables import TableFiles, image_of


class Columns(Section):
    """The names of the columns."""

    image: str = Field(default="image", description="path of the image")
    phrase: str = Field(default="phrase", description="what the box shows")
    box: str = Field(default="box", description="a list of four numbers, as rules.box says")
    width: str | None = Field(default=None, description="width of the image in pixels; the image file is asked when left out")
    height: str | None = Field(default=None, description="height of the image in pixels; the image file is asked when left out")


class Rules(RegionRules):
    """How they become conversations."""

    box: Literal["xywh", "xyxy", "xywh_shares", "xyxy_shares"] = Field(
        default="xywh", description="left, top and width, height or right, bottom; in pixels, or in shares of the image's width and height"
    )
    per_image: int | None = Field(default=None, ge=1, description="at most so many boxes of an image, drawn from all; null: all")
    fewer_than: int | None = Field(default=None, ge=2, description="cut into stretches of fewer pairs than this; null: not cut")


class Keys(SourceKeys):
    """Boxes from a table."""

    format: Literal["boxes"]
    files: TableFiles
    columns: Columns = Field(default_factory=Columns)
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order in which the images come first."""
    columns, rules, groups = keys.columns, keys.rules, run.groups()

    def region(row: Row) -> tuple[str, Region]:
        found = fields.an_object(row.value)
        image, phrase = image_of(found, columns.image, keys.files, run), fields.text(found, columns.phrase)
        if not phrase.strip():
            raise BadRow("empty", f"{columns.phrase!r} is empty")
        width, height = _size(found, columns, image, run.images)
        return image, Region(phrase, region_in(_box(found, columns.box, rules, width, height), width, height, rules))

    for image, each in run.table(keys.files.rows, region, keys.files.under):
        groups.add(image, each)
    for image, found in groups:
        taken = run.draw.some([Region(*each) for each in found], rules.per_image or len(found), "per_image", image)
        run.dropped.by_rule("per_image", len(found) - len(taken))
        yield from conversations_of(image, image, taken, rules, run, rules.fewer_than)


def _box(row: Mapping[str, Any], column: str, rules: Rules, width: int, height: int) -> Box:
    """The box in pixels. Raises BadRow."""
    given = row.get(column)
    if isinstance(given, str):
        # A cell of CSV.
        given = given.strip("[]() ").replace(",", " ").split()
    if not isinstance(given, list) or len(given) != 4:
        raise BadRow("field", f"{column!r} is {fields.kind(row.get(column))}; write a list of four numbers")
    left, top, third, fourth = (fields.number({column: value}, column) for value in given)
    if rules.box.endswith("_shares"):
        left, top, third, fourth = left * width, top * height, third * width, fourth * height
    return Box(left, top, third, fourth) if rules.box.startswith("xyxy") else Box(left, top, left + third, top + fourth)


def _size(row: Mapping[str, Any], columns: Columns, image: str, folder: Path | None) -> tuple[int, int]:
    """Width and height of the picture. Raises BadRow."""
    if columns.width is not None and columns.height is not None:
        return fields.whole(row, columns.width), fields.whole(row, columns.height)
    found = None if folder is None else _size_of(folder / image)
    if found is None:
        raise BadRow("no_size", f"no picture can be read at {image}; put it there, or name the columns of width and height")
    return found


@lru_cache(maxsize=4096)
def _size_of(path: Path) -> tuple[int, int] | None:
    """What the file's header says; None where there is no picture."""
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
            return image.size
    except Exception:
        return None
