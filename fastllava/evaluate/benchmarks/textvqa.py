"""TextVQA: questions about text in pictures, with a line of OCR tokens in the prompt; ten labels each, scored here."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import Benchmark, Score
from fastllava.evaluate.questions import Question, json_file, read_questions
from fastllava.evaluate.short_answers import EVAL_ZIP, soft_accuracy, texts
from fastllava.evaluate.vqa_text import evalai_form

_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_OCR_LINE = "Reference OCR token: "
_LABELS = 10

Key = tuple[Any, str]
"""The image's id and the question in lower case: how the official code finds an answer's labels."""


class TextVQA(Benchmark):
    """Accuracy in [0, 1] over the answers, as llava/eval/eval_textvqa.py has it."""

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    max_new_tokens = 128
    headline = "accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 58.2, "13b": 61.3}
    unit = 100.0
    source = (
        f"{EVAL_ZIP}; TextVQA_0.5.1_val.json is https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json, "
        "train_images comes out of https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
    )

    def questions(self, data: Path) -> list[Question]:
        """The validation questions with their OCR tokens. A `question_id` is an image's id, and so not unique."""
        file = self.need(data / "llava_textvqa_val_v051_ocr.jsonl")
        return read_questions(file, self.need(data / "train_images"))

    def score(self, data: Path, answers: Answers) -> Score:
        """The mean accuracy of the answers in the file: questions without an answer are not in it, as in the official code."""
        annotations = _annotations(self.need(data / "TextVQA_0.5.1_val.json"))
        rows, keys = [], []
        for answer in answers.whole():
            keys.append(key := (answer.id, _question(answers, answer)))
            if key not in annotations:
                raise UserError(
                    f"textvqa: answer {answer.line + 1} in {answers.path} is to {key[1]!r} about the image {answer.id!r}, which "
                    f"{data / 'TextVQA_0.5.1_val.json'} does not ask; write the image's id as question_id and the question as it was asked"
                )
            rows.append(_row(answer, annotations[key][-1]))
        accuracy = _mean(rows)
        warnings = [*_asked_twice(answers, keys, annotations, accuracy), *_unanswered(keys, annotations, rows), *_without_ocr(answers)]
        return Score({"accuracy": accuracy}, rows, warnings)


def _annotations(path: Path) -> dict[Key, list[dict[str, Any]]]:
    """The annotations by key, in the order of the file. Raises UserError for one that the official code could not score."""
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    data = json_file(path, dict).get("data")
    for number, one in enumerate(data if isinstance(data, list) else []):
        where = f"annotation {number} of {path}"
        if not isinstance(one, dict) or not isinstance(one.get("question"), str) or not isinstance(one.get("image_id"), int | str):
            raise UserError(f"textvqa: {where} has no question and image_id; give the benchmark's own file")
        labels = [evalai_form(text) for text in texts("textvqa", where, one.get("answers"))]
        if len(labels) != _LABELS:
            raise UserError(f"textvqa: {where} has {len(labels)} answers, not {_LABELS}; give the benchmark's own file")
        found[one["image_id"], one["question"].lower()].append({"id": one.get("question_id"), "labels": labels})
    if not found:
        raise UserError(f"textvqa: {path} has no annotations under data; give the benchmark's own file")
    return dict(found)


def _question(answers: Answers, answer: Answer) -> str:
    """The question in lower case that `answer` says it was asked, in one of the four layouts that the official code knows."""
    prompt, lines = answer.prompt, answer.prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if (found := _OCR_FIRST.search(prompt)) is not None:
            return found[1].lower()
    elif _OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR_LINE.strip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(
        f"textvqa: the prompt of answer {answer.line + 1} in {answers.path} has a layout that the official code cannot read "
        f"({len(lines)} lines, {prompt[:60]!r}); write the question without a line break in it, the line '{_OCR_LINE.strip()} ...', "
        "and the sentence about the form of the answer, or leave the middle one out"
    )


def _row(answer: Answer, annotation: dict[str, Any]) -> dict[str, Any]:
    """What `answer` is worth by the labels of `annotation`."""
    text, labels = evalai_form(answer.text), annotation["labels"]
    score = soft_accuracy(labels.count(text), len(labels))
    about = {"question_id": answer.id, "line": answer.line, "annotation_question_id": annotation["id"]}
    return {**about, "normalised": text, "score": score}


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    """The accuracy over `rows`."""
    return sum(row["score"] for row in rows) / len(rows)


def _asked_twice(answers: Answers, keys: list[Key], annotations: dict[Key, list[dict[str, Any]]], accuracy: float) -> list[str]:
    """A warning when one image is asked one question twice: the official code judges both answers by the labels of the last one."""
    twice = {key for key in keys if len(annotations[key]) > 1}
    if not twice:
        return []
    seen: Counter[Key] = Counter()
    rows = []
    for answer, key in zip(answers.rows, keys, strict=True):
        rows.append(_row(answer, annotations[key][min(seen[key], len(annotations[key]) - 1)]))
        seen[key] += 1
    if _mean(rows) == accuracy:
        return []
    return [
        f"questions asked twice about one image: {len(twice)}; the official code judges all their answers by the last one's labels "
        f"({accuracy:.4f}); each by its own, the accuracy is {_mean(rows):.4f}"
    ]


def _unanswered(keys: list[Key], annotations: dict[Key, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> list[str]:
    """Warnings when the answers are not one for each question: the official code takes the mean over whatever is there."""
    given, wanted = Counter(keys), {key: len(several) for key, several in annotations.items()}
    missing = sum(max(0, count - given[key]) for key, count in wanted.items())
    more = sum(max(0, count - wanted[key]) for key, count in given.items())
    found = []
    if missing:
        whole = sum(row["score"] for row in rows) / (len(rows) + missing)
        found.append(
            f"questions without an answer: {missing}; the official code takes the mean over the answers that are there, {len(rows)} "
            f"({_mean(rows):.4f}); over all questions it is {whole:.4f}"
        )
    if more:
        once = list({(row["question_id"], key): row for key, row in zip(keys, rows, strict=True)}.values())
        found.append(
            f"answers to questions answered already: {more}; the official code counts every line ({_mean(rows):.4f}); "
            f"with the last answer to each question, the accuracy is {_mean(once):.4f}"
        )
    return found


def _without_ocr(answers: Answers) -> list[str]:
    """A warning when most questions were asked without the OCR tokens that the published figures were asked with."""
    bare = sum(_OCR_LINE.strip() not in answer.prompt and not answer.prompt.startswith("OCR tokens: ") for answer in answers.rows)
    if 2 * bare <= len(answers.rows):
        return []
    return [
        f"prompts without a line of OCR tokens: {bare} of {len(answers.rows)}; the published figures were asked with it, "
        "and 7B is reported to reach about 46 without"
    ]
