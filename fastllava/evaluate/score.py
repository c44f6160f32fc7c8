"""`fastllava score`: the official figures of an answers file, whoever wrote it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from fastllava.evaluate.benchmark import Benchmark, Score

_SHARES = {"accuracy", "precision", "recall", "f1", "yes_ratio"}


def score_file(benchmark: Benchmark, data: Path, answers: Path) -> Score:
    """The score of the answers in the file `answers`. `data` is the benchmark's own folder. Raises UserError."""
    return benchmark.score(benchmark.need(data), benchmark.read(answers))


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
        published = [f"{figure:g}" for figure in benchmark.published.values()] if headline else [""] * len(benchmark.published)
        shown.add_row(name, in_words(value, benchmark.unit if headline else 1.0), *published, style="bold" if headline else "")
    return shown


def in_words(value: float, unit: float = 1.0) -> str:
    """A figure as it is printed: counts whole, others with two digits, in the unit of papers where `unit` leads to it."""
    value *= unit
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def warnings(score: Score) -> Iterable[str]:
    """A line for each place where the official code would have given another figure."""
    return (f"warning: {warning}" for warning in score.warnings)
