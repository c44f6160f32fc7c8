"""The page of a run: `fastllava report RUN` writes it."""

from pathlib import Path

from fastllava.data.prepared_set import PreparedSet
from fastllava.disk import ready_to_write
from fastllava.errors import UserError
from fastllava.evaluate.report import data, recipe, samples, training, world
from fastllava.evaluate.report.page import Head, Section, write_page
from fastllava.evaluate.report.run import Run, read_run
from fastllava.evaluate.report.scores import scores_body

REPORT = "report.html"
STAGES = {"pretrain": "Stage 1, pretrain", "finetune": "Stage 2, finetune"}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `folder`, into that folder or to the file `out`; its path. The run may still go on.

    Raises UserError when the folder holds no run or the page cannot be written.
    """
    run = read_run(folder)
    if out is not None and out.is_dir():
        raise UserError(f"--out: {out} is a folder; give the name of a file, such as {out / REPORT}")
    ready_to_write(out or folder / REPORT, "--out")
    head, sections = page_of(run)
    return write_page(out or folder / REPORT, head, sections)


def page_of(run: Run) -> tuple[Head, list[Section]]:
    """What the page of a run says."""
    try:
        prepared = data.find_prepared(run)
    except UserError as error:
        prepared = error
    planned = data.planned_steps(run, prepared if isinstance(prepared, PreparedSet) else None)
    word, mood = run.status
    name = run.folder.resolve().name
    title = STAGES.get(run.stage, run.stage) + (f": {name}" if name != run.stage else "")
    notices = [*training.notices(run, planned), *recipe.notices(run)]
    head = Head(title, str(run.folder.resolve()), word, mood, training.tiles(run, planned), notices)
    parts = [
        *(
            Section(f"scores-{n}" if n else "scores", f"Scores: {path.parent.name}", scores_body(found))
            for n, (path, found) in enumerate(run.scores)
        ),
        training.section(run),
        samples.section(run),
        data.section(run, prepared),
        recipe.section(run),
        world.section(run),
    ]
    return head, [part for part in parts if part is not None]
