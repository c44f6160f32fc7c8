"""A-OKVQA: questions with four choices, asked once for each rotation of the choices."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import BadRow, Conversation, checked_pair
from fastllava.mix.instructions import LETTER
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.rules import PromptAt, multiple_choice, rotated, with_prompt
from fastllava.mix.run import Run
from fastllava.mix.sources.coco import coco_file

_MOST_CHOICES = 26


class Files(Section):
    """What is read."""

    questions: FilePath = Field(description="aokvqa_v1p0_train.json")


class Rules(Section):
    """How they become conversations."""

    rotations: bool = Field(
        default=True, description="as many conversations as there are choices, each with the choices one place further round"
    )
    merge_by_image: bool = Field(default=True, description="all questions of an image in one conversation")
    prompt: str = Field(default=LETTER, description="the format prompt")
    prompt_at: PromptAt = Field(default="first", description="after the first question, every, or none")


class Keys(SourceKeys):
    """A-OKVQA."""

    format: Literal["aokvqa"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the images; the rotations of one follow each other."""
    rules, groups = keys.rules, run.groups()

    def question(row: Row) -> tuple[str, list[Any]]:
        asked = fields.an_object(row.value)
        choices, correct = fields.texts(asked, "choices"), fields.whole(asked, "correct_choice_idx")
        if not 1 < len(choices) <= _MOST_CHOICES or correct >= len(choices):
            raise BadRow("field", f"correct_choice_idx {correct} of {len(choices)} choices; write 2 to {_MOST_CHOICES}, the first is 0")
        checked_pair(*multiple_choice(fields.text(asked, "question"), choices, correct))
        image_id = fields.whole(asked, "image_id")
        own_id = image_id if rules.merge_by_image else fields.name(asked, "question_id")
        key = coco_file(image_id) if rules.merge_by_image else f"{coco_file(image_id)} {own_id}"
        return key, [own_id, fields.text(asked, "question"), choices, correct]

    for key, value in run.json(keys.files.questions, question):
        groups.add(key, value)
    for key, questions in groups:
        for by in range(max(len(choices) for _, _, choices, _ in questions) if rules.rotations else 1):
            pairs = [multiple_choice(text, *rotated(choices, correct, by)) for _, text, choices, correct in questions]
            own_id = questions[0][0]
            yield Conversation(f"{own_id}_{by}" if by else own_id, key.split(" ")[0], with_prompt(pairs, rules.prompt, rules.prompt_at))
