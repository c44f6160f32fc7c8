"""Ask a trained model the held-out questions: greedy answers on packed batches, and exact-match accuracy."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastllava.data.conversation import prompt
from fastllava.data.templates import template as template_named
from fastllava.data.tokenizer import Tokenizer
from fastllava.demo.dataset import HeldOut
from fastllava.demo.questions import Question
from fastllava.model.llava import Llava
from fastllava.train import samples
from fastllava.train.samples import Answers, Prompt

OVERALL = "overall"
_MAX_TOKENS = 2048


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers in [0, 1], by question type and under OVERALL."""

    questions: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    majority: dict[str, float]
    """The shares when each question gets its type's most frequent answer, chosen on the held-out set itself, so none can be better."""


def greedy(
    model: Llava,
    tokenizer: Tokenizer,
    asked: Sequence[HeldOut],
    load: Callable[[str], NDArray[np.uint8]],
    template: str,
    *,
    per_batch: int = 128,
    max_new_tokens: int = 8,
) -> list[str]:
    """The model's answer to each question, as `train.samples` gives it; `load` gives a picture as uint8 [3, size, size]."""
    answers: list[str] = []
    form = Answers(tokenizer, template_named(template))
    for begin in range(0, len(asked), per_batch):
        part = asked[begin : begin + per_batch]
        prompts = [Prompt(prompt(template, one.question.text, True, tokenizer), (load(one.image),)) for one in part]
        answers += map(form.text, samples.greedy(model, prompts, form.ended, max_new_tokens, _MAX_TOKENS))
    return answers


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
