"""Questions about pictures from a table of one's own: a row each, with one answer or several, or with choices."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import BadRow, Conversation, Pair, checked_pair
from fastllava.mix.keys import Section, SourceKeys
from fastllava.mix.merge import about_images
from fastllava.mix.rows import Row
from fastllava.mix.rules import Answer, PromptAt, answer_of_many, capitalised, multiple_choice
from fastllava.mix.run import Run
from fastllava.mix.sources.tables import TableFiles, id_of, image_of


class Columns(Section):
    """The names of the columns."""

    image: str = Field(default="image", description="path of the image")
    question: str = Field(default="question", description="the question")
    answer: str = Field(
        default="answer", description="the answer, or a list of answers; with choices the number of the right one, from 0 on"
    )
    id: str | None = Field(default=None, description="an id of the row; its number in the file when left out")
    choices: str | None = Field(default=None, description="a list of choices; then the answer becomes a letter")


class Rules(Section):
    """How they become conversations."""

    answer: Answer = Field(default="most_common", description="which of several answers")
    capitalise: bool = Field(default=False, description="a capital first letter for every answer")
    merge_by_image: bool = Field(
        default=True, description="all questions of an image in one conversation, which then has the image's path as id"
    )
    prompt: str = Field(
        default="", description="the format prompt, such as 'Answer the question using a single word or phrase.'; none when empty"
    )
    prompt_at: PromptAt = Field(default="first", description="after the first question, every, or none")


class Keys(SourceKeys):
    """Questions from a table."""

    format: Literal["vqa"]
    files: TableFiles
    columns: Columns = Field(default_factory=Columns)
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the rows."""
    columns, rules = keys.columns, keys.rules

    def question(row: Row) -> tuple[str, str | int, str | int, Pair]:
        asked = fields.an_object(row.value)
        image, own_id = image_of(asked, columns.image, keys.files, run), id_of(asked, columns.id, row)
        text = fields.text(asked, columns.question)
        if columns.choices is not None:
            choices, correct = fields.texts(asked, columns.choices), fields.whole(asked, columns.answer)
            if not 1 < len(choices) <= 26 or correct >= len(choices):
                raise BadRow("field", f"the answer is choice {correct} of {len(choices)}; write 2 to 26 choices, the first is 0")
            return image, image, own_id, checked_pair(*multiple_choice(text, choices, correct))
        several = isinstance(asked.get(columns.answer), list)
        given = fields.texts(asked, columns.answer) if several else [fields.text(asked, columns.answer)]
        if not given:
            raise BadRow("answer_missing", f"{columns.answer!r} is an empty list")
        answer = answer_of_many(given, rules.answer, run.draw, own_id)
        return image, image, own_id, checked_pair(text, capitalised(answer) if rules.capitalise else answer)

    yield from about_images(run.table(keys.files.rows, question, keys.files.under), rules, run)
