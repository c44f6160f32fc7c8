"""The demo's report: a table on the screen, report.html (all in one file), report.json, and a sheet of answered pictures."""

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from fastllava.demo.answers import OVERALL, Accuracy
from fastllava.demo.backbones import write_json
from fastllava.demo.questions import Question
from fastllava.train.metrics.summary import LOSS_PLOT

SHEET = "answers.png"
_COLUMNS, _ROWS = 4, 3
_HEADINGS = ("question type", "questions", "majority answer", "before", "after")
_STYLE = (
    "body {font: 16px sans-serif; max-width: 60em; margin: 2em auto} td, th {padding: .2em 1em; text-align: right} img {max-width: 100%}"
)


@dataclass(frozen=True)
class Example:
    """A held-out question with both answers."""

    image: Path
    question: Question
    before: str
    after: str


def print_accuracy(accuracy: Accuracy, console: Console) -> None:
    """The share of right answers by question type."""
    table = Table(
        "question type", "questions", "majority answer", "before", "after", title="right answers on pictures the model has not seen"
    )
    for kind, *figures in _rows(accuracy):
        table.add_row(kind, *figures, style="bold" if kind == OVERALL else "")
    console.print(table)


def write_report(out: Path, accuracy: Accuracy, examples: Sequence[Example], runs: Sequence[Path], seconds: float) -> Path:
    """Write report.json, answers.png and report.html into `out`; the path of the last. `runs`: the stages' output_dirs."""
    shown = pick(examples, _COLUMNS * _ROWS)
    write_sheet(out / SHEET, shown)
    write_json(out / "report.json", {"seconds": seconds, **asdict(accuracy)})
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(accuracy))
    plots = "".join(f"<h2>Loss of stage {number}</h2>{_embedded(run / LOSS_PLOT)}" for number, run in enumerate(runs, 1))
    page = f"""<!doctype html><meta charset="utf-8"><title>fastllava demo</title>
<style>{_STYLE}</style>
<h1>fastllava demo</h1>
<p>Both stages in {seconds:.0f} seconds. Right answers on pictures of scenes that were not in training:</p>
<table><tr><th>{"<th>".join(_HEADINGS)}</tr>{rows}</table>
<h2>Some answers</h2>{_embedded(out / SHEET)}{plots}
<p>Checkpoint: <code>{html.escape(str(runs[-1]))}</code></p>
"""
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def pick(examples: Sequence[Example], number: int) -> list[Example]:
    """At most `number` examples of different pictures, the question types taking turns; wrong answers are picked like right ones."""
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.question.kind, []).append(example)
    picked: dict[Path, Example] = {}
    for _ in range(number):
        for kind in by_kind.values():
            fresh = next((example for example in kind if example.image not in picked), None)
            if fresh is not None and len(picked) < number:
                picked[fresh.image] = fresh
    return list(picked.values())


def write_sheet(path: Path, examples: Sequence[Example]) -> None:
    """One PNG of pictures with question, answer before and after; the answer after is green when right, red when wrong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * _COLUMNS, 3.7 * _ROWS), layout="constrained")
    for axes, example in zip(figure.subplots(_ROWS, _COLUMNS).flat, examples, strict=False):
        with Image.open(example.image) as image:
            axes.imshow(image)
        right = example.after == example.question.answer
        axes.set_title(f"{example.question.text}\nbefore: {_shown(example.before)}", fontsize=9)
        axes.set_xlabel(f"after: {_shown(example.after)}", color="green" if right else "red", fontsize=11)
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def _shown(answer: str) -> str:
    """An answer's beginning, fit to print: an untrained model says anything."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in answer[:24]) or "(nothing)"


def _rows(accuracy: Accuracy) -> list[tuple[str, str, str, str, str]]:
    kinds = sorted(accuracy.questions, key=lambda kind: (kind == OVERALL, kind))
    shares = (accuracy.majority, accuracy.before, accuracy.after)
    return [(kind, str(accuracy.questions[kind]), *(f"{share[kind]:.1%}" for share in shares)) for kind in kinds]  # pyright: ignore[reportReturnType]


def _embedded(path: Path) -> str:
    if not path.exists():
        return ""
    return f'<img alt="{path.name}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
