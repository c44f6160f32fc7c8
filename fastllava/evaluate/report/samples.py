"""What the model answered to the same questions over the steps of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastllava.data.checks import BadRecord
from fastllava.data.images import resolve_image
from fastllava.evaluate.report.page import Section, fill
from fastllava.evaluate.report.pictures import Picture, picture_of
from fastllava.evaluate.report.run import Run

QUESTIONS = 12
"""Questions that are shown at most."""
STEPS = 8
"""Answers to each that are shown at most: the first, the last and others from all over the run."""


def section(run: Run) -> Section | None:
    """The answers; None where the run has given none."""
    evaluations = [row for row in run.rows.evaluations if isinstance(row.get("samples"), list)]
    by_question: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in evaluations:
        for place, one in enumerate(row["samples"]):
            if isinstance(one, dict):
                name = f"{one.get('id', place)}\n{one.get('question', '')}\n{place}"
                by_question.setdefault(name, {})[row["step"]] = one
    if not by_question:
        return None
    cards = [_card(run, answers) for answers in list(by_question.values())[:QUESTIONS]]
    body = fill("samples.html", cards=cards, shown=len(cards), total=len(by_question), evaluations=len(evaluations), most=STEPS)
    return Section("answers", "Sample answers over steps", body)


def _card(run: Run, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    steps = spread(sorted(answers), STEPS)
    one = answers[steps[-1]]
    reference = one.get("reference")
    rows = [(step, answers[step].get("answer"), _is_same(answers[step].get("answer"), reference)) for step in steps]
    return {"question": one.get("question", ""), "reference": reference, "rows": rows, "pictures": _pictures(run, one.get("image"))}


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, the first and the last among them, the others at equal distances."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _is_same(answer: Any, reference: Any) -> bool:
    return isinstance(answer, str) and isinstance(reference, str) and answer.strip() == reference.strip()


def _pictures(run: Run, image: Any) -> list[Picture]:
    """Those of a path, or of a list of several."""
    return [_picture(run, one) for one in (image if isinstance(image, list) else [image]) if isinstance(one, str)]


def _picture(run: Run, image: str) -> Picture:
    data = None if run.config is None else run.config.data
    if data is None or data.images is None:
        return Picture(None, problem="the run's config does not say where pictures lie")
    try:
        return picture_of(resolve_image(data.images.resolve(), image, data.follow_links), data)
    except BadRecord as problem:
        return Picture(None, problem=problem.detail)
