"""GQA: compositional questions on test-dev's balanced part, one right answer each, scored here."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import Benchmark, Score
from fastllava.evaluate.questions import Question, json_file, read_questions
from fastllava.evaluate.short_answers import EVAL_ZIP, Id, answered_twice, first_there, paired, write_list

_LABELS = "testdev_balanced_questions.json"


class GQA(Benchmark):
    """Accuracy in percent as GQA's eval.py has it on the predictions that llava's convert_gqa_for_eval.py writes."""

    name = "gqa"
    title = "GQA"
    folder = "gqa"
    max_new_tokens = 128
    headline = "accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 62.0, "13b": 63.3}
    noise = "the released 7B weights, scored again, gave 61.86"
    source = (
        f"{EVAL_ZIP}; {_LABELS} comes out of https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip, images out of "
        "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip, both for gqa/data"
    )

    def questions(self, data: Path) -> list[Question]:
        """The balanced test-dev questions."""
        images = first_there(data / "data" / "images", data / "images")
        return read_questions(self.need(data / "llava_gqa_testdev_balanced.jsonl"), self.need(images))

    def score(self, data: Path, answers: Answers) -> Score:
        """`accuracy` over the balanced questions in percent, and over those of them with a `binary` and an `open` answer."""
        places = (data / "data", data / "data" / "questions1.2", data / "data" / "questions", data)
        labels = _labels(self.need(first_there(*(place / _LABELS for place in places))))
        answers.whole()
        found = paired(self.name, answers, labels, "balanced questions")
        rows = [_row(found[id], label) for id, label in labels.items()]

        def headline(chosen: Mapping[Id, Answer]) -> float:
            return _percent([_prediction(chosen[id].text) == label["answer"] for id, label in labels.items()])

        figures = {"accuracy": headline(found)}
        figures |= {kind: _percent([row["score"] for row in rows if row["type"] == kind]) for kind in ("binary", "open")}
        trimmed = _percent([_prediction(found[id].text.strip()).strip() == label["answer"] for id, label in labels.items()])
        warnings = answered_twice(answers, headline)
        if trimmed != figures["accuracy"]:
            warnings.append(
                f"the official code keeps blanks at an answer's ends and counts it as wrong for them ({figures['accuracy']:.2f}); "
                f"without them the accuracy is {trimmed:.2f}"
            )
        return Score(figures, rows, warnings)

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """`testdev_balanced_predictions.json`, which GQA's eval.py takes: every answer of the file in its order."""
        write_list(out / "testdev_balanced_predictions.json", _predictions(answers))
        return [out / "testdev_balanced_predictions.json"]


def _prediction(text: str) -> str:
    """What the converter makes of an answer: without the periods at its end and in lower case, its blanks kept."""
    return text.rstrip(".").lower()


def _predictions(answers: Answers) -> Iterator[dict[str, Any]]:
    """The rows of the predictions file."""
    return ({"questionId": answer.id, "prediction": _prediction(answer.text)} for answer in answers.whole())


def _labels(path: Path) -> dict[Id, dict[str, Any]]:
    """The balanced questions by id. Raises UserError for one without what the official code reads."""
    found: dict[Id, dict[str, Any]] = {}
    for id, one in json_file(path, dict).items():
        types = one.get("types") if isinstance(one, dict) else None
        if not isinstance(types, dict) or not isinstance(types.get("structural"), str) or "isBalanced" not in one:
            raise UserError(f"gqa: question {id} of {path} has no isBalanced and types.structural; give the file as it is published")
        if not one["isBalanced"]:
            continue
        if not isinstance(one.get("answer"), str):
            raise UserError(f"gqa: question {id} of {path} has no answer; give testdev_balanced_questions.json, not a file without labels")
        found[id] = one
    if not found:
        raise UserError(f"gqa: {path} has no balanced question; give the file as it is published")
    return found


def _row(answer: Answer, label: dict[str, Any]) -> dict[str, Any]:
    """Whether `answer` is right, and what kind of question it is to."""
    text = _prediction(answer.text)
    right = int(text == label["answer"])
    types = label["types"]
    kind = "open" if types["structural"] == "query" else "binary"
    about = {"type": kind, "structural": types["structural"], "semantic": types.get("semantic")}
    return {"question_id": answer.id, "line": answer.line, "score": right, "verdict": right, "prediction": text, **about}


def _percent(rights: list[Any]) -> float:
    """The share of what is right in percent; 0 when there is nothing, as in the official code."""
    return 100.0 * sum(rights) / len(rights) if rights else 0.0
