"""Captions from a table of one's own, asked for with an instruction: with LLaVA's eleven, data for stage 1 such as LCS-558K."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastllava.mix import fields
from fastllava.mix.concepts import Balance, Balancer
from fastllava.mix.conversation import IMAGE, BadRow, Conversation, Pair
from fastllava.mix.instructions import LCS_558K
from fastllava.mix.keys import Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.rules import Caption, PlaceImage, some_captions, with_image
from fastllava.mix.run import Run
from fastllava.mix.sources.tables import TableFiles, id_of, image_of


class Columns(Section):
    """The names of the columns."""

    image: str = Field(default="image", description="path of the image")
    caption: str = Field(default="caption", description="the caption, or a list of captions")
    id: str | None = Field(default=None, description="an id of the row; its number in the file when left out")


def _as_sentences(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Sentences = Annotated[tuple[str, ...], BeforeValidator(_as_sentences), Field(min_length=1)]


class Rules(Section):
    """How they become conversations."""

    instructions: Literal["lcs_558k"] | Sentences = Field(
        default="lcs_558k",
        description="lcs_558k: the eleven of LLaVA's stage 1; or a list of sentences, one of which is drawn for each record",
    )
    place_image: PlaceImage = Field(default="random", description="the image in a line before or after the instruction")
    caption: Caption = Field(default="first", description="which of a row's captions: first, random, or all, each in a record of its own")
    balance: Balance | None = Field(default=None, description="concept-balanced sampling; none when left out")


class Keys(SourceKeys):
    """Captions from a table."""

    format: Literal["captions"]
    files: TableFiles
    columns: Columns = Field(default_factory=Columns)
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """One conversation a caption that is taken, in the order of the rows."""
    columns, rules = keys.columns, keys.rules
    instructions = LCS_558K if rules.instructions == "lcs_558k" else rules.instructions

    def row_of(row: Row) -> tuple[str | int, str, list[str]]:
        found = fields.an_object(row.value)
        captions = [caption for caption in fields.texts(found, columns.caption) if caption.strip() and IMAGE not in caption]
        if not captions:
            raise BadRow("empty", f"{columns.caption!r} holds no text that can stand beside {IMAGE}")
        return id_of(found, columns.id, row), image_of(found, columns.image, keys.files, run), captions

    def taken() -> Iterator[tuple[str, str, str]]:
        for name, image, captions in run.table(keys.files.rows, row_of, keys.files.under):
            some = some_captions(captions, rules.caption, run.draw, name)
            run.dropped.by_rule("one_caption", len(captions) - len(some))
            for number, caption in enumerate(some):
                yield (f"{name}_{number}" if number else str(name)), image, caption.strip()

    found = taken()
    if rules.balance is not None:
        found = Balancer(rules.balance, run).balanced(found)
    for name, image, caption in found:
        asked = with_image(run.draw.one(instructions, "instruction", name), rules.place_image, run.draw, name)
        yield Conversation(name, image, [Pair(asked, caption)], placed=True)
