"""LLaVA-Bench (In-the-Wild): a judge rates ours beside a reference answer (eval_gpt_review_bench.py, summarize_gpt_review.py)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllava.console.printable import quoted, shortened
from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import JudgedBenchmark, Missing, Score
from fastllava.evaluate.judge import Ask, Judge, Reply, Request, each, judging
from fastllava.evaluate.matching import some
from fastllava.evaluate.questions import Question, json_file, json_lines, read_questions

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
MAX_TOKENS = 1024
FAILED = (-1.0, -1.0)
"""The pair of a reply that is not two numbers. The official code averages it with the others."""
RULES = "rule.json"
RULES_AT = "https://raw.githubusercontent.com/haotian-liu/LLaVA/main/llava/eval/table/rule.json"
_PREFIX = "llava_bench_"


@dataclass(frozen=True)
class _Asked:
    """A question with the answer to be judged."""

    id: int | str
    category: str
    """`llava_bench_` and the word of the question file."""
    answer: Answer
    content: str
    """What the judge is sent; empty when replies are stored."""


class LlavaBench(JudgedBenchmark):
    """60 open questions about 24 pictures."""

    name = "llava_bench"
    title = "LLaVA-Bench (In-the-Wild)"
    folder = "llava-bench-in-the-wild"
    max_new_tokens = 1024
    headline = "all"
    published: ClassVar[Mapping[str, float]] = {"7b": 65.4, "13b": 72.5}
    published_judge = "gpt-4-0314, the mean of three runs"
    noise = "three runs of the judge over the same answers: 64.7 to 66.3 (7B), 72.1 to 72.8 (13B)"
    source = "get it from https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

    def questions(self, data: Path) -> list[Question]:
        """The questions of questions.jsonl."""
        return read_questions(self.need(data / "questions.jsonl"), data / "images")

    def judged(self, data: Path, answers: Answers, judge: Judge, rules: Path | None = None) -> Score:
        """100 x ours / the reference's, of the means over all questions and over each category; the mean of several runs of the judge."""
        warnings: list[str] = []
        asked = self._asked(data, answers, judge, rules, warnings)
        runs = [
            each(asked, lambda one, ask=ask, run=run: _ask(one, ask, run), judge.abreast)
            for run, ask in enumerate(judge.runs(self.name, [one.id for one in asked]))
        ]
        _same_subject(asked, runs, warnings)
        pairs = [[_pair(reply) for reply in run] for run in runs]
        each_run = [_figures([one.category for one in asked], run) for run in pairs]
        figures = {key: sum(run[key] for run in each_run) / len(each_run) for key in each_run[0]}
        if len(runs) > 1:
            figures |= {f"run{number}.{key}": value for number, run in enumerate(each_run, 1) for key, value in run.items()}
        for number, (replies, own) in enumerate(zip(runs, each_run, strict=True), 1):
            found = _failures(asked, replies, own["all"]) + _disagreements(asked, replies, own["all"])
            warnings += [f"run {number}: {one}" for one in found] if len(runs) > 1 else found
        by, mixed = judging([reply for run in runs for reply in run], len(runs), self.published_judge)
        return Score(figures, [_row(one, [run[place] for run in pairs]) for place, one in enumerate(asked)], warnings + mixed, by)

    def requests(self, data: Path, answers: Answers, rules: Path | None = None) -> list[Request]:
        """What the judge is sent for each question, in their order."""
        return [_request(one, 0) for one in self._asked(data, answers, None, rules, [])]

    def _asked(self, data: Path, answers: Answers, judge: Judge | None, rules: Path | None, warnings: list[str]) -> list[_Asked]:
        """The questions with their answers, each found by its id."""
        known = None if judge is None else judge.known(self.name)
        path = data / "questions.jsonl"
        if known is not None and not path.exists():
            # Reviews say themselves which questions they are about.
            rows: list[dict[str, Any]] = [{"question_id": key, "category": name.removeprefix(_PREFIX)} for key, name in known.items()]
        else:
            rows = [_checked(path, number, row, "category") for number, row in json_lines(self.need(path))]
        if twice := [key for key, count in Counter(str(row["question_id"]) for row in rows).items() if count > 1]:
            raise UserError(f"{path}: question {twice[0]} is there twice; {self.source}")
        if not rows:
            raise UserError(f"{path} holds no question; {self.source}")
        ours = _by_id([str(row["question_id"]) for row in rows], answers, warnings)
        if judge is None or judge.reads:
            contents = self._contents(data, rows, ours, rules, warnings)
        else:
            contents = [""] * len(rows)
        return [
            _Asked(row["question_id"], _PREFIX + row["category"], answer, content)
            for row, answer, content in zip(rows, ours, contents, strict=True)
        ]

    def _contents(
        self, data: Path, rows: Sequence[Mapping[str, Any]], ours: Sequence[Answer], rules: Path | None, warnings: list[str]
    ) -> list[str]:
        """What the judge is sent about each of `rows`."""
        captions = {}
        path = self.need(data / "context.jsonl")
        for number, row in json_lines(path):
            caption = row.get("caption")
            lines = [caption] if isinstance(caption, str) else caption
            if not isinstance(row.get("image"), str) or not isinstance(lines, list) or not all(isinstance(one, str) for one in lines):
                raise UserError(f"{path}: line {number} has no image with a caption; {self.source}")
            captions[row["image"]] = "\n".join(lines)
        path = self.need(data / "answers_gpt4.jsonl")
        lines = [_checked(path, number, row, "text") for number, row in json_lines(path)]
        references = {str(row["question_id"]): row["text"] for row in lines}
        if len(references) < len(lines):
            raise UserError(f"{path} answers a question twice; {self.source}")
        if missing := [row["question_id"] for row in rows if str(row["question_id"]) not in references]:
            raise UserError(f"{path} has no answer to question {missing[0]}; {self.source}")
        if list(references)[: len(rows)] != [str(row["question_id"]) for row in rows]:
            warnings.append(
                f"{path} is not in the order of questions.jsonl: answers go to their questions here, while the official code pairs by line"
            )
        instructions = _instructions(rules or data / RULES)
        contents = []
        for row, answer in zip(rows, ours, strict=True):
            where = f"{data / 'questions.jsonl'}: question {row['question_id']}"
            if not isinstance(row.get("text"), str) or row.get("image") not in captions:
                raise UserError(f"{where} has no text, or an image that {data / 'context.jsonl'} does not describe; {self.source}")
            category = _PREFIX + row["category"]
            if category not in instructions:
                raise UserError(f"{where}: {rules or data / RULES} has no rule {shortened(category)}; take the file at {RULES_AT}")
            role, rule = instructions[category]
            parts = [
                f"[Context]\n{captions[row['image']]}\n",
                f"[Question]\n{row['text']}\n",
                f"[{role} 1]\n{references[str(row['question_id'])]}\n\n[End of {role} 1]\n",
                f"[{role} 2]\n{answer.text}\n\n[End of {role} 2]\n",
                f"[System]\n{rule}\n\n",
            ]
            contents.append("\n".join(parts))
        return contents


