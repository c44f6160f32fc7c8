"""`fastllava bench report`: the tables that committed results are behind, in docs/ and kernels/README.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benches import kernel_report, plan_report, step_report
from benches.results import RESULTS, between_markers
from fastllava.errors import UserError

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Generated:
    """A part of a text that results are behind."""

    readme: str
    """Path of the text, from the root."""
    marker: str
    """Of `<!-- marker: begin -->`."""
    table: Callable[[Path], str]
    """Markdown from the folder of results."""


TABLES: Sequence[Generated] = (
    Generated("docs/planning.md", "plan", plan_report.table),
    Generated("docs/benchmarks.md", "bench peers", step_report.table),
    Generated("docs/benchmarks.md", "bench step", step_report.steps_table),
    Generated("kernels/README.md", "bench kernels", kernel_report.table),
)


def generate(text: str, tables: Sequence[Generated], results: Path) -> str:
    """`text` with every table anew. Raises ValueError where a table has no markers."""
    for each in tables:
        text = between_markers(text, each.marker, each.table(results))
    return text


def write(root: Path = REPO, results: Path = RESULTS, tables: Sequence[Generated] = TABLES) -> list[Path]:
    """Write every table of the texts under `root` from `results`; the texts. Raises UserError where markers are missing."""
    written = []
    for name in dict.fromkeys(each.readme for each in tables):
        path = root / name
        try:
            text = generate(path.read_text(encoding="utf-8"), [each for each in tables if each.readme == name], results)
        except ValueError as error:
            raise UserError(f"{path}: {error}; put them where the table goes") from None
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def charts(folder: Path, results: Path = RESULTS) -> list[Path]:
    """The charts of all results, those of each file in a folder of `folder` that is called as the file is."""
    return [path for module in (kernel_report, step_report) for path in module.charts_of_results(folder, results)]
