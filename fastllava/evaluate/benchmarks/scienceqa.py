"""ScienceQA: school questions with choices, half of them about a picture (llava/eval/model_vqa_science.py, eval_science_qa.py)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import OPTION_LETTER, Benchmark, Score
from fastllava.evaluate.matching import key, latest, listed
from fastllava.evaluate.questions import Question, json_file
from fastllava.evaluate.readings import option, otherwise
from fastllava.evaluate.shipped import science_results

LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
"""The official pattern: its last dot is any character, so "The answer is B" at the end of a text is no answer."""


@dataclass(frozen=True)
class Problem:
    """What a question of the test split asks for."""

    answer: int
    """Which choice is right, from 0."""
    choices: int
    image: bool | None
    """Whether there is a picture; None where problems.json does not say."""


@dataclass(frozen=True)
class _Sums:
    """How many are right, of all and of those with a picture."""

    correct: int
    count: int
    img_correct: int
    img_count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count * 100

    def __str__(self) -> str:
        img = f"{self.img_correct / self.img_count * 100:.2f} ({self.img_correct} of {self.img_count})" if self.img_count else "0/0"
        return f"Accuracy {self.accuracy:.2f}, IMG-Accuracy {img}"


def parse(text: str) -> str:
    """The letter that the official code reads in `text`, or FAILED."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else "FAILED"


def chosen(letter: str, choices: int) -> int:
    """Which of the choices `letter` is, from 0; -1 for none of them."""
    return LETTERS.index(letter) if letter in tuple(LETTERS[:choices]) else -1


