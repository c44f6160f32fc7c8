"""What the benchmarks of short answers share: answers paired with questions by id, the accuracy by ten labels, the upload file."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers

Id = int | str
EVAL_ZIP = "unpack eval.zip (docs/Evaluation.md of haotian-liu/LLaVA links it) over playground/data/eval"


def latest(answers: Iterable[Answer]) -> dict[Id, Answer]:
    """The answer to each question by id. Of several to one question the last one counts, as in the official converters."""
    return {answer.id: answer for answer in answers}


def converted(answers: Answers) -> Sequence[Answer]:
    """The answers that the official converters take: they pass over lines that are no JSON, such as a killed run leaves.

    Raises UserError for a line that is JSON and no answer, at which they stop.
    """
    if answers.broken:
        lines = answers.path.read_bytes().decode("utf-8-sig").split("\n")
        for number in answers.broken:
            if _is_json(lines[number - 1]):
                raise UserError(
                    f"--answers: line {number} of {answers.path} is JSON but no answer; write question_id and text in it, or take it out"
                )
    return answers.rows


def torn(answers: Answers) -> list[str]:
    """A warning about lines that were passed over; none when there are none."""
    return [f"lines that are no JSON: {len(answers.broken)}; they are passed over, as in the official converter"] if answers.broken else []


def paired(name: str, answers: Answers, ids: Collection[Id], asked: str) -> dict[Id, Answer]:
    """The answers to the questions `ids`, which `asked` names in messages. Raises UserError when one has none."""
    found = latest(converted(answers))
    if missing := [id for id in ids if id not in found]:
        refuse_other_type(name, found, missing)
        broken = f", and {len(answers.broken)} broken lines" if answers.broken else ""
        raise UserError(
            f"{name}: {len(missing)} of {len(ids)} {asked} have no answer in {answers.path} (the first is {missing[0]!r}){broken}; "
            "answer all of them, as the official code takes nothing less"
        )
    return found


def refuse_other_type(name: str, found: Mapping[Id, Answer], ids: Iterable[Id]) -> None:
    """Raise UserError when one of the questions `ids` is answered under its number as text, or its text as a number.

    The official converters take these for two questions, and upload an empty answer.
    """
    for id in ids:
        other = _other_type(id)
        if other is not None and (answer := found.get(other)) is not None:
            kinds = {int: "number", str: "text"}
            raise UserError(
                f"{name}: answer {answer.line + 1} has the {kinds[type(other)]} {other!r} as its question_id where the questions "
                f"have the {kinds[type(id)]} {id!r}; write {json.dumps(id)} in the answers file"
            )


def soft_accuracy(same: int, labels: int) -> float:
    """The VQA accuracy in [0, 1] of an answer that equals `same` of `labels` labels.

    It is the mean over the annotators of min(1, equal labels among the others' / 3).
    """
    return ((labels - same) * min(1.0, same / 3) + same * min(1.0, max(0, same - 1) / 3)) / labels


def few_labels(counts: Iterable[int]) -> list[str]:
    """A warning about questions whose labels are too few for any answer to be wholly right; none when there are none."""
    counts = list(counts)
    if not (few := sum(count < 4 for count in counts)):
        return []
    ceiling = sum(soft_accuracy(count, count) for count in counts) / len(counts)
    return [f"questions with fewer than 4 labels: {few} of {len(counts)}; the rule of the VQA accuracy gives at most {ceiling:.2%} here"]


def answered_twice(answers: Answers, headline: Callable[[Mapping[Id, Answer]], float]) -> list[str]:
    """A warning about questions with two different answers, with the `headline` of the first ones; none where that is the same."""
    first, last = latest(reversed(answers.rows)), latest(answers.rows)
    changed = sum(first[id].text != answer.text for id, answer in last.items())
    if not changed or headline(first) == headline(last):
        return []
    return [
        f"questions with two different answers: {changed}; the last one counts, as in the official code "
        f"({headline(last):.4g}; with the first ones it is {headline(first):.4g})"
    ]


def texts(name: str, where: str, labels: Any) -> list[str]:
    """The label texts of a question, given as strings or as objects with `answer`. Raises UserError."""
    found = [label.get("answer") if isinstance(label, dict) else label for label in labels] if isinstance(labels, list) else []
    labels = [text for text in found if isinstance(text, str)]
    if not labels or len(labels) != len(found):
        raise UserError(f"{name}: {where} has no list of label texts under answers; give the benchmark's own file")
    return labels


def first_there(*paths: Path) -> Path:
    """The first of `paths` that exists; the first of all when none does."""
    return next((path for path in paths if path.exists()), paths[0])


def write_list(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as one JSON array, byte for byte as json.dump does, one after the other. `path` is there only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, row in enumerate(rows):
                file.write((", " if number else "") + json.dumps(row))
            file.write("]")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _other_type(id: Id) -> Id | None:
    """`id` as a number where it is text, as text where it is a number; None when it has no such form."""
    if isinstance(id, int):
        return str(id)
    return int(id) if id.isdecimal() and id.isascii() and len(id) < 19 and str(int(id)) == id else None
