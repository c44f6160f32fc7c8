"""`fastllava eval`: the benchmarks that are there, one after another, answered, scored and written down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastllava import __version__
from fastllava.console.speaker import Say, speaker
from fastllava.disk import read_json_object, ready_to_write, write_json
from fastllava.distributed.processes import ALONE, Processes, processes
from fastllava.errors import UserError
from fastllava.evaluate.answers import Answers
from fastllava.evaluate.benchmark import Benchmark, JudgeNeeded, Missing, Score, ServerScored
from fastllava.evaluate.judge import Judge
from fastllava.evaluate.questions import Question, image_bytes
from fastllava.evaluate.report.scores import SHOWN, Example, write_scores_page
from fastllava.evaluate.score import graded, notes

SCORES, PAGE = "scores.json", "report.html"
_EXPECTED = ("expected", "label", "truth")
"""Fields of Score.questions that say what would have been right."""

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
    """Why it has no score, or no upload, and what to do."""
    score: Score | None = None
    answers: Path | None = None
    uploads: Sequence[Path] = field(default_factory=tuple)
    examples: Sequence[Example] = field(default_factory=tuple, repr=False)

    @property
    def value(self) -> float | None:
        """The figure that papers print, in their unit."""
        if self.score is None or self.benchmark.headline not in self.score.figures:
            return None
        return self.score.figures[self.benchmark.headline] * self.benchmark.unit

    def as_json(self) -> dict[str, Any]:
        """What scores.json holds of it."""
        one = self.benchmark
        about = {"title": one.title, "status": self.status, "published": dict(one.published), "headline": one.headline, "unit": one.unit}
        found: dict[str, Any] = {**about, **({"noise": one.noise} if one.noise else {}), **({"server": one.server} if one.server else {})}
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


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    chosen: Sequence[Benchmark],
    out: Path,
    *,
    template: str | None = None,
    batch_size: int = 8,
    engine: str = "transformers",
    precision: str = "auto",
    skip_bad: bool = False,
    judge: Judge | None = None,
    rules: Path | None = None,
    base: Path | None = None,
    console: Console,
) -> list[Outcome]:
    """`evaluate` of a checkpoint, for every process that torchrun started; `out` gets report.html too. Raises UserError."""
    from fastllava.evaluate.answer import answer_questions
    from fastllava.evaluate.engines import load_engine

    if not data.is_dir():
        raise UserError(f"--data: {data} is no folder; give the one that is laid out as the original's playground/data/eval")
    with processes() as group:
        group.on_first(lambda: ready_to_write(out / SCORES, "--out"))
        say = speaker(console if group.first else Console(quiet=True))
        trained, made = load_engine(checkpoint, engine, template, batch_size, precision, say, group, base=base)
        about = {"checkpoint": str(checkpoint.resolve()), "model": trained.identity, "template": trained.form.name, "engine": engine}
        about |= {"precision": str(trained.model.dtype).removeprefix("torch."), "version": __version__}

        def ask(one: Benchmark, questions: Sequence[Question], path: Path) -> None:
            group.on_first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
            answer_questions(
                trained,
                questions,
                path,
                engine=made,
                max_new_tokens=one.max_new_tokens,
                skip_bad=skip_bad,
                group=group,
                console=console,
            )

        def grade(one: Benchmark, folder: Path, answers: Answers) -> Score:
            return graded(one, folder, answers, judge, rules)

        outcomes = evaluate(chosen, data, out, about, ask, grade, say, group)
        if group.first:
            console.print(table(outcomes))
            page = write_scores_page(out / PAGE, _held(out), [example for one in outcomes for example in one.examples])
            say(f"scores: {out / SCORES}\nreport: {page}")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Table:
    """The figure of each benchmark beside those of the original."""
    shown = Table("benchmark", "here", "LLaVA-1.5 7B", "LLaVA-1.5 13B", "known noise", title="scores")
    for one in outcomes:
        published = (f"{one.benchmark.published[size]:.1f}" if size in one.benchmark.published else "" for size in ("7b", "13b"))
        here = one.status if one.value is None else f"{one.value:.1f}"
        shown.add_row(one.benchmark.title, here, *published, "" if one.value is None else one.benchmark.noise)
    return shown


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
    answers = one.read(path)
    uploads, refused = _uploads(one, data, out / "uploads" / one.name, answers)
    try:
        score = grade(one, data, answers)
    except (Missing, ServerScored, JudgeNeeded) as error:
        rows = [{"line": answer.line} for answer in answers.rows]
        words = f"{error}; {refused}" if refused else str(error)
        return Outcome(one, "answered", words, None, path, uploads, list(_examples(one, questions, answers, rows)))
    return Outcome(one, "scored", refused, score, path, uploads, list(_examples(one, questions, answers, score.questions)))


def _uploads(one: Benchmark, data: Path, folder: Path, answers: Answers) -> tuple[list[Path], str]:
    """The files for the benchmark's server, where it has one; why there are none, which hinders no score."""
    folder.mkdir(parents=True, exist_ok=True)
    written, refused = [], ""
    try:
        written = one.upload(data, answers, folder)
    except UserError as error:
        refused = f"there is no file for the server: {error}"
    if not written:
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
    return written, refused


def _examples(one: Benchmark, questions: Sequence[Question], answers: Answers, rows: Sequence[Mapping[str, Any]]) -> Iterator[Example]:
    """A few answers to show, spread over the benchmark: right ones, wrong ones, and others where that is not known."""
    if len(answers.rows) != len(questions):
        # Some were left out, so that lines are no numbers of questions.
        return
    found = [(row, row.get("score")) for row in rows if row.get("line") is not None]
    kinds = (
        [row for row, score in found if score is not None and score >= 0.5],
        [row for row, score in found if score is not None and score < 0.5],
        [row for row, score in found if score is None],
    )
    for kind in kinds:
        for row in kind[:: max(1, len(kind) // SHOWN)][:SHOWN]:
            question, answer = questions[row["line"]], answers.rows[row["line"]]
            expected = next((str(row[name]) for name in _EXPECTED if row.get(name) is not None), "")
            score = row.get("score")
            yield Example(one.name, question.text, _picture(question), answer.text, expected, None if score is None else float(score))


def _picture(question: Question) -> Path | bytes | None:
    """The first of them: benchmarks have one a question."""
    first = next(iter(question.images), None)
    return first if first is None or isinstance(first, Path) else image_bytes(question)


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    """Raises UserError when `out` cannot be written, or holds the scores of another model."""
    ready_to_write(out / SCORES, "--out")
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