class ScienceQA(Benchmark):
    """The test split: 4,241 questions, 2,017 of them with a picture."""

    name = "scienceqa"
    title = "ScienceQA (IMG-Accuracy)"
    folder = "scienceqa"
    max_new_tokens = 1024
    headline = "img_accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 66.8, "13b": 71.6}
    noise = "others score the published 7B weights at 63.9 to 69.5, by their set-up"
    source = (
        "llava_test_CQM-A.json is in the original's eval.zip (its docs/Evaluation.md), "
        "problems.json, pid_splits.json and images/test/ are at https://github.com/lupantech/ScienceQA"
    )

    def questions(self, data: Path) -> list[Question]:
        """The questions of llava_test_CQM-A.json, each with the sentence that asks for a letter."""
        path = self.need(data / "llava_test_CQM-A.json")
        return [self._question(path, data / "images" / "test", number, row) for number, row in enumerate(json_file(path, list), 1)]

    def _question(self, path: Path, images: Path, number: int, row: Any) -> Question:
        try:
            name, said, image = row["id"], row["conversations"][0]["value"], row.get("image")
            text = said.replace("<image>", "").strip() + OPTION_LETTER
            file = None if image is None else images / image
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"{path}: question {number} has no id or no conversations with a value; get the file again: {self.source}"
            ) from None
        return Question(name, text, file, text if file is None else f"<image>\n{text}")

    def read(self, path: Path) -> Answers:
        """An answers file, or the `_output` or `_result` that the official code makes of one."""
        return science_results(path)

    def score(self, data: Path, answers: Answers) -> Score:
        """Accuracy over the whole split and over its questions with a picture, in percent.

        As in the official code a missing answer is wrong, and does not count among those with a picture.
        """
        found = latest(answers.whole())
        problems = self._problems(data, found)
        questions, ours, with_missing = [], _Sums(0, len(problems), 0, 0), 0
        for name, problem in problems.items():
            answer = found.get(key(name))
            letter = "FAILED" if answer is None else parse(answer.text)
            index = chosen(letter, problem.choices)
            right, img = index == problem.answer, answer is not None and _has_picture(problem, answer)
            with_missing += problem.image is True and answer is None
            ours = _Sums(ours.correct + right, ours.count, ours.img_correct + (right and img), ours.img_count + img)
            line = None if answer is None else answer.line
            row = {"question_id": name, "line": line, "score": float(right), "verdict": letter, "parsed": letter, "pred_idx": index}
            questions.append({**row, "truth": LETTERS[problem.answer], "correct": right, "is_multimodal": img})
        if not ours.img_count:
            raise UserError(f"--answers: {answers.path} answers no question about a picture; give the answers to the whole test split")
        warnings = self._warnings(problems, answers, found, ours, with_missing)
        img_accuracy = ours.img_correct / ours.img_count * 100
        figures = {"accuracy": ours.accuracy, "img_accuracy": img_accuracy, "count": ours.count, "img_count": ours.img_count}
        return Score(figures, questions, warnings)

    def _problems(self, data: Path, found: Mapping[int | str, Answer]) -> dict[str, Problem]:
        """The problems of the test split, by id. Without problems.json an `_output` says them itself."""
        labelled = all("ground_truth" in answer.fields for answer in found.values())
        if labelled and not (data / "problems.json").exists():
            return {str(answer.id): _own_label(answer) for answer in found.values()}
        splits, all_problems = (json_file(self.need(data / name), dict) for name in ("pid_splits.json", "problems.json"))
        try:
            return {str(name): self._problem(data, name, all_problems[name]) for name in splits["test"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{data}: pid_splits.json and problems.json do not fit ({error}); get both again: {self.source}") from None

    def _problem(self, data: Path, name: str, row: Any) -> Problem:
        answer, choices = row["answer"], row["choices"]
        if not isinstance(answer, int) or not isinstance(choices, list) or not 0 <= answer < min(len(choices), len(LETTERS)):
            raise UserError(f"{data / 'problems.json'}: problem {name} has the answer {answer!r}, none of its choices; get the file again")
        return Problem(answer, len(choices), bool(row["image"]) if "image" in row else None)

    def _warnings(
        self, problems: Mapping[str, Problem], answers: Answers, found: Mapping[int | str, Answer], ours: _Sums, with_missing: int
    ) -> list[str]:
        warnings = []
        rows = answers.whole()
        theirs = _official({answer.id: answer for answer in rows}, problems)
        if theirs != ours and all("text" in answer.fields for answer in rows):
            said = str(theirs) if theirs.img_count else "stops with ZeroDivisionError"
            warnings.append(
                f"here {ours}; the official code: {said}. It knows questions with a picture by <image> in the answers' field prompt, and "
                "takes an id that is a number for none of its questions"
            )
        asked = [(name, problem, found[key(name)]) for name, problem in problems.items() if key(name) in found]
        if odd := [(name, answer.text) for name, _, answer in asked if parse(answer.text) == "FAILED" and option(answer.text)]:
            right = sum(chosen(_said(answer.text), problem.choices) == problem.answer for _, problem, answer in asked)
            warnings.append(otherwise(odd, "accuracy", ours.accuracy, right / ours.count * 100))
        if strangers := [answer.id for name, answer in found.items() if str(name) not in problems and str(answer.id) not in problems]:
            warnings.append(f"{listed(strangers, 'answer')} to no question of the test split, counted nowhere")
        if missing := [name for name in problems if key(name) not in found]:
            whole = ours.img_correct / (ours.img_count + with_missing) * 100
            warnings.append(
                f"without an answer: {listed(missing, 'question')}. Each is wrong, and as in the official code without a picture: with the "
                f"{with_missing} that have one IMG-Accuracy would be {whole:.2f}"
            )
        return warnings


def _has_picture(problem: Problem, answer: Answer) -> bool:
    return "<image>" in answer.prompt if problem.image is None else problem.image


def _said(text: str) -> str:
    """The letter by the official rule, or the one that `text` says where that finds none."""
    return option(text) or "FAILED" if parse(text) == "FAILED" else parse(text)


def _own_label(answer: Answer) -> Problem:
    """The problem of a row of an `_output`. How many choices there were is not in it, and a letter past them is wrong in any case."""
    truth = answer.fields["ground_truth"]
    if truth not in tuple(LETTERS):
        raise UserError(f"--answers: the ground_truth of {answer.id} is {truth!r}; write a letter from A to E")
    return Problem(LETTERS.index(truth), len(LETTERS), "<image>" in answer.prompt)


def _official(found: Mapping[int | str, Answer], problems: Mapping[str, Problem]) -> _Sums:
    """What the official code counts: it looks ids up as strings, and the picture in the answer's field `prompt`."""
    pairs = [(found[name], problem) for name, problem in problems.items() if name in found]
    right = [chosen(parse(answer.text), problem.choices) == problem.answer for answer, problem in pairs]
    img = ["<image>" in answer.prompt for answer, _ in pairs]
    return _Sums(sum(right), len(problems), sum(one and two for one, two in zip(right, img, strict=True)), sum(img))
