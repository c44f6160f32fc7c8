"""MM-Vet: a judge gives each answer a correctness from 0 to 1, averaged over capabilities (mm-vet_evaluator.py)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastllava.console.printable import quoted, shortened
from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers, read_answers
from fastllava.evaluate.benchmark import JudgedBenchmark, Score
from fastllava.evaluate.benchmarks.mm_vet_prompt import few_shot_prompt
from fastllava.evaluate.judge import Ask, Judge, Reply, Request, each, judging
from fastllava.evaluate.matching import some
from fastllava.evaluate.questions import Question, json_file, read_questions

MAX_TOKENS = 3
ASK_AGAIN = "\nPredict the correctness of the answer (digit): "
"""The last line when a reply was no number from 0 to 1."""
TRIES = 5
"""Replies that are read; after the fifth the judge is asked once more, and whatever it says the answer is worth 0."""


@dataclass(frozen=True)
class _Sample:
    """A question of MM-Vet with the answer to be judged."""

    name: str
    """`v1_` and the id of the question."""
    capabilities: frozenset[str]
    answer: Answer
    content: str
    """What the judge is sent; empty when replies are stored."""


@dataclass(frozen=True)
class _Graded:
    """What an answer is worth."""

    score: float
    replies: Sequence[Reply]
    failed: bool
    """Whether no reply was a number from 0 to 1."""


class MMVet(JudgedBenchmark):
    """218 questions that need one or more of six capabilities."""

    name = "mm_vet"
    title = "MM-Vet"
    folder = "mm-vet"
    max_new_tokens = 1024
    headline = "total"
    published: ClassVar[Mapping[str, float]] = {"7b": 31.1, "13b": 36.1}
    published_judge = "gpt-4-0613"
    noise = "three runs of the judge over the same answers: 30.8 to 31.2 (7B), 36.1 to 36.5 (13B)"
    source = (
        "mm-vet.json and images/ are in https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip, "
        "llava-mm-vet.jsonl is in the original's eval.zip (its docs/Evaluation.md)"
    )

    def questions(self, data: Path) -> list[Question]:
        """The questions of llava-mm-vet.jsonl."""
        return read_questions(self.need(data / "llava-mm-vet.jsonl"), data / "images")

    def read(self, path: Path) -> Answers:
        """The answers in `path`: an answers file, or the results that the official converter makes of one."""
        try:
            results = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            return read_answers(path)
        if not isinstance(results, dict) or not results or not all(isinstance(text, str) for text in results.values()):
            return read_answers(path)
        if "question_id" in results:
            return read_answers(path)
        ids = [key.removeprefix("v1_") for key in results]
        rows = [
            Answer(line, int(key) if key.isascii() and key.isdigit() else key, "", text, {"question_id": key, "text": text})
            for line, (key, text) in enumerate(zip(ids, results.values(), strict=True))
        ]
        return Answers(path, rows, [])

    def judged(self, data: Path, answers: Answers, judge: Judge, rules: Path | None = None) -> Score:
        """100 x the mean of all answers, of those for each capability and for each set of them; the mean of several runs of the judge."""
        warnings: list[str] = []
        samples = self._samples(data, answers, judge, rules, warnings)
        runs = [
            each(samples, lambda one, ask=ask, run=run: _grade(one, ask, run), judge.abreast)
            for run, ask in enumerate(judge.runs(self.name, [one.name for one in samples]))
        ]
        scores = [[graded.score for graded in run] for run in runs]
        each_run = [_figures(samples, run) for run in scores]
        figures = {key: sum(run[key] for run in each_run) / len(each_run) for key in each_run[0]}
        if len(runs) > 1:
            totals = [run["total"] for run in each_run]
            figures["std"] = math.sqrt(sum((total - figures["total"]) ** 2 for total in totals) / len(totals))
            shown = [key for key in each_run[0] if not key.startswith("capability_set.")]
            figures |= {f"run{number}.{key}": run[key] for number, run in enumerate(each_run, 1) for key in shown}
        for number, (run, own) in enumerate(zip(runs, each_run, strict=True), 1):
            found = _failures(samples, run, own["total"])
            warnings += [f"run {number}: {one}" for one in found] if len(runs) > 1 else found
        by, mixed = judging([reply for run in runs for graded in run for reply in graded.replies], len(runs), self.published_judge)
        rows = [_row(one, [run[place] for run in scores]) for place, one in enumerate(samples)]
        return Score(figures, rows, warnings + mixed, by)

    def requests(self, data: Path, answers: Answers, rules: Path | None = None) -> list[Request]:
        """The first request for each question, in the order of mm-vet.json."""
        return [_request(one, 0, 0) for one in self._samples(data, answers, None, rules, [])]

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """The file that the official evaluator and its server take: the same bytes as the original's converter writes."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{answers.path.stem}.json"
        path.write_text(json.dumps({f"v1_{row.id}": row.text for row in answers.whole()}, indent=2), encoding="utf-8")
        return [path]

    def _samples(self, data: Path, answers: Answers, judge: Judge | None, rules: Path | None, warnings: list[str]) -> list[_Sample]:
        """The questions of mm-vet.json with their answers."""
        known = None if judge is None else judge.known(self.name)
        path = data / "mm-vet.json"
        if known is not None and not path.exists():
            # Grades say which questions they are about, but not which capabilities these need.
            warnings.append(f"{path} is not there, so there are no figures by capability; {self.source}")
            meta: dict[str, Any] = {name: {"capability": []} for name in known}
        else:
            meta = json_file(self.need(path), dict)
        if not meta:
            raise UserError(f"{path} holds no question; {self.source}")
        found = {f"v1_{row.id}": row for row in answers.whole()}
        if len(found) < len(answers.rows):
            count = len(answers.rows) - len(found)
            warnings.append(
                f"{answers.path} answers {count:,} questions more than once; the last answer counts, as in the official converter"
            )
        if missing := [name for name in meta if name not in found]:
            raise UserError(
                f"--answers: {answers.path} has no answer to {len(missing):,} of {len(meta):,} questions ({some(missing)}); answer them too"
            )
        reads = judge is None or judge.reads
        prompt = few_shot_prompt(data, rules) if reads else ""
        samples = []
        for name, row in meta.items():
            capabilities = row.get("capability") if isinstance(row, dict) else None
            if not isinstance(capabilities, list) or not all(isinstance(one, str) for one in capabilities):
                raise UserError(f"{path}: {shortened(name)} has no list of its capabilities; {self.source}")
            if reads and not all(isinstance(row.get(key), str) for key in ("question", "answer")):
                raise UserError(f"{path}: {shortened(name)} has no question and answer; {self.source}")
            content = f"{prompt}\n{_cells(row, found[name].text)}" if reads else ""
            samples.append(_Sample(name, frozenset(capabilities), found[name], content))
        return samples


