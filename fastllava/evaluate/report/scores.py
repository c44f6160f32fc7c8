"""A checkpoint's scores beside the published ones: the page of `fastllava eval`, and the part of a run's page."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastllava.evaluate.report.page import Head, Notice, Section, fill, write_page
from fastllava.evaluate.report.pictures import Picture, picture_of
from fastllava.evaluate.report.series import is_number

SHOWN = 6
"""Answers of a benchmark that are shown at most of each kind: right ones, and wrong ones."""
_NO_SCORES = re.compile(r"(img_)?count|.+\.(tp|fp|tn|fn|yes_ratio)")
"""Figures that count something."""
_PREFERRED = ("f1", "accuracy", "score")
SIZES = ("7b", "13b")


@dataclass(frozen=True)
class Example:
    """An answer to show, with its question and picture."""

    benchmark: str
    """As `--benchmarks` takes it."""
    question: str
    picture: Path | bytes | None
    answer: str
    expected: str
    """What would have been right; empty where there is no such thing."""
    right: float | None
    """The share of the points that it got, in [0, 1]; None where that is not known."""


def write_scores_page(out: Path, scores: Mapping[str, Any], examples: Iterable[Example] = ()) -> Path:
    """Write the page of an evaluation to the file `out`; `out` again. Raises OSError.

    `scores` is the content of scores.json: `checkpoint`, and `benchmarks` by name, each with `title`, `figures`, `headline`, `value`
    (the headline in the unit that papers print), `unit` (what a figure is multiplied by for that), and where they are known
    `published` (by size), `noise`, `server`, `warnings`. What is missing is left out of the page.

    Of each benchmark's `examples` at most SHOWN right and SHOWN wrong ones are shown, the first; pictures are read for these alone.
    """
    found = _benchmarks(scores)
    notices = [Notice(f"{_title(name, one)}: {line}", serious=True) for name, one in found.items() for line in _warnings(one)]
    sections = [Section("scores", "Scores", scores_body(scores)), *_example_sections(found, list(examples))]
    head = Head("Evaluation", f"checkpoint {scores.get('checkpoint', '')}", tiles=(), notices=notices)
    return write_page(out, head, sections)


def scores_body(scores: Mapping[str, Any]) -> Markup:
    """The table of the scores beside the published ones, and a chart for each benchmark's categories."""
    found = _benchmarks(scores)
    rows = [_row(name, one) for name, one in found.items()]
    charts = [chart for name, one in found.items() for chart in _charts(_title(name, one), one)]
    figures = [(_title(name, one), _all_figures(one)) for name, one in found.items()]
    return fill(
        "scores.html",
        rows=rows,
        sizes=SIZES,
        charts=charts,
        figures=figures,
        published=any(any(row["published"]) for row in rows),
        noisy=any(row["noise"] for row in rows),
    )


def _benchmarks(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = scores.get("benchmarks")
    return {str(name): one for name, one in found.items() if isinstance(one, Mapping)} if isinstance(found, Mapping) else {}


def _row(name: str, one: Mapping[str, Any]) -> dict[str, Any]:
    value, published = _number(one.get("value")), one.get("published")
    by_size = {size: _number(published.get(size)) if isinstance(published, Mapping) else None for size in SIZES}
    return {
        "title": _title(name, one),
        "headline": one.get("headline", ""),
        "value": one.get("status") or "no score" if value is None else f"{value:,.1f}",
        "published": ["" if by_size[size] is None else f"{by_size[size]:,.1f}" for size in SIZES],
        "noise": one.get("noise") or "",
        "note": one.get("words") or _judge(one) or (one.get("server") if value is None else "") or "",
        "warnings": len(_warnings(one)),
    }


def _warnings(one: Mapping[str, Any]) -> list[str]:
    warnings = one.get("warnings")
    return [str(line) for line in warnings] if isinstance(warnings, list) else []


def _judge(one: Mapping[str, Any]) -> str:
    judge = one.get("judge")
    return str(judge.get("note") or "") if isinstance(judge, Mapping) else ""


def _charts(title: str, one: Mapping[str, Any]) -> list[Markup]:
    """A chart of the figures that categories have, and one of the others where there are several."""
    from fastllava.evaluate.report.charts import bar_chart

    unit = _number(one.get("unit"))
    unit = 1.0 if unit is None else unit
    figures = {name: unit * value for name, value in _figures(one).items() if not _NO_SCORES.fullmatch(name)}
    most = 100.0 if figures and max(figures.values()) <= 100 else None
    words = "points" if most is None else "percent"
    plain = {name: value for name, value in figures.items() if "." not in name}
    charts = []
    if len(plain) > 1:
        charts.append(bar_chart(title, words, plain, most))
    for heading, values in _by_category({name: value for name, value in figures.items() if "." in name}):
        end = 100.0 if max(values.values()) <= 100 else None
        charts.append(bar_chart(f"{title}: {heading}", "points" if most is None else "percent", values, end))
    return charts


def _by_category(figures: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    """Figures named KIND.CATEGORY, by kind; of figures named CATEGORY.FIGURE the one that says most, by category."""
    before: dict[str, dict[str, float]] = {}
    after: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        first, _, last = name.partition(".")
        before.setdefault(first, {})[last] = value
        after.setdefault(last, {})[first] = value
    preferred = next((name for name in _PREFERRED if len(after.get(name, {})) > 1), None)
    if preferred is not None:
        return [(preferred, after[preferred])]
    return [(f"by {kind}", values) for kind, values in before.items()]


def _all_figures(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:,.6g}") for name, value in _figures(one).items()]


def _figures(one: Mapping[str, Any]) -> dict[str, float]:
    figures = one.get("figures")
    numbers = {str(name): _number(value) for name, value in figures.items()} if isinstance(figures, Mapping) else {}
    return {name: value for name, value in numbers.items() if value is not None}


def _example_sections(found: Mapping[str, Mapping[str, Any]], examples: Sequence[Example]) -> list[Section]:
    sections = []
    for name in dict.fromkeys(example.benchmark for example in examples):
        of_it = [example for example in examples if example.benchmark == name]
        right = [example for example in of_it if example.right is not None and example.right >= 0.5]
        wrong = [example for example in of_it if example.right is not None and example.right < 0.5]
        unjudged = [example for example in of_it if example.right is None]
        cards = [_card(example) for example in (*right[:SHOWN], *wrong[:SHOWN], *unjudged[:SHOWN])]
        body = fill("examples.html", cards=cards)
        sections.append(Section(f"answers-{len(sections)}", f"Some answers: {_title(name, found.get(name, {}))}", body))
    return sections


def _card(example: Example) -> dict[str, Any]:
    score = example.right
    words = "not judged" if score is None else "right" if score == 1 else "wrong" if score == 0 else f"{score:.2g} of 1"
    mood = "unjudged" if score is None else "right" if score >= 0.5 else "wrong"
    picture = Picture(None) if example.picture is None else picture_of(example.picture)
    return {"picture": picture, "example": example, "words": words, "mood": mood}


def _title(name: str, one: Mapping[str, Any]) -> str:
    return str(one.get("title") or name)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if is_number(value) and math.isfinite(value) else None
