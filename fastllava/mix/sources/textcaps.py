"""TextCaps: five captions an image, and the words that a reader of texts has found in it."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import BadRow, Conversation, Pair, checked_pair
from fastllava.mix.instructions import ONE_SENTENCE
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.rules import Caption, some_captions, with_ocr_tokens
from fastllava.mix.run import Run


class Files(Section):
    """The two files."""

    captions: FilePath = Field(description="TextCaps_0.1_train.json")
    ocr: FilePath | None = Field(
        default=None, description="TextVQA_Rosetta_OCR_v0.2_train.json; without it the prompt has no line of words"
    )


class Rules(Section):
    """How they become conversations."""

    caption: Caption = Field(
        default="first", description="which of an image's captions: first, random, or all, in turns of one conversation"
    )
    prompt: str = Field(default=ONE_SENTENCE, description="what the model is asked")
    ocr_line: Literal["always", "with_words"] = Field(
        default="always", description="the line of words also where an image has none, or not"
    )


class Keys(SourceKeys):
    """TextCaps."""

    format: Literal["textcaps"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """One conversation an image, in the order of the captions."""
    rules, groups, words = keys.rules, run.groups(), run.lookup()

    def keep_words(row: Row) -> None:
        found = fields.an_object(row.value)
        image = fields.text(found, "image_id")
        if not words.put(image, fields.texts(found, "ocr_tokens")):
            raise BadRow("twice", f"image_id {image} comes twice; the first one is used")

    def caption(row: Row) -> tuple[str, str]:
        found = fields.an_object(row.value)
        return fields.text(found, "image_id"), checked_pair(rules.prompt, fields.text(found, "caption_str")).answer

    if keys.files.ocr is not None:
        for _ in run.json(keys.files.ocr, keep_words, "data"):
            pass
    for image, text in run.json(keys.files.captions, caption, "data"):
        groups.add(image, text)
    for image, captions in groups:
        taken = some_captions(captions, rules.caption, run.draw, image)
        run.dropped.by_rule("one_caption", len(captions) - len(taken))
        prompt = rules.prompt
        if keys.files.ocr is not None:
            prompt = with_ocr_tokens(prompt, words.take(image) or [], rules.ocr_line == "always")
        yield Conversation(image, f"{image}.jpg", [Pair(prompt, text) for text in taken])