def correctness(text: str) -> float | None:
    """What a judge's reply is worth: its first word when that is a number from 0 to 1, else None."""
    try:
        score = float(text.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def _cells(row: Mapping[str, str], answer: str) -> str:
    truth = row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return " | ".join([row["question"], truth, answer, ""])


def _request(one: _Sample, run: int, attempt: int) -> Request:
    """The official request. From the second time on its last line is another; from the third on its temperature rises by 0.5 a time."""
    content = one.content + ASK_AGAIN if attempt and one.content else one.content
    return Request(one.name, run, attempt, [{"role": "user", "content": content}], 0.5 * max(attempt - 1, 0), MAX_TOKENS)


def _grade(one: _Sample, ask: Ask, run: int) -> _Graded:
    """Ask until a reply is a number, as the official code does."""
    replies: list[Reply] = []
    for attempt in range(TRIES + 1):
        reply = ask(_request(one, run, attempt))
        replies.append(reply)
        if reply.verdict is not None:
            return _Graded(reply.verdict[0], replies, reply.verdict[0] == 0 and correctness(reply.text) != 0 and bool(reply.text))
        # The official code does not read the last one.
        if attempt < TRIES and (score := correctness(reply.text)) is not None:
            return _Graded(score, replies, failed=False)
    return _Graded(0.0, replies, failed=True)


def _figures(samples: Sequence[_Sample], scores: Sequence[float]) -> dict[str, float]:
    """`total`, `capability.<name>` and `capability_set.<names>`: names of a set in the order of the alphabet, joined by +."""
    groups: dict[str, list[float]] = {"total": list(scores)}
    for kind in ("capability", "capability_set"):
        for one, score in zip(samples, scores, strict=True):
            names = sorted(one.capabilities)
            for name in names if kind == "capability" else ["+".join(names)] if names else []:
                groups.setdefault(f"{kind}.{name}", []).append(score)
    return {name: sum(group) / len(group) * 100 for name, group in groups.items()}


def _failures(samples: Sequence[_Sample], run: Sequence[_Graded], total: float) -> list[str]:
    """Warn of answers of a run for which the judge gave no number, and say what the total would be without them."""
    found = []
    if failed := [place for place, graded in enumerate(run) if graded.failed]:
        left = [graded.score for graded in run if not graded.failed]
        found.append(
            f"{len(failed):,} of {len(run):,} answers got no number from the judge ({samples[failed[0]].name}, at last: "
            f"{quoted(run[failed[0]].replies[-1].text, 40)}); the official code counts them as 0: total is {total:.1f}, "
            f"without them {f'{100 * sum(left) / len(left):.1f}' if left else 'there would be none'}"
        )
    if any(reply.text.split(" ")[0].strip().lower().lstrip("+-") == "nan" for graded in run for reply in graded.replies):
        found.append("a reply is nan: here it is no number, while the official code takes it for a score, and its total is nan")
    if other := [one.name for one, graded in zip(samples, run, strict=True) if _says_another(graded)]:
        found.append(
            f"{len(other):,} grades have another score than their content says ({other[0]}); the total goes by score, as officially"
        )
    return found


def _says_another(graded: _Graded) -> bool:
    """Whether a stored score is not what its text says; a score of 0 may stand for a text that was not read."""
    text = graded.replies[-1].text
    return bool(text) and graded.replies[-1].verdict is not None and graded.score != 0 and correctness(text) != graded.score


def _row(one: _Sample, scores: Sequence[float]) -> dict[str, Any]:
    """A question's row: `score` is the mean over the runs, `scores` has each."""
    row = {"question_id": one.answer.id, "line": one.answer.line, "name": one.name, "capabilities": sorted(one.capabilities)}
    row["score"] = sum(scores) / len(scores)
    return row if len(scores) == 1 else {**row, "scores": list(scores)}
