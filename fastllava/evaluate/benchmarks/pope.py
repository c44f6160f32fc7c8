"""POPE: whether a thing is in the picture, asked of MSCOCO pictures in three categories (llava/eval/eval_pope.py)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import Benchmark, Score
from fastllava.evaluate.matching import answered_twice, key, latest, listed, some
from fastllava.evaluate.questions import Question, json_lines, read_questions
from fastllava.evaluate.readings import otherwise, yes_or_no

LABELS_AT = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
_ARTICLE = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class _Asked:
    """A question of a category and its label."""

    id: int | str
    yes: bool


def verdict(text: str) -> str:
    """What the official code takes `text` for: `no` when No, no or not is a word of its first sentence, otherwise `yes`."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def counts(said: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """The figures of a category. `said` and `labels` are True for yes. Precision, recall and F1 are 0 where they are 0/0."""
    pairs = list(zip(said, labels, strict=False))
    tp, fp = sum(one and label for one, label in pairs), sum(one and not label for one, label in pairs)
    tn, fn = sum(not one and not label for one, label in pairs), sum(not one and label for one, label in pairs)
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    whole = {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
    accuracy, yes_ratio = (tp + tn) / len(pairs), sum(said) / len(said)
    return {**whole, "accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}


class Pope(Benchmark):
    """Polling-based object probing, MSCOCO val2014."""

    name = "pope"
    title = "POPE"
    folder = "pope"
    max_new_tokens = 128
    headline = "f1_mean"
    published: ClassVar[Mapping[str, float]] = {"7b": 85.9, "13b": 85.9}
    unit = 100.0
    source = (
        "llava_pope_test.jsonl is in the original's eval.zip (its docs/Evaluation.md), the labels coco/coco_pope_*.json are at "
        f"{LABELS_AT}, the pictures val2014/ are MSCOCO's"
    )

    def questions(self, data: Path) -> list[Question]:
        """The questions of llava_pope_test.jsonl."""
        return read_questions(self.need(data / "llava_pope_test.jsonl"), data / "val2014")

    def score(self, data: Path, answers: Answers) -> Score:
        """F1 of each category and their mean. Answers find their labels by `question_id`, never by their place."""
        asked = self._asked(data)
        rows, found = answers.whole(), latest(answers.whole())
        category_of = {key(one.id): category for category, ones in asked.items() for one in ones}
        if strangers := [answer.id for answer in found.values() if key(answer.id) not in category_of]:
            raise UserError(
                f"--answers: {answers.path} answers questions that are not in {data / 'llava_pope_test.jsonl'} "
                f"({some(strangers)}); give the answers to these questions, with their question_id"
            )
        placed = {category: [answer for answer in rows if category_of[key(answer.id)] == category] for category in asked}
        theirs = _by_place(placed, asked)
        if missing := [one.id for ones in asked.values() for one in ones if key(one.id) not in found]:
            raise UserError(
                f"--answers: {answers.path} has no answer to {len(missing):,} of {len(category_of):,} questions ({some(missing)}); answer "
                f"them all: the official code goes by the answers' places and {theirs}"
            )
        figures: dict[str, float] = {}
        questions, warnings = [], []
        for category, ones in asked.items():
            said = {one.id: verdict(found[key(one.id)].text) for one in ones}
            one_category = counts([said[one.id] == "yes" for one in ones], [one.yes for one in ones])
            figures |= {f"{category}.{name}": value for name, value in one_category.items()}
            if not one_category["tp"]:
                warnings.append(f"{category}: no yes is right, so F1 is 0 here; the official code stops with ZeroDivisionError")
            for one in ones:
                right = (said[one.id] == "yes") == one.yes
                line = found[key(one.id)].line
                row = {"question_id": one.id, "line": line, "category": category, "label": "yes" if one.yes else "no"}
                questions.append({**row, "verdict": said[one.id], "score": float(right)})
        mean = sum(figures[f"{category}.f1"] for category in asked) / len(asked)
        plain = {one.id: yes_or_no(found[key(one.id)].text) for ones in asked.values() for one in ones}
        if odd := [
            (row["question_id"], found[key(row["question_id"])].text) for row in questions if plain[row["question_id"]] != row["verdict"]
        ]:
            warnings.append(otherwise(odd, "f1_mean", mean, _plain_mean(asked, plain)))
        if twice := answered_twice(rows):
            warnings.append(f"answered more than once: {listed(twice, 'question')}; the last answer counts here")
        if any([key(answer.id) for answer in placed[category]] != [key(one.id) for one in ones] for category, ones in asked.items()):
            warnings.append(f"the answers are not in the order of the questions: here f1_mean is {mean:.4f}, the official code {theirs}")
        return Score({"f1_mean": mean, **figures}, questions, warnings)

    def _asked(self, data: Path) -> Mapping[str, list[_Asked]]:
        """The questions of each category with their labels, which the official files pair by place."""
        path = self.need(data / "llava_pope_test.jsonl")
        rows: dict[str, list[dict]] = {}
        for number, row in json_lines(path):
            if not isinstance(row.get("category"), str) or not isinstance(row.get("question_id"), int | str):
                raise UserError(f"{path}: line {number} has no category or no question_id; get the file again: {self.source}")
            rows.setdefault(row["category"], []).append(row)
        if not rows:
            raise UserError(f"{path} holds no question; get the file again: {self.source}")
        for category in rows:
            self.need(data / "coco" / f"coco_pope_{category}.json")
        return {category: self._labelled(data / "coco" / f"coco_pope_{category}.json", ones) for category, ones in rows.items()}

    def _labelled(self, path: Path, asked: Sequence[dict]) -> list[_Asked]:
        """The questions `asked` with their labels from the label file `path`. Raises UserError when that file belongs to others."""
        lines = list(json_lines(path))
        if len(lines) != len(asked):
            raise UserError(
                f"{path} has {len(lines):,} labels for {len(asked):,} questions; later commits of POPE ask other questions "
                f"(3,000 random ones): take the files of {LABELS_AT}"
            )
        found = []
        for (number, label), question in zip(lines, asked, strict=True):
            if label.get("label") not in ("yes", "no"):
                raise UserError(f'{path}: line {number} has the label {label.get("label")!r}; write "yes" or "no"')
            if other := [name for name in ("image", "text") if name in label and name in question and _differ(label, question, name)]:
                raise UserError(
                    f"{path}: line {number} is about another {other[0]} than question {question['question_id']} that stands at its place; "
                    f"take the label files that belong to llava_pope_test.jsonl: {LABELS_AT}"
                )
            found.append(_Asked(question["question_id"], label["label"] == "yes"))
        return found


def _differ(label: Mapping, question: Mapping, name: str) -> bool:
    """Whether the two differ in the field `name`; articles, which POPE has corrected since, and the prompt's second line do not count."""
    one, other = (_ARTICLE.sub("", str(row[name]).split("\n")[0]).split() for row in (label, question))
    return one != other


def _plain_mean(asked: Mapping[str, Sequence[_Asked]], plain: Mapping[int | str, str | None]) -> float:
    """The mean F1 when answers count by what they say; one that says neither is wrong."""
    f1 = []
    for ones in asked.values():
        said = [not one.yes if plain[one.id] is None else plain[one.id] == "yes" for one in ones]
        f1.append(counts(said, [one.yes for one in ones])["f1"])
    return sum(f1) / len(f1)


def _by_place(placed: Mapping[str, Sequence[Answer]], asked: Mapping[str, Sequence[_Asked]]) -> str:
    """What the official code does, which gives the n-th answer of a category its n-th label, in words."""
    f1 = []
    for category, ones in asked.items():
        labels = [one.yes for one in ones]
        said = [verdict(answer.text) == "yes" for answer in placed[category]]
        if not said or not (figures := counts(said, labels))["tp"]:
            return "stops with ZeroDivisionError"
        f1.append(figures["f1"])
    return f"gives f1_mean {sum(f1) / len(f1):.4f}"
