"""VQAv2: questions about COCO's pictures, ten labels each; test-dev is scored by a server, the validation set here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import SHORT_ANSWER, Benchmark, Score, ServerScored
from fastllava.evaluate.questions import Question, json_file, json_lines, read_questions
from fastllava.evaluate.short_answers import (
    EVAL_ZIP,
    Id,
    answered_twice,
    converted,
    few_labels,
    latest,
    paired,
    refuse_other_type,
    soft_accuracy,
    texts,
    torn,
    write_list,
)
from fastllava.evaluate.vqa_text import evalai_form, vqa_form, vqa_trimmed

_ASKED = "llava_vqav2_mscoco_test-dev2015.jsonl"
_UPLOADED = "llava_vqav2_mscoco_test2015.jsonl"
_VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_VAL_LABELS = "v2_mscoco_val2014_annotations.json"


class VQAv2(Benchmark):
    """The upload of llava's convert_vqav2_for_submission.py, and the VQA evaluation's accuracy in percent on the validation set."""

    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    max_new_tokens = 128
    headline = "accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 78.5, "13b": 80.0}
    server = "the VQA challenge's server, https://eval.ai/web/challenges/challenge-page/830/my-submission"
    source = (
        f"{EVAL_ZIP}, which holds both {_ASKED} and {_UPLOADED}; test2015 comes out of http://images.cocodataset.org/zips/test2015.zip; "
        f"for the validation set take {_VAL_QUESTIONS} and {_VAL_LABELS} from https://visualqa.org/download.html and val2014 from "
        "http://images.cocodataset.org/zips/val2014.zip"
    )

    def questions(self, data: Path) -> list[Question]:
        """The test-dev questions, or those of the validation set where only that is there."""
        val = data / _VAL_QUESTIONS
        if val.exists() and not (data / _ASKED).exists():
            return _val_questions(val, self.need(data / "val2014"))
        return read_questions(self.need(data / _ASKED), self.need(data / "test2015"))

    def score(self, data: Path, answers: Answers) -> Score:
        """`accuracy` of the answers in the form of the upload and `accuracy_raw` of those as they are, in percent.

        Raises ServerScored for answers to other questions than those of the validation set.
        """
        file = data / _VAL_LABELS
        if not file.exists():
            raise self._server_scored(f"which {file} is needed for")
        annotations = _annotations(file)
        if not any(answer.id in annotations for answer in answers.rows):
            refuse_other_type(self.name, latest(answers.rows), annotations)
            raise self._server_scored(f"and no answer in {answers.path} is to a question of {file}")
        found = paired(self.name, answers, annotations, "questions of the validation set")
        if foreign := [id for id in found if id not in annotations]:
            raise UserError(
                f"vqav2: {len(foreign)} answers in {answers.path} are to questions that {file} does not have (such as {foreign[0]!r}); "
                "take them out, as the official code does not score such a file"
            )
        rows = [_row(found[id], annotation) for id, annotation in annotations.items()]
        uploaded, raw = (100 * sum(row[key] for row in rows) / len(rows) for key in ("score", "score_raw"))

        def headline(chosen: Mapping[Id, Answer]) -> float:
            return 100 * sum(one.score(evalai_form(chosen[id].text)) for id, one in annotations.items()) / len(annotations)

        warnings = [
            *torn(answers),
            *answered_twice(answers, headline),
            *few_labels(len(one.labels) for one in annotations.values()),
            *_merged_labels(found, annotations, uploaded),
        ]
        return Score({"accuracy": uploaded, "accuracy_raw": raw}, rows, warnings)

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """`vqav2_upload.json`: an answer to each question of test2015 in order, empty where there is none, as the server wants it."""
        if not (data / _UPLOADED).exists() and not (data / _ASKED).exists() and (data / _VAL_QUESTIONS).exists():
            return []
        file = self.need(data / _UPLOADED)
        found = latest(converted(answers))
        write_list(out / "vqav2_upload.json", self._uploaded(file, answers, found))
        return [out / "vqav2_upload.json"]

    def _uploaded(self, file: Path, answers: Answers, found: dict[Id, Answer]) -> Iterator[dict[str, Any]]:
        """The rows of the upload, one for each question of `file`. Raises UserError when no answer is to one of them."""
        answered = 0
        for number, question in json_lines(file):
            id = question.get("question_id")
            if not isinstance(id, int | str):
                raise UserError(f"vqav2: line {number} of {file} has no question_id; download it again")
            answer = found.get(id)
            if answer is None:
                refuse_other_type(self.name, found, [id])
            answered += answer is not None
            yield {"question_id": id, "answer": evalai_form(answer.text) if answer else ""}
        if not answered:
            raise UserError(f"vqav2: no answer in {answers.path} is to a question of {file}; give the answers to {_ASKED}")

    def _server_scored(self, why: str) -> ServerScored:
        return ServerScored(
            f"vqav2: the test questions are scored by {self.server}: upload vqav2_upload.json, which `fastllava eval` writes, "
            "and `fastllava score` with --upload DIR; "
            f"only answers to the validation set can be scored here, {why}"
        )


@dataclass(frozen=True)
class _Annotation:
    """The labels of a question as the VQA evaluation compares them: all the same as they are written, others in its form."""

    labels: list[str]
    same: bool
    """Whether all are written alike; then answers are compared as they are written, too."""
    twins: list[int]
    """How many labels are equal to each in every field, itself among them. The evaluation takes these for one annotator."""
    kinds: dict[str, Any]
    """Its types of question and of answer."""

    def equal(self, text: str) -> list[bool]:
        """Which labels the answer `text` is equal to."""
        text = vqa_trimmed(text) if self.same else vqa_form(vqa_trimmed(text))
        return [label == text for label in self.labels]

    def score(self, text: str) -> float:
        """The VQA accuracy of the answer `text` in [0, 1]."""
        equal = self.equal(text)
        same = sum(equal)
        if max(self.twins) == 1:
            return soft_accuracy(same, len(equal))
        # Among "the others" of an annotator are only those whose label differs in some field.
        return sum(min(1.0, (same - twins * hit) / 3) for hit, twins in zip(equal, self.twins, strict=True)) / len(equal)


def _annotations(path: Path) -> dict[Id, _Annotation]:
    """The annotations of the validation set by question. Raises UserError."""
    found: dict[Id, _Annotation] = {}
    given = json_file(path, dict).get("annotations")
    for number, one in enumerate(given if isinstance(given, list) else []):
        where = f"annotation {number} of {path}"
        if not isinstance(one, dict) or not isinstance(id := one.get("question_id"), int | str):
            raise UserError(f"vqav2: {where} has no question_id; give the file as it is published")
        if id in found:
            raise UserError(f"vqav2: {where} is the second for question {id}; give the file as it is published")
        labels = [vqa_trimmed(text) for text in texts("vqav2", where, one.get("answers"))]
        same = len(set(labels)) == 1
        if not same:
            labels = [vqa_form(label) for label in labels]
        whole = [{**(other if isinstance(other, dict) else {}), "answer": text} for other, text in zip(one["answers"], labels, strict=True)]
        ids = [label.get("answer_id") for label in whole]
        distinct = all(isinstance(each, int) for each in ids) and len(set(ids)) == len(ids)
        twins = [1 if distinct else whole.count(label) for label in whole]
        kinds = {key: one[key] for key in ("question_type", "answer_type") if key in one}
        found[id] = _Annotation(labels, same, twins, kinds)
    if not found:
        raise UserError(f"vqav2: {path} has no annotations; give the file as it is published")
    return found


def _row(answer: Answer, annotation: _Annotation) -> dict[str, Any]:
    """What `answer` is worth, in the form of the upload and as it is."""
    text = evalai_form(answer.text)
    scores = {"score": annotation.score(text), "score_raw": annotation.score(answer.text)}
    return {"question_id": answer.id, "line": answer.line, **scores, "normalised": text, **annotation.kinds}


def _merged_labels(found: Mapping[Id, Answer], annotations: Mapping[Id, _Annotation], accuracy: float) -> list[str]:
    """A warning when labels lack an answer_id of their own: the evaluation then takes equal ones of one question for one annotator."""
    merged = sum(max(one.twins) > 1 for one in annotations.values())
    if not merged:
        return []
    apart = sum(soft_accuracy(sum(one.equal(evalai_form(found[id].text))), len(one.labels)) for id, one in annotations.items())
    return [
        f"questions with labels that are equal in every field: {merged}; the official code takes these for one annotator "
        f"({accuracy:.2f}); with an answer_id for each label, as in the published file, it is {100 * apart / len(annotations):.2f}"
    ]


def _val_questions(path: Path, images: Path) -> list[Question]:
    """The questions of the validation set, asked as the original asks those of test-dev. Raises UserError."""
    questions = []
    given = json_file(path, dict).get("questions")
    for number, one in enumerate(given if isinstance(given, list) else []):
        where = f"question {number} of {path}"
        if not isinstance(one, dict) or not isinstance(one.get("question"), str) or not isinstance(one.get("image_id"), int):
            raise UserError(f"vqav2: {where} has no question and image_id; give the file as it is published")
        if not isinstance(id := one.get("question_id"), int | str):
            raise UserError(f"vqav2: {where} has no question_id; give the file as it is published")
        text = one["question"] + SHORT_ANSWER
        questions.append(Question(id, text, images / f"COCO_val2014_{one['image_id']:012d}.jpg", text))
    return questions
