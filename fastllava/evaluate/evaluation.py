"""`fastllava eval`: the benchmarks that are there, one after another, answered, scored and written down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllava.console.speaker import Say
from fastllava.disk import read_json_object, write_json
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.evaluate.answers import Answers
from fastllava.evaluate.benchmark import Benchmark, JudgeNeeded, Missing, Score, ServerScored
from fastllava.evaluate.questions import Question
from fastllava.evaluate.score import notes

SCORES = "scores.json"

Ask = Callable[[Benchmark, Sequence[Question], Path], None]
"""Answers a benchmark's questions into a file, in their order, and goes on where an earlier call was stopped."""
Grade = Callable[[Benchmark, Path, Answers], Score]
"""What answers are worth; `Benchmark.score`, or what a judge says."""


@dataclass(frozen=True)
class Outcome:
    """What came of a benchmark."""

    benchmark: Benchmark
    status: str
    """scored, answered (it is scored elsewhere), missing (files are not there) or failed."""
    words: str = ""
    """Why it has no score, and what to do."""
    score: Score | None = None
    answers: Path | None = None
    uploads: Sequence[Path] = field(default_factory=tuple)
    questions: Sequence[Question] = field(default_factory=tuple, repr=False)

    @property
    def value(self) -> float | None:
        """The figure that papers print, in their unit."""
        if self.score is None or self.benchmark.headline not in self.score.figures:
            return None
        return self.score.figures[self.benchmark.headline] * self.benchmark.unit

    def as_json(self) -> dict[str, Any]:
        """What scores.json holds of it."""
        one = self.benchmark
        found: dict[str, Any] = {"title": one.title, "status": self.status, "published": dict(one.published), "headline": one.headline}
        if one.noise:
            found["noise"] = one.noise
        if self.words:
            found["words"] = self.words
        if self.score is not None:
            found |= {"value": self.value, "figures": dict(self.score.figures), "warnings": self.score.warnings}
            if self.score.judge is not None:
                found["judge"] = dict(self.score.judge)
        if self.answers is not None:
            found["answers"] = str(self.answers)
        if self.uploads:
            found["uploads"] = [str(path) for path in self.uploads]
        return found


def evaluate(
    chosen: Sequence[Benchmark], data: Path, out: Path, about: Mapping[str, Any], ask: Ask, grade: Grade, say: Say, group: Processes = ALONE
) -> list[Outcome]:
    """Ask, score and write down every benchmark of `chosen`; one that cannot be run is said, and the others still run.

    data: laid out as playground/data/eval. `out` gets answers/<name>.jsonl, uploads/<name>/ and scores.json, which is written anew after
    every benchmark and keeps those of earlier calls `about` the same model. Every process calls this; the first one reads and writes.
    """
    group.on_first(lambda: _begin(out, about))
    outcomes = []
    for number, one in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {one.title}")
        outcome = _run(one, data / one.folder, out, ask, grade, group)
        outcomes.append(outcome)
        group.on_first(lambda: _write(out, about, outcomes))
        figure = "" if outcome.value is None else f"{one.headline} {outcome.value:.2f}"
        say(f"  {outcome.status}" + (f": {figure}" if figure else "") + (f": {outcome.words}" if outcome.words else ""))
        for line in notes(outcome.score) if outcome.score else ():
            say(f"  {line}")
    return outcomes


def _run(one: Benchmark, data: Path, out: Path, ask: Ask, grade: Grade, group: Processes) -> Outcome:
    answers = out / "answers" / f"{one.name}.jsonl"
    try:
        with group.together():
            questions = one.questions(one.need(data))
        ask(one, questions, answers)
        return group.on_first(lambda: _graded(one, data, out, answers, questions, grade))
    except Missing as error:
        return Outcome(one, "missing", str(error))
    except UserError as error:
        return Outcome(one, "failed", str(error), answers=answers if answers.is_file() else None)


def _graded(one: Benchmark, data: Path, out: Path, path: Path, questions: Sequence[Question], grade: Grade) -> Outcome:
    answers, folder = one.read(path), out / "uploads" / one.name
    folder.mkdir(parents=True, exist_ok=True)
    uploads = one.upload(data, answers, folder)
    if not uploads:
        folder.rmdir()
    try:
        score = grade(one, data, answers)
    except (Missing, ServerScored, JudgeNeeded) as error:
        return Outcome(one, "answered", str(error), None, path, uploads, questions)
    return Outcome(one, "scored", "", score, path, uploads, questions)


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    """Raises UserError when `out` holds the scores of another model."""
    out.mkdir(parents=True, exist_ok=True)
    for key, value in _held(out).items():
        if key != "benchmarks" and key in about and about[key] != value:
            raise UserError(f"--out: {out} holds scores with {key} {value!r}, and this is {about[key]!r}; give another folder")


def _held(out: Path) -> dict[str, Any]:
    path = out / SCORES
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {path} cannot be read ({error}); remove it, the answers beside it are kept") from None


def _write(out: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    before = _held(out).get("benchmarks", {})
    found = {outcome.benchmark.name: outcome.as_json() for outcome in outcomes}
    write_json(out / SCORES, {**about, "benchmarks": {**before, **found}})
