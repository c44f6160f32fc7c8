"""GQA: an object of questions by their ids, about a gigabyte of them."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import Conversation, Pair, checked_pair
from fastllava.mix.instructions import SHORT_ANSWER
from fastllava.mix.keys import FileList, Section, SourceKeys
from fastllava.mix.merge import about_images
from fastllava.mix.rows import Row
from fastllava.mix.rules import PromptAt, capitalised
from fastllava.mix.run import Run


class Files(Section):
    """What is read."""

    questions: FileList = Field(description="train_balanced_questions.json, or a list of files in its format")


class Rules(Section):
    """How they become conversations."""

    full_answers: bool = Field(default=False, description="fullAnswer, a sentence, in place of answer, a word")
    capitalise: bool = Field(default=True, description="a capital first letter for every answer")
    merge_by_image: bool = Field(default=True, description="all questions of an image in one conversation")
    prompt: str = Field(default=SHORT_ANSWER, description="the format prompt")
    prompt_at: PromptAt = Field(default="first", description="after the first question, every, or none")


class Keys(SourceKeys):
    """GQA."""

    format: Literal["gqa"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the files."""
    rules = keys.rules

    def question(row: Row) -> tuple[str, str | int, str | int, Pair]:
        asked = fields.an_object(row.value)
        image = str(fields.name(asked, "imageId"))
        answer = fields.text(asked, "fullAnswer" if rules.full_answers else "answer")
        pair = checked_pair(fields.text(asked, "question"), capitalised(answer) if rules.capitalise else answer)
        return f"{image}.jpg", int(image) if image.isascii() and image.isdigit() else image, row.key, pair

    questions = (found for path in keys.files.questions for found in run.json(path, question))
    yield from about_images(questions, rules, run)
