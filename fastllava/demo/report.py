"""The demo's report: a table on the screen, report.html (all in one file), report.json, and a sheet of answered pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastllava.demo.answers import OVERALL, Accuracy
from fastllava.demo.backbones import write_json
from fastllava.demo.questions import Question
from fastllava.evaluate.report.page import Head, Section, Tile, fill, write_page
from fastllava.evaluate.report.pictures import address_of
from fastllava.evaluate.report.run import read_run
from fastllava.evaluate.report.training import duration
from fastllava.evaluate.report.write import page_of

SHEET = "answers.png"
_COLUMNS, _ROWS = 4, 3
_HEADINGS = ("question type", "questions", "majority answer", "before", "after")


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
    head = Head(
        "fastllava demo",
        f"Both stages of LLaVA-1.5 in miniature; the checkpoint is {runs[-1]}",
        "complete",
        tiles=[
            Tile("right answers, after training", f"{accuracy.after[OVERALL]:.1%}", "on pictures of scenes that were not in training"),
            Tile("before training", f"{accuracy.before[OVERALL]:.1%}"),
            Tile("the majority answer", f"{accuracy.majority[OVERALL]:.1%}", "each question type's most frequent answer, always given"),
            Tile("time", duration(seconds), "drawing, backbones, both stages and answers"),
        ],
    )
    table = fill("table.html", headings=_HEADINGS, rows=_rows(accuracy), note="Shares of exactly right answers.", strong=OVERALL)
    sheet = Markup('<div class="card wide"><img alt="{}" src="{}"></div>').format(SHEET, address_of("png", (out / SHEET).read_bytes()))
    sections = [Section("accuracy", "Right answers", table), Section("answers", "Some answers", sheet)]
    # The last stage is the one that people look at; its scores stand first.
    for number, run in reversed(list(enumerate(runs, 1))):
        stage, parts = page_of(read_run(run))
        sections.append(Section(f"stage-{number}", stage.title, fill("head.html", head=stage)))
        sections += [Section(f"stage-{number}-{part.anchor}", f"Stage {number}: {part.title}", part.body, listed=False) for part in parts]
    return write_page(out / "report.html", head, sections)


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
    places = figure.subplots(_ROWS, _COLUMNS).flat
    for axes in places[len(examples) :]:
        axes.set_axis_off()
    for axes, example in zip(places, examples, strict=False):
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
