"""OCR-VQA: book covers by their numbers, each with its questions and answers."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import BadRow, Conversation, checked_pair
from fastllava.mix.instructions import SHORT_ANSWER
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.rules import PromptAt, capitalised, with_prompt
from fastllava.mix.run import Run

_SPLITS = {"train": 1, "val": 2, "test": 3}


class Files(Section):
    """What is read."""

    questions: FilePath = Field(description="dataset.json")


class Rules(Section):
    """How they become conversations."""

    split: Literal["train", "val", "test", "all"] = Field(default="train", description="the split that is taken")
    extension: str = Field(default=".jpg", description="of the image files; empty: the one in the image's address (.gif, .png and .jpg)")
    capitalise: bool = Field(default=False, description="a capital first letter for every answer")
    prompt: str = Field(default=SHORT_ANSWER, description="the format prompt")
    prompt_at: PromptAt = Field(default="first", description="after the first question, every, or none")


class Keys(SourceKeys):
    """OCR-VQA."""

    format: Literal["ocr_vqa"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the file."""
    rules = keys.rules

    def cover(row: Row) -> Conversation | None:
        book = fields.an_object(row.value)
        if rules.split != "all" and fields.whole(book, "split") != _SPLITS[rules.split]:
            return None
        asked, answers = fields.texts(book, "questions"), fields.texts(book, "answers")
        if len(asked) != len(answers):
            raise BadRow("answer_missing", f"has {len(asked)} questions and {len(answers)} answers")
        ending = rules.extension or "." + fields.text(book, "imageURL").rpartition(".")[2]
        pairs = []
        for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
            try:
                pairs.append(checked_pair(question, capitalised(answer) if rules.capitalise else answer))
            except BadRow as problem:
                run.dropped.bad(problem.reason, f"{row.where}, question {number}", problem.detail)
        return Conversation(str(row.key), f"{row.key}{ending}", with_prompt(pairs, rules.prompt, rules.prompt_at))

    for found in run.json(keys.files.questions, cover):
        if found is None:
            run.dropped.by_rule("other_split")
        else:
            yield found
