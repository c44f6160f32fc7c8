"""RefCOCO, RefCOCO+ and RefCOCOg: phrases for objects of COCO, in a pickle, and the objects' boxes in instances.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastllava.errors import UserError
from fastllava.mix import fields
from fastllava.mix.boxes import Box
from fastllava.mix.conversation import BadRow, Conversation
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.pickles import read_plain_pickle
from fastllava.mix.regions import Region, RegionRules, conversations_of, region_in
from fastllava.mix.rows import Row, read_sections
from fastllava.mix.run import Run
from fastllava.mix.shelf import Table
from fastllava.mix.sources.coco import coco_file


class RefFiles(Section):
    """The two files of one of the three."""

    refs: FilePath = Field(description="refs(unc).p, refs(umd).p or refs(google).p; or the same list as JSON")
    instances: FilePath = Field(description="the instances.json that lies beside it")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Files(Section):
    """What is read."""

    sets: Annotated[tuple[RefFiles, ...], BeforeValidator(_as_tuple)] = Field(
        min_length=1, description="one entry each for refcoco, refcoco+ and refcocog"
    )


class Rules(RegionRules):
    """How they become conversations."""

    split: str = Field(default="train", description="the split that is taken")
    sentences: Literal["all", "first", "random"] = Field(default="all", description="which of an object's phrases")
    text: Literal["sent", "raw"] = Field(default="sent", description="sent: lower case without marks; raw: as it was typed")
    fewer_than: int | None = Field(default=10, ge=2, description="cut into stretches of fewer pairs than this; null: not cut")


class Keys(SourceKeys):
    """RefCOCO, RefCOCO+ and RefCOCOg."""

    format: Literal["refcoco"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order in which the images come first, each with the phrases of all sets."""
    groups = run.groups()
    for each in keys.files.sets:
        boxes, sizes = _instances(each.instances, run)
        for image, region in _refs(each, keys.rules, boxes, sizes, run):
            groups.add(coco_file(image), [image, *region])
    for image, found in groups:
        regions = [Region(phrase, box) for _, phrase, box in found]
        yield from conversations_of(found[0][0], image, regions, keys.rules, run, keys.rules.fewer_than)


def _instances(path: Path, run: Run) -> tuple[Table, Table]:
    """Boxes [x, y, width, height] by the annotation's id, and [width, height] by the image's."""
    boxes, sizes = run.lookup(), run.lookup()

    def keep(section: str, row: Row) -> None:
        entry = fields.an_object(row.value)
        if section == "images":
            sizes.put(fields.whole(entry, "id"), [fields.whole(entry, "width"), fields.whole(entry, "height")])
            return
        corners = [fields.number({"bbox": value}, "bbox") for value in fields.items(entry, "bbox")]
        if len(corners) != 4:
            raise BadRow("field", f"'bbox' has {len(corners)} numbers; write x, y, width, height")
        boxes.put(fields.whole(entry, "id"), corners)

    for section, row in read_sections(path, run.advance, ("images", "annotations")):
        for _ in run.converted([row], lambda row, section=section: keep(section, row)):
            pass
    return boxes, sizes


def _refs(files: RefFiles, rules: Rules, boxes: Table, sizes: Table, run: Run) -> Iterator[tuple[int, Region]]:
    """The image's id and a region for each phrase that is taken."""

    def regions(row: Row) -> tuple[int, list[Region]] | None:
        ref = fields.an_object(row.value)
        if rules.split != "all" and fields.text(ref, "split") != rules.split:
            return None
        image, annotation = fields.whole(ref, "image_id"), fields.whole(ref, "ann_id")
        corners, size = boxes.take(annotation), sizes.take(image)
        if corners is None or size is None:
            what = f"ann_id {annotation}" if corners is None else f"image_id {image}"
            raise BadRow("box" if corners is None else "no_size", f"{what} is not in {files.instances}")
        left, top, width, height = corners
        box = region_in(Box(left, top, left + width, top + height), size[0], size[1], rules)
        phrases = [fields.text(fields.an_object(item, "a sentence"), rules.text) for item in fields.items(ref, "sentences")]
        if not phrases:
            raise BadRow("empty", "'sentences' is empty")
        if rules.sentences != "all":
            phrases = [phrases[0] if rules.sentences == "first" else run.draw.one(phrases, "sentence", annotation, row.key)]
        return image, [Region(phrase, box) for phrase in phrases]

    for found in run.converted(_ref_rows(files.refs, run), regions):
        if found is None:
            run.dropped.by_rule("other_split")
        else:
            yield from ((found[0], region) for region in found[1])


def _ref_rows(path: Path, run: Run) -> Iterator[Row]:
    """The refs as rows: of a pickle by their numbers. Raises UserError."""
    if path.suffix.lower() == ".json":
        yield from (row for _, row in read_sections(path, run.advance, ()))
        return
    refs = read_plain_pickle(path)
    if not isinstance(refs, list):
        raise UserError(f"{path}: holds {fields.kind(refs)}, not a list of refs; give refs(unc).p or the like")
    run.advance(path.stat().st_size)
    yield from (Row(path, "ref", index + 1, index, ref) for index, ref in enumerate(refs))