def pair_of(text: str) -> tuple[float, float]:
    """The scores of the reference and of ours in a judge's reply, or FAILED.

    Commas of the first line become blanks; it is cut at every single blank and must be two numbers: `8, 9` is three parts.
    """
    parts = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return FAILED
    return (first, second) if math.isfinite(first) and math.isfinite(second) else FAILED


def _checked(path: Path, number: int, row: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(row.get("question_id"), int | str) or not isinstance(row.get(key), str):
        raise UserError(f"{path}: line {number} has no question_id or no {key} that is a text; {LlavaBench.source}")
    return row


def _instructions(path: Path) -> dict[str, tuple[str, str]]:
    """The role and the instruction of each category. The file is the original's, and no part of this project."""
    if not path.exists():
        raise Missing(
            f"llava_bench: the judge's instruction {path} is not there; download {RULES_AT} to that place, or name it with --rules"
        )
    found = {}
    for key, rule in json_file(path, dict).items():
        if not key.startswith(_PREFIX):
            continue
        if not isinstance(rule, dict) or not all(isinstance(rule.get(name), str) for name in ("role", "prompt")):
            raise UserError(f"{path}: {shortened(key)} has no role and prompt; take the file at {RULES_AT}")
        found[key] = (rule["role"], rule["prompt"])
    return found


def _by_id(ids: Sequence[str], answers: Answers, warnings: list[str]) -> list[Answer]:
    """The answers to the questions `ids`. The official code pairs by line: a warning says where that would pair others."""
    rows = answers.whole()
    if [str(row.id) for row in rows[: len(ids)]] == list(ids):
        if len(rows) > len(ids):
            warnings.append(
                f"{answers.path} has {len(rows) - len(ids):,} lines after the {len(ids):,} answers; they are left out here and officially"
            )
        return list(rows[: len(ids)])
    found: dict[str, list[Answer]] = {}
    for row in rows:
        found.setdefault(str(row.id), []).append(row)
    if missing := [key for key in ids if key not in found]:
        raise UserError(
            f"--answers: {answers.path} has no answer to {len(missing):,} of {len(ids):,} questions ({some(missing)}); answer them too"
        )
    if twice := [key for key in ids if len(found[key]) > 1]:
        raise UserError(f"--answers: {answers.path} answers question {twice[0]} more than once; keep one of these lines")
    wrong = sum(place >= len(rows) or str(rows[place].id) != key for place, key in enumerate(ids))
    warnings.append(
        f"{answers.path} is not in the order of questions.jsonl: here each answer goes to its question, while the official code, "
        f"which pairs by line, would have {wrong:,} of {len(ids):,} judged as answers to another question"
    )
    return [found[key][0] for key in ids]


def _request(one: _Asked, run: int) -> Request:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": one.content}]
    return Request(one.id, run, 0, messages, TEMPERATURE, MAX_TOKENS)


def _ask(one: _Asked, ask: Ask, run: int) -> Reply:
    return ask(_request(one, run))


def _pair(reply: Reply) -> tuple[float, float]:
    """What counts: a review's own `tuple`, which the official summary reads, else what the text says."""
    return pair_of(reply.text) if reply.verdict is None else (reply.verdict[0], reply.verdict[1])


def _figures(categories: Sequence[str], pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """`all` and a figure for each category. The means have three digits before they are divided, as in the official summary."""
    groups = {"all": list(pairs)}
    # Reviews of other benchmarks of LLaVA have no category.
    for name in sorted({*categories} - {_PREFIX}):
        groups[name.removeprefix(_PREFIX)] = [pair for pair, own in zip(pairs, categories, strict=True) if own == name]
    return {name: _ratio(name, group) for name, group in groups.items()}


def _ratio(name: str, pairs: Sequence[tuple[float, float]]) -> float:
    import numpy as np

    # NumPy's mean, as the last bit may decide what the third digit becomes.
    reference, ours = (round(mean, 3) for mean in np.asarray(pairs).mean(0).tolist())
    if reference == 0:
        raise UserError(f"{LlavaBench.name}: the judge's mean for the reference is 0 over {name}, so there is no figure; judge again")
    return ours / reference * 100


def _failures(asked: Sequence[_Asked], replies: Sequence[Reply], all_questions: float) -> list[str]:
    """Warn of replies of a run that are not two numbers, and say what the figure `all` would be without them."""
    failed = [place for place, reply in enumerate(replies) if _pair(reply) == FAILED]
    if not failed:
        return []
    left = [_pair(reply) for reply in replies if _pair(reply) != FAILED]
    reference, ours = (math.fsum(column) for column in zip(*left, strict=True)) if left else (0.0, 0.0)
    return [
        f"{len(failed):,} of {len(replies):,} replies do not begin with two numbers (question {asked[failed[0]].id}: "
        f"{quoted(replies[failed[0]].text, 40)}); the official code averages them as -1: `all` is {all_questions:.1f}, "
        f"without them {f'{100 * ours / reference:.1f}' if reference else 'there would be none'}"
    ]


def _disagreements(asked: Sequence[_Asked], replies: Sequence[Reply], all_questions: float) -> list[str]:
    """Warn of reviews of a run whose `tuple` is not what their text says."""
    by_text = [pair_of(reply.text) if reply.text else _pair(reply) for reply in replies]
    wrong = [one.id for one, reply, pair in zip(asked, replies, by_text, strict=True) if pair != _pair(reply)]
    if not wrong:
        return []
    says = _figures([one.category for one in asked], by_text)["all"]
    return [
        f"{len(wrong):,} reviews have another tuple than their content says (question {wrong[0]}); "
        f"the official summary goes by tuple: `all` is {all_questions:.1f}, by content it would be {says:.1f}"
    ]


def _same_subject(asked: Sequence[_Asked], runs: Sequence[Sequence[Reply]], warnings: list[str]) -> None:
    """Hold reviews against the answers. Raises UserError for another category, and warns when they judged other answers."""
    others = 0
    for run in runs:
        for one, reply in zip(asked, run, strict=True):
            category = str(reply.fields.get("category", one.category))
            if category.removeprefix(_PREFIX) != one.category.removeprefix(_PREFIX):
                raise UserError(
                    f"--replies: the review of question {one.id} is of category {shortened(category, 40)}, but the question is "
                    f"of {shortened(one.category, 40)}; give the reviews of these questions"
                )
            judged, ours = reply.fields.get("answer2_id"), one.answer.fields.get("answer_id")
            others += judged is not None and ours is not None and judged != ours
    if others:
        warnings.append(
            f"{others:,} reviews are of other answers than those in --answers (their answer2_id is not its answer_id): "
            "the figures are of the answers that were judged"
        )


def _row(one: _Asked, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A question's row: `score` is ours of 10, the mean over the runs; `verdict` the pair of the reference and ours."""
    score = sum(min(max(pair[1], 0.0), 10.0) for pair in pairs) / len(pairs) / 10
    row = {"question_id": one.id, "line": one.answer.line, "category": one.category, "score": score, "verdict": list(pairs[0])}
    return row if len(pairs) == 1 else {**row, "verdicts": [list(pair) for pair in pairs]}
