"""VQAv2 and OKVQA: one file of questions and one of annotations, in the format of the VQA evaluation."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import BadRow, Conversation, Pair, checked_pair
from fastllava.mix.instructions import SHORT_ANSWER
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.merge import about_images
from fastllava.mix.rows import Row
from fastllava.mix.rules import Answer, PromptAt, answer_of_many, capitalised
from fastllava.mix.run import Run
from fastllava.mix.sources.coco import coco_file


class Files(Section):
    """The two files."""

    questions: FilePath = Field(description="v2_OpenEnded_mscoco_train2014_questions.json")
    annotations: FilePath = Field(description="v2_mscoco_train2014_annotations.json")


class Rules(Section):
    """How they become conversations."""

    answer: Answer = Field(
        default="most_common", description="which of the ten answers; most_common is multiple_choice_answer where the annotation has it"
    )
    answer_field: Literal["answer", "raw_answer"] = Field(
        default="answer", description="of the ten answers: OKVQA's answer is stemmed, its raw_answer as it was typed"
    )
    capitalise: bool = Field(default=True, description="a capital first letter for every answer")
    merge_by_image: bool = Field(default=True, description="all questions of an image in one conversation")
    prompt: str = Field(default=SHORT_ANSWER, description="the format prompt")
    prompt_at: PromptAt = Field(default="first", description="after the first question, every, or none")


class Keys(SourceKeys):
    """VQAv2 or OKVQA."""

    format: Literal["vqav2", "okvqa"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the questions."""
    rules, answers = keys.rules, run.lookup()

    def keep_answer(row: Row) -> None:
        annotation = fields.an_object(row.value)
        question_id = fields.whole(annotation, "question_id")
        given = annotation.get("multiple_choice_answer")
        if rules.answer != "most_common" or rules.answer_field != "answer" or not isinstance(given, str):
            each = [fields.text(fields.an_object(item, "an answer"), rules.answer_field) for item in fields.items(annotation, "answers")]
            if not each:
                raise BadRow("answer_missing", f"'answers' of question {question_id} is empty")
            given = answer_of_many(each, rules.answer, run.draw, question_id)
        if not answers.put(question_id, capitalised(given) if rules.capitalise else given):
            raise BadRow("twice", f"question_id {question_id} is annotated twice; the first one is used")

    def question(row: Row) -> tuple[str, int, int, Pair]:
        asked = fields.an_object(row.value)
        question_id, image_id = fields.whole(asked, "question_id"), fields.whole(asked, "image_id")
        answer = answers.take(question_id)
        if answer is None:
            raise BadRow("answer_missing", f"question_id {question_id} has no annotation in {keys.files.annotations}")
        return coco_file(image_id), image_id, question_id, checked_pair(fields.text(asked, "question"), answer)

    for _ in run.json(keys.files.annotations, keep_answer, "annotations"):
        pass
    yield from about_images(run.json(keys.files.questions, question, "questions"), rules, run)
    for question_id in answers.left():
        run.dropped.bad(
            "answer_missing", f"{keys.files.annotations}", f"question_id {question_id} has no question in {keys.files.questions}"
        )
