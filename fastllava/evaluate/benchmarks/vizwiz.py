"""VizWiz: questions that blind people asked about their pictures; the test set is scored by a server, the validation set here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import SHORT_ANSWER, Benchmark, Score, ServerScored
from fastllava.evaluate.questions import Question, json_file, json_lines, read_questions
from fastllava.evaluate.short_answers import EVAL_ZIP, Id, answered_twice, few_labels, paired, soft_accuracy, texts, torn, write_list
from fastllava.evaluate.vqa_text import evalai_form

_ASKED = "llava_test.jsonl"
_VAL = "val.json"
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """The upload of llava's convert_vizwiz_for_submission.py, and lmms-eval's accuracy in [0, 1] on the validation set."""

    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    max_new_tokens = 128
    headline = "accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 50.0, "13b": 53.6}
    unit = 100.0
    server = "the VizWiz challenge's server on https://eval.ai"
    source = (
        f"{EVAL_ZIP}, which holds {_ASKED}; test comes out of https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip; for the "
        f"validation set take {_VAL} out of https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip and val out of "
        "https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip"
    )

    def questions(self, data: Path) -> list[Question]:
        """The test questions, or those of the validation set where only that is there."""
        if (data / _VAL).exists() and not (data / _ASKED).exists():
            images = self.need(data / "val")
            asked = ((one["image"], one["question"].capitalize() + _UNANSWERABLE + SHORT_ANSWER) for one in _val(data / _VAL))
            return [Question(number, text, images / image, text) for number, (image, text) in enumerate(asked)]
        return read_questions(self.need(data / _ASKED), self.need(data / "test"))

    def score(self, data: Path, answers: Answers) -> Score:
        """The `accuracy` of answers to the validation set, whose ids are the places in val.json from 0.

        Raises ServerScored for answers to the test set.
        """
        if not (data / _VAL).exists():
            raise self._server_scored(f"which {data / _VAL} is needed for")
        labels = _val(data / _VAL)
        if not _same_questions(answers, labels):
            raise self._server_scored(f"and the prompts of {answers.path} are other questions")
        found = paired(self.name, answers, range(len(labels)), f"questions of {data / _VAL}")
        if foreign := [id for id in found if id not in range(len(labels))]:
            raise UserError(f"vizwiz: {answers.path} answers question {foreign[0]!r}, which {data / _VAL} does not have; take the line out")
        rows = [_row(found[number], label) for number, label in enumerate(labels)]

        def headline(chosen: Mapping[Id, Answer]) -> float:
            return sum(_row(chosen[number], label)["score"] for number, label in enumerate(labels)) / len(labels)

        warnings = [*torn(answers), *answered_twice(answers, headline), *few_labels(len(label["labels"]) for label in labels)]
        return Score({"accuracy": sum(row["score"] for row in rows) / len(rows)}, rows, warnings)

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """`vizwiz_upload.json`: image and answer of every test question in order. Raises UserError when one has no answer."""
        if (data / _VAL).exists() and not (data / _ASKED).exists():
            return []
        questions = list(_asked(self.need(data / _ASKED)))
        found = paired(self.name, answers, [id for id, _ in questions], "test questions")
        rows = ({"image": image, "answer": evalai_form(found[id].text)} for id, image in questions)
        write_list(out / "vizwiz_upload.json", rows)
        return [out / "vizwiz_upload.json"]

    def _server_scored(self, why: str) -> ServerScored:
        return ServerScored(
            f"vizwiz: the test questions are scored by {self.server}: upload vizwiz_upload.json, which `fastllava eval` writes, "
            "and `fastllava score` with --upload DIR; "
            f"only answers to the validation set can be scored here, {why}"
        )


def _asked(path: Path) -> Iterator[tuple[Id, str]]:
    """Id and image of every test question. Raises UserError."""
    for number, row in json_lines(path):
        if not isinstance(row.get("question_id"), int | str) or not isinstance(row.get("image"), str):
            raise UserError(f"vizwiz: line {number} of {path} has no question_id and image; download it again")
        yield row["question_id"], row["image"]


def _val(path: Path) -> list[dict[str, Any]]:
    """The questions of the validation set with their labels in the form of the upload. Raises UserError."""
    found = []
    for number, one in enumerate(json_file(path, list)):
        where = f"question {number} of {path}"
        if not isinstance(one, dict) or not isinstance(one.get("question"), str) or not isinstance(one.get("image"), str):
            raise UserError(f"vizwiz: {where} has no question and image; give the file as it is published")
        labels = [evalai_form(text) for text in texts("vizwiz", where, one.get("answers"))]
        found.append({"image": one["image"], "question": one["question"], "labels": labels, "answer_type": one.get("answer_type")})
    if not found:
        raise UserError(f"vizwiz: {path} has no question; give the file as it is published")
    return found


def _same_questions(answers: Answers, labels: list[dict[str, Any]]) -> bool:
    """Whether the answers' prompts hold the questions of the validation set. The test set's ids are the same numbers."""
    asked = {number: label["question"].strip().casefold() for number, label in enumerate(labels)}
    told = [asked[answer.id] in answer.prompt.casefold() for answer in answers.rows if answer.prompt and answer.id in asked]
    return not told or 2 * sum(told) >= len(told)


def _row(answer: Answer, label: dict[str, Any]) -> dict[str, Any]:
    """What `answer` is worth by the labels of a question."""
    text = evalai_form(answer.text)
    score = soft_accuracy(label["labels"].count(text), len(label["labels"]))
    return {"question_id": answer.id, "line": answer.line, "score": score, "normalised": text, "answer_type": label["answer_type"]}
