"""Ask a trained model the held-out questions: greedy answers on packed batches, and exact-match accuracy."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.data.conversation import prompt
from fastllava.data.loader import Sample, pack
from fastllava.data.tokenizer import Tokenizer
from fastllava.demo.dataset import HeldOut
from fastllava.demo.questions import Question
from fastllava.model.llava import Llava

OVERALL = "overall"
_NOTHING_SUPERVISED = np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers in [0, 1], by question type and under OVERALL."""

    questions: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    majority: dict[str, float]
    """The shares when each question gets its type's most frequent answer, chosen on the held-out set itself, so none can be better."""


@torch.no_grad()
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
    """The model's answer to each question, its most likely token taken at every step until </s>.

    `load` gives a picture as uint8 [3, size, size]. Many questions are packed into one batch; there is no cache, the
    answers are too short to need one.
    """
    answers: list[str] = []
    device = next(model.parameters()).device
    for begin in range(0, len(asked), per_batch):
        part = asked[begin : begin + per_batch]
        ids = [prompt(template, one.question.text, True, tokenizer) for one in part]
        starts = [len(x) for x in ids]
        pictures = [load(one.image) for one in part]
        open_ = list(range(len(part)))
        for _ in range(max_new_tokens):
            samples = [Sample(np.array(ids[i], np.int32), _NOTHING_SUPERVISED, [pictures[i]], 0.0) for i in open_]
            batch = pack(samples, model.spec, 2048).to(device)
            last_rows = batch.cu_seqlens[1:].long() - 1
            tokens = model.logits(batch)[last_rows].argmax(-1).tolist()
            for i, token in zip(open_, tokens, strict=True):
                ids[i].append(token)
            open_ = [i for i in open_ if ids[i][-1] != tokenizer.eos_id]
            if not open_:
                break
        answers += [tokenizer.decode(x[start:]).strip() for x, start in zip(ids, starts, strict=True)]
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
