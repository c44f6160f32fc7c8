"""Regions of a picture, each a phrase and a box, to conversations."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import Field

from fastllava.mix.boxes import Box, box_text, on_padded_square, on_picture, within
from fastllava.mix.conversation import BadRow, Conversation
from fastllava.mix.keys import Section
from fastllava.mix.rules import Regions, joined, region_pair, segments
from fastllava.mix.run import Run


class RegionRules(Section):
    """What all sources of regions can choose."""

    regions: Regions = Field(
        default="random", description="describe: box to phrase; locate: phrase to box; random: one of the two for each region"
    )
    padded_square: bool = Field(
        default=True, description="boxes on the picture padded to a square, as stage 2 sees it; false: on the picture itself"
    )


class Region(NamedTuple):
    """What a part of the picture is called, and where it is as text."""

    phrase: str
    box: str


def region_in(box: Box, width: int, height: int, rules: RegionRules) -> str:
    """The box in pixels as the mix writes it; what lies outside the picture is cut off. Raises BadRow where nothing is left."""
    if width <= 0 or height <= 0:
        raise BadRow("no_size", f"the picture is {width} x {height}")
    inside = within(box, width, height)
    if inside is None:
        corners = ", ".join(f"{corner:g}" for corner in box)
        raise BadRow("box", f"[{corners}] (left, top, right, bottom) has no area in a picture of {width} x {height}")
    return box_text((on_padded_square if rules.padded_square else on_picture)(inside, width, height))


def conversations_of(
    image_id: str | int, image: str, regions: Sequence[Region], rules: RegionRules, run: Run, fewer_than: int | None = None
) -> Iterator[Conversation]:
    """The regions of an image as one conversation, or as stretches of fewer than `fewer_than` pairs."""
    pairs = [
        region_pair(joined([region.phrase]), region.box, rules.regions, run.draw, image, number) for number, region in enumerate(regions)
    ]
    parts = list(segments(pairs, fewer_than)) if fewer_than else [pairs]
    for number, part in enumerate(parts):
        yield Conversation(f"{image_id}_{number}" if number else image_id, image, list(part))
