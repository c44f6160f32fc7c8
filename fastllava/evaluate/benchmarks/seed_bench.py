"""SEED-Bench: questions with four choices about pictures and frames of videos (the original's convert_seed_for_submission.py)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import Benchmark, Score
from fastllava.evaluate.matching import key, latest, listed, some
from fastllava.evaluate.questions import Question, json_file, read_questions
from fastllava.evaluate.readings import option, otherwise
from fastllava.evaluate.shipped import predictions


@dataclass(frozen=True)
class _Asked:
    """A question of SEED-Bench.json."""

    id: int | str
    """As the file has it."""
    answer: str
    type: str
    """The name of its question type."""
    number: int
    """The number that SEED-Bench.json gives its type."""
    kind: str
    """image or video."""


class SeedBench(Benchmark):
    """14,233 questions about pictures and 5,009 about videos, of which the middle frame is shown."""

    name = "seed_bench"
    title = "SEED-Bench (all)"
    folder = "seed_bench"
    max_new_tokens = 128
    headline = "total"
    published: ClassVar[Mapping[str, float]] = {"7b": 58.6, "13b": 61.6}
    source = (
        "llava-seed-bench.jsonl is in the original's eval.zip (its docs/Evaluation.md); "
        "SEED-Bench.json, SEED-Bench-image/ and the videos are at https://github.com/AILab-CVC/SEED-Bench"
    )

    def questions(self, data: Path) -> list[Question]:
        """The questions of llava-seed-bench.jsonl, with the pictures below the benchmark's own folder."""
        return read_questions(self.need(data / "llava-seed-bench.jsonl"), data)

    def read(self, path: Path) -> Answers:
        """An answers file, or the lines `{"question_id", "prediction"}` that the leaderboard takes."""
        return predictions(path)

    def score(self, data: Path, answers: Answers) -> Score:
        """Percent right of all questions, of those about pictures and about videos, and of each type. A missing answer is wrong."""
        asked = self._asked(data)
        rows = answers.whole()
        found = latest(rows)
        right = [(answer := found.get(key(one.id))) is not None and answer.text == one.answer for one in asked]
        figures, empty = _figures(asked, right)
        questions = []
        for one, is_right in zip(asked, right, strict=True):
            line = found[key(one.id)].line if key(one.id) in found else None
            questions.append({"question_id": one.id, "line": line, "score": float(is_right), "type": one.type, "answer": one.answer})
        return Score(figures, questions, _warnings(asked, rows, found, figures, empty))

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """Write seed_bench.jsonl for the leaderboard: a line for each question of SEED-Bench.json. Raises UserError when one is missing."""
        found = latest(answers.whole())
        asked = self._asked(data)
        if missing := [one.id for one in asked if key(one.id) not in found]:
            raise UserError(f"seed_bench: without an answer: {listed(missing, 'question')}; the leaderboard needs one to each")
        out.mkdir(parents=True, exist_ok=True)
        path = out / "seed_bench.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for one in asked:
                file.write(json.dumps({"question_id": one.id, "prediction": found[key(one.id)].text}) + "\n")
        return [path]

    def _asked(self, data: Path) -> list[_Asked]:
        """The questions of SEED-Bench.json, in its order."""
        path = self.need(data / "SEED-Bench.json")
        whole = json_file(path, dict)
        try:
            names = {number: name for name, number in whole["question_type"].items()}
            rows = list(whole["questions"])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path} has no questions or no question_type; get it again: {self.source}") from None
        return [self._one(path, at, row, names) for at, row in enumerate(rows, 1)]

    def _one(self, path: Path, at: int, row: Any, names: Mapping[Any, str]) -> _Asked:
        try:
            name, answer, kind, number = row["question_id"], row["answer"], row["data_type"], row["question_type_id"]
            type_name = names[number]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: question {at} has no {error}; get the file again: {self.source}") from None
        if not isinstance(name, int | str) or not isinstance(answer, str) or not isinstance(number, int):
            raise UserError(f"{path}: question {at} has a question_id, answer or type of another kind; get the file again: {self.source}")
        return _Asked(name, answer, type_name, number, kind)


def _figures(asked: Sequence[_Asked], right: Sequence[bool]) -> tuple[dict[str, float], list[str]]:
    """The figures, and those of image and video that cannot be had for want of questions."""
    groups: dict[str, list[bool]] = {"total": list(right), "image": [], "video": []}
    groups |= {f"type.{name}": [] for _, name in sorted({(one.number, one.type) for one in asked})}
    for one, is_right in zip(asked, right, strict=True):
        groups[f"type.{one.type}"].append(is_right)
        if one.kind in ("image", "video"):
            groups[one.kind].append(is_right)
    figures = {name: sum(ones) / len(ones) * 100 for name, ones in groups.items() if ones}
    return figures, [name for name in ("image", "video") if not groups[name]]


def _warnings(
    asked: Sequence[_Asked], rows: Sequence[Answer], found: Mapping[int | str, Answer], ours: Mapping[str, float], empty: Sequence[str]
) -> list[str]:
    """Where the official code says something else, and what."""
    warnings = []
    if all("text" in answer.fields for answer in rows):
        as_given = {answer.id: answer for answer in rows}
        theirs = [as_given.get(key(one.id)) for one in asked]
        right = [answer is not None and answer.text == one.answer for one, answer in zip(asked, theirs, strict=True)]
        figures = _figures(asked, right)[0]
        if figures != ours:
            unseen = [one.id for one, answer in zip(asked, theirs, strict=True) if answer is None and key(one.id) in found]
            warnings.append(
                f"written as text in the answers, where the official code finds numbers only: {listed(unseen, 'id')}; "
                f"here total is {ours['total']:.4f}, the official code gives {figures['total']:.4f}"
            )
        never = {one.type: [] for one in asked}
        for one, answer in zip(asked, theirs, strict=True):
            never[one.type].append(answer is not None and answer.text != one.answer)
        if wrong := [name for name, ones in never.items() if all(ones)]:
            warnings.append(f"every answer of {some(wrong)} is wrong, so its figure is 0 here; the official code stops with KeyError")
    plain = [(answer := found.get(key(one.id))) is not None and (option(answer.text) or answer.text) == one.answer for one in asked]
    if odd := [(one.id, one_text) for one in rows if option(one_text := one.text) not in (None, one_text)]:
        warnings.append(otherwise(odd, "total", ours["total"], _figures(asked, plain)[0]["total"]))
    if missing := [one.id for one in asked if key(one.id) not in found]:
        warnings.append(
            f"without an answer: {listed(missing, 'question')}; each is wrong, as in the official code, "
            "which then stops with KeyError where it writes the upload"
        )
    known = {key(one.id) for one in asked}
    if strangers := [answer.id for name, answer in found.items() if name not in known]:
        warnings.append(f"{listed(strangers, 'answer')} to no question of SEED-Bench.json, counted nowhere")
    if empty:
        warnings.append(f"there is no {' and no '.join(empty)} question, so no such figure; the official code stops with ZeroDivisionError")
    return warnings
