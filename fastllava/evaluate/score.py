"""`fastllava score`: the official figures of an answers file, whoever wrote it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastllava.console.speaker import Say
from fastllava.errors import UserError
from fastllava.evaluate.answers import Answers
from fastllava.evaluate.benchmark import Benchmark, JudgedBenchmark, Score
from fastllava.evaluate.judge import Judge, make_judge


def score_file(benchmark: Benchmark, data: Path, answers: Path, judge: Judge | None = None, rules: Path | None = None) -> Score:
    """The score of the answers in the file `answers`. `data` is the benchmark's own folder. Raises UserError."""
    return graded(benchmark, benchmark.need(data), benchmark.read(answers), judge, rules)


def judge_for(
    benchmark: Benchmark, replies: Sequence[Path], model: str | None, base_url: str | None, cache: Path, runs: int, say: Say
) -> Judge | None:
    """The judge that the options stand for; None where they are left out. Raises UserError, also for a benchmark that needs none."""
    if not replies and model is None and base_url is None:
        return None
    if not isinstance(benchmark, JudgedBenchmark):
        raise UserError(f"{benchmark.name}: rules score it, and no judge; leave out --replies, --judge and --base-url")
    return make_judge(replies, model, base_url, cache, runs, say)


def upload_files(benchmark: Benchmark, data: Path, answers: Path, out: Path) -> list[Path]:
    """Write what the benchmark's server takes of the answers in the file `answers` into the folder `out`. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--upload: {out} cannot be a folder ({error.strerror}); give another one") from None
    written = benchmark.upload(benchmark.need(data), benchmark.read(answers), out)
    if not written:
        raise UserError(f"{benchmark.name}: there is no server to upload to; leave out --upload")
    return written


def graded(benchmark: Benchmark, data: Path, answers: Answers, judge: Judge | None, rules: Path | None = None) -> Score:
    """What `answers` are worth: by the judge where the benchmark is a judged one, by its rules where not. Raises UserError."""
    if not isinstance(benchmark, JudgedBenchmark):
        return benchmark.score(data, answers)
    return benchmark.score(data, answers) if judge is None else benchmark.judged(data, answers, judge, rules)


def as_json(benchmark: Benchmark, score: Score) -> dict[str, Any]:
    """What `--json` writes: `benchmark`, `figures`, `questions`, and `warnings` where there are any."""
    found = {"benchmark": benchmark.name, "figures": dict(score.figures), "questions": score.questions}
    if score.judge is not None:
        found["judge"] = dict(score.judge)
    return {**found, "warnings": score.warnings} if score.warnings else found


def table(benchmark: Benchmark, score: Score) -> Table:
    """Every figure of `score`, and beside the one that papers print the original's."""
    shown = Table("figure", "value", *(f"LLaVA-1.5 {size.upper()}" for size in benchmark.published), title=benchmark.title)
    for name, value in score.figures.items():
        headline = name == benchmark.headline
        published = [f"{figure:.1f}" for figure in benchmark.published.values()] if headline else [""] * len(benchmark.published)
        shown.add_row(name, in_words(value, benchmark.unit if headline else 1.0), *published, style="bold" if headline else "")
    return shown


def in_words(value: float, unit: float = 1.0) -> str:
    """A figure as it is printed: counts whole, others with two digits, in the unit of papers where `unit` leads to it."""
    return f"{value:,}" if isinstance(value, int) else f"{value * unit:.2f}"


def notes(score: Score) -> Iterable[str]:
    """Who judged, and a line for each place where the official code would have given another figure."""
    if score.judge is not None:
        yield str(score.judge["note"])
    yield from (f"warning: {warning}" for warning in score.warnings)
