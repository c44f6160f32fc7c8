"""Ask a checkpoint the held-out questions, with what `fastllava answer` and `eval` are made of; exact-match accuracy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from fastllava.demo.dataset import DrawnSet
from fastllava.demo.questions import Question
from fastllava.errors import UserError
from fastllava.evaluate.answer import answer_questions
from fastllava.evaluate.answers import read_answers
from fastllava.evaluate.benchmark import Score
from fastllava.evaluate.benchmarks.scienceqa import ScienceQA
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.engines import make_engine
from fastllava.evaluate.evaluation import evaluate_checkpoint
from fastllava.evaluate.questions import read_questions

OVERALL = "overall"
_AT_A_TIME = 64
_NEW_TOKENS = 8
"""The longest answers have two words."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers in [0, 1], by question type and under OVERALL."""

    questions: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    majority: dict[str, float]
    """The shares when each question gets its type's most frequent answer, chosen on the held-out set itself, so none can be better."""


def answers_of(checkpoint: Path, drawn: DrawnSet, out: Path, console: Console) -> list[str]:
    """The checkpoint's greedy answers to the held-out questions, which the file `out` keeps, as `fastllava answer` writes it."""
    trained = load_trained(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine("transformers", trained, _AT_A_TIME)
    asked = read_questions(drawn.questions, drawn.images)
    answer_questions(trained, asked, out, engine=engine, max_new_tokens=_NEW_TOKENS, console=console)
    return [row.text for row in read_answers(out).whole()]


class DrawnScience(ScienceQA):
    """The demo's own questions with options, which no published figure is of."""

    title = "questions with options, as ScienceQA asks them"
    published: ClassVar[Mapping[str, float]] = {}
    noise = ""


def evaluated(checkpoint: Path, data: Path, out: Path, console: Console) -> Score:
    """The checkpoint's score in the demo's own benchmark below `data`, as `fastllava eval --benchmarks scienceqa` finds it."""
    outcome = evaluate_checkpoint(checkpoint, data, [DrawnScience()], out, batch_size=_AT_A_TIME, console=console)[0]
    if outcome.score is None:
        raise UserError(f"--out: the demo's own benchmark has no score: {outcome.words}")
    return outcome.score


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The share of answers that are exactly right, by question type and OVERALL."""
    right, asked = Counter[str](), Counter[str]()
    for question, answer in zip(questions, answers, strict=True):
        for name in (question.kind, OVERALL):
            asked[name] += 1
            right[name] += answer == question.answer
    return {name: right[name] / asked[name] for name in asked}


def majority_answers(questions: Sequence[Question]) -> Mapping[str, str]:
    """The most frequent right answer of each question type; the first in the alphabet among equals."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return {kind: min(count, key=lambda answer: (-count[answer], answer)) for kind, count in counts.items()}


def compare(questions: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Accuracy:
    """Accuracy before and after, beside that of the majority answer."""
    most = majority_answers(questions)
    asked = Counter(question.kind for question in questions)
    return Accuracy(
        {**asked, OVERALL: asked.total()},
        score(questions, before),
        score(questions, after),
        score(questions, [most[question.kind] for question in questions]),
    )
