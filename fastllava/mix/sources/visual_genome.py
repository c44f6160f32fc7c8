"""Visual Genome: descriptions of regions, image by image, and a file that says how large the images are and where they lie."""

from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.boxes import Box
from fastllava.mix.conversation import BadRow, Conversation
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.regions import Region, RegionRules, conversations_of, region_in
from fastllava.mix.rows import Row
from fastllava.mix.run import Run


class Files(Section):
    """The two files."""

    regions: FilePath = Field(description="region_descriptions.json")
    images: FilePath = Field(description="image_data.json")


class Rules(RegionRules):
    """How they become conversations."""

    per_image: int | None = Field(default=10, ge=1, description="at most so many regions of an image, drawn from all; null: all")


class Keys(SourceKeys):
    """Visual Genome."""

    format: Literal["visual_genome"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """One conversation an image, in the order of the regions' file."""
    rules, images = keys.rules, run.lookup()

    def keep(row: Row) -> None:
        image = fields.an_object(row.value)
        parts = urlsplit(fields.text(image, "url")).path.strip("/").split("/")
        if len(parts) < 2:
            raise BadRow("field", "'url' names no folder and file, such as .../VG_100K_2/51.jpg")
        images.put(fields.whole(image, "image_id"), ["/".join(parts[-2:]), fields.whole(image, "width"), fields.whole(image, "height")])

    def entry(row: Row) -> tuple[int, tuple[str, int, int], Row]:
        found = fields.an_object(row.value)
        # The first release calls it id; some copies image_id.
        image_id = fields.whole(found, "id" if "id" in found else "image_id")
        fields.items(found, "regions")
        image = images.take(image_id)
        if image is None:
            raise BadRow("no_size", f"image {image_id} is not in {keys.files.images}")
        return image_id, (image[0], image[1], image[2]), row

    for _ in run.json(keys.files.images, keep):
        pass
    for image_id, (path, width, height), row in run.json(keys.files.regions, entry):
        given = [Row(row.file, row.unit, row.number, f"region {n}", value) for n, value in enumerate(row.value["regions"])]

        def region(part: Row, width: int = width, height: int = height) -> Region:
            found = fields.an_object(part.value)
            left, top, wide, high = (fields.number(found, key) for key in ("x", "y", "width", "height"))
            phrase = fields.text(found, "phrase")
            if not phrase.strip():
                raise BadRow("empty", "'phrase' is empty")
            return Region(phrase, region_in(Box(left, top, left + wide, top + high), width, height, rules))

        regions = list(run.converted(given, region))
        if not regions:
            run.dropped.bad("no_pairs", row.where, f"image {image_id} has no usable region")
            continue
        taken = run.draw.some(regions, rules.per_image or len(regions), "per_image", image_id)
        run.dropped.by_rule("per_image", len(regions) - len(taken))
        yield from conversations_of(image_id, path, taken, rules, run)
