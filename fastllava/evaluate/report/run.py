"""What a run's folder holds, read for a report while the run may still go on: damaged lines are counted, and nothing is changed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.config import Config, check_config
from fastllava.disk import read_json_object
from fastllava.errors import UserError
from fastllava.evaluate.report.series import is_number
from fastllava.train.metrics.log import METRICS_FILE
from fastllava.train.metrics.summary import SUMMARY_FILE
from fastllava.train.state.checkpoint import RUN_CONFIG
from fastllava.train.state.resume import is_held
from fastllava.train.state.set_aside import SET_ASIDE

SCORES = "scores.json"
_MOST_STEPS = 2**53
_WORDS = {"complete": ("complete", "good"), "interrupted": ("stopped", "bad"), "failed": ("failed", "bad")}


@dataclass(frozen=True)
class Rows:
    """What metrics.jsonl holds."""

    steps: Sequence[Mapping[str, Any]]
    """Rows of optimizer steps, one a step, in their order; `step` is a whole number."""
    evaluations: Sequence[Mapping[str, Any]]
    """Rows of evaluations, in their order; `step` is the number of steps that were taken before."""
    damaged: int
    """Lines that are no rows."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells of it."""

    folder: Path
    written: Mapping[str, Any]
    """The config as the run wrote it down; empty where it is not there."""
    config: Config | None
    """The same, checked; None where this version does not take it, and `config_problem` says why."""
    config_problem: str
    summary: Mapping[str, Any]
    """run_summary.json; empty before the first process has ended."""
    rows: Rows
    running: bool
    set_aside: int
    """Samples that the run goes on without."""
    scores: Sequence[tuple[Path, Mapping[str, Any]]]
    """Every scores.json of this run, the newest last."""

    @property
    def stage(self) -> str:
        """pretrain or finetune."""
        return str(self.written.get("stage", "")) or "a stage that is not known"

    @property
    def taken(self) -> int:
        """Steps that metrics.jsonl tells of, those missing among them counted too."""
        return self.rows.steps[-1]["step"] + 1 if self.rows.steps else 0

    @property
    def status(self) -> tuple[str, str]:
        """A word for how it stands, and a mood: good, busy or bad."""
        if self.running:
            return "running", "busy"
        said = self.summary.get("status")
        if isinstance(said, str) and said in _WORDS and (said == "complete" or self.summary.get("steps") == self.taken):
            return _WORDS[said]
        return ("ended", "bad") if self.rows.steps else ("not begun", "bad")


def read_run(folder: Path) -> Run:
    """The run whose output_dir is `folder`. Raises UserError when it holds none."""
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name) and (folder.resolve().parent / RUN_CONFIG).is_file():
        raise UserError(f"RUN: {folder} is one checkpoint of a run; give the run's folder {folder.resolve().parent}")
    names = (METRICS_FILE, RUN_CONFIG, SUMMARY_FILE)
    if not any((folder / name).is_file() for name in names):
        below = sorted(path.name for path in folder.iterdir() if (path / RUN_CONFIG).is_file()) if folder.is_dir() else []
        mend = f"give {' or '.join(str(folder / name) for name in below[:4])}" if below else "give the output_dir of fastllava train"
        raise UserError(f"RUN: {folder} holds no run (no {', '.join(names[:-1])} or {names[-1]}); {mend}")
    summary = _object(folder / SUMMARY_FILE)
    said = summary.get("config")
    written = _object(folder / RUN_CONFIG) or (said if isinstance(said, dict) else {})
    config, problem = None, f"{RUN_CONFIG} is not there or is damaged"
    if written:
        try:
            config, problem = check_config(written), ""
        except UserError as error:
            problem = " ".join(str(error).split())
    aside = folder / SET_ASIDE
    return Run(
        folder,
        written,
        config,
        problem,
        summary,
        read_rows(folder / METRICS_FILE),
        is_held(folder),
        sum(bool(line.strip()) for line in aside.read_bytes().splitlines()) if aside.is_file() else 0,
        _scores(folder),
    )


def read_rows(path: Path) -> Rows:
    """The rows of a metrics.jsonl that may be written to at this moment; a last line without its end is none and not damaged.

    Of two rows of one step the later one holds.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    steps: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    damaged = 0
    for line in whole.split(b"\n") if whole else []:
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int or not 0 <= step < _MOST_STEPS:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
            continue
        if is_number(row.get("loss")):
            steps[step] = row
        elif "held_out_loss" in row or isinstance(row.get("samples"), list):
            evaluations[step] = row
        else:
            damaged += 1
            continue
        if "held_out_loss" in row:
            evaluations.setdefault(step, row)
    return Rows([steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)], damaged)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def _scores(folder: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """Every scores.json in the run's folder, one below it, or beside it when its `checkpoint` lies in the run's folder."""
    inside = [*folder.glob(SCORES), *folder.glob(f"*/{SCORES}")]
    beside = [*folder.resolve().parent.glob(SCORES), *folder.resolve().parent.glob(f"*/{SCORES}")]
    found: dict[Path, dict[str, Any]] = {}
    for path in (*inside, *beside):
        value = _object(path)
        if isinstance(value.get("benchmarks"), dict) and (path in inside or _lies_in(value.get("checkpoint"), folder)):
            found[path.resolve()] = value
    return sorted(found.items(), key=lambda item: item[0].stat().st_mtime_ns)


def _lies_in(checkpoint: Any, folder: Path) -> bool:
    try:
        return isinstance(checkpoint, str) and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False
