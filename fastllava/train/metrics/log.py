"""What a run says while it goes: metrics.jsonl, optional backends, the progress display."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fastllava.config import Config
from fastllava.console.speaker import speaker
from fastllava.train.metrics.backends import ANSWERS, Backend
from fastllava.train.metrics.lines import Lines

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.damaged"
"""Gets the lines of metrics.jsonl that a resume finds to be no rows."""
_ALWAYS = ("step", "loss", "lr", "samples", "tokens", "supervised_tokens", "step_seconds", "data_wait_seconds")
"""What the row of a step holds as a number."""
EVAL_SECONDS = "eval_seconds"
"""What only the row of an evaluation holds."""
_ALWAYS_EVALUATED = ("step", EVAL_SECONDS)
_PLAIN_LINE_SECONDS = 10.0

Row = Mapping[str, Any]


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one an optimizer step, in their order; whatever else is there is left out."""
    return _sorted_out(output_dir)[0]


def read_evaluations(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that are of an evaluation, in their order; `step` is the number of steps taken before it."""
    return _sorted_out(output_dir)[1]


def _sorted_out(output_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[bytes]]:
    """The rows of metrics.jsonl: of steps, of evaluations, and the lines that are none; a last line cut short by a kill is neither."""
    path = output_dir / METRICS_FILE
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    rows: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    damaged = []
    for line in whole.split(b"\n") if whole else []:
        try:
            row = json.loads(line)
            of_step = EVAL_SECONDS not in row
            if not all(_is_number(row[key]) for key in (_ALWAYS if of_step else _ALWAYS_EVALUATED)):
                raise ValueError("no row")
            if int(row["step"]) != row["step"] or row["step"] < 0:
                raise ValueError("no step")
            (rows if of_step else evaluations)[row["step"]] = row
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged.append(line)
    return [rows[step] for step in sorted(rows)], [evaluations[step] for step in sorted(evaluations)], damaged


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Metrics:
    """Writes the row of each step and evaluation to metrics.jsonl, to the backends and to the screen. A context manager.

    A run that resumes at `first_step` first takes the rows from there on out of the file: they will be written again. But not that of
    an evaluation before that step if it is `whole`.
    """

    def __init__(self, config: Config, first_step: int, n_steps: int, console: Console, whole: Callable[[Row], bool] = bool) -> None:
        self._path = config.output_dir / METRICS_FILE
        self._n_steps = n_steps
        self._console, self._say = console, speaker(console)
        self._config = config
        rows, evaluations, self._damaged = _sorted_out(config.output_dir)
        evaluations = [row for row in evaluations if row["step"] < first_step or (row["step"] == first_step and whole(row))]
        # An evaluation comes before the step of its number.
        self._kept = sorted([*evaluations, *(row for row in rows if row["step"] < first_step)], key=lambda row: row["step"])
        self.evaluated = bool(evaluations) and evaluations[-1]["step"] == first_step
        """Whether the state that the run begins with here has been evaluated."""
        self._backends = [Backend(name, config, first_step) for name in dict.fromkeys(config.log.backends)]
        self._last_line = -math.inf
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(config.stage, total=n_steps, completed=first_step, figures="")
        self._started, self._first_step = time.monotonic(), first_step

    def __enter__(self) -> Self:
        self._set_damaged_lines_aside()
        beside = self._path.with_name(f".{self._path.name}.partial")
        beside.write_text("".join(json.dumps(row) + "\n" for row in self._kept), encoding="utf-8")
        beside.rename(self._path)
        self._lines = Lines(self._path, self._say)
        self._bar.start()
        if self.evaluated:
            for backend in self._backends:
                backend.write_again(for_backends(self._kept[-1]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._lines.close()
        for backend in self._backends:
            backend.close(after_failure=kind is not None)

    def _set_damaged_lines_aside(self) -> None:
        if not self._damaged:
            return
        with self._path.with_name(DAMAGED_FILE).open("ab") as file:
            file.writelines(line + b"\n" for line in self._damaged)
        what = "1 line is no row" if len(self._damaged) == 1 else f"{len(self._damaged)} lines are no rows"
        self._say(f"{self._path}: {what}: moved to {DAMAGED_FILE}")

    def write(self, row: Row) -> None:
        """Record one step."""
        self._put(row)
        mfu = f"mfu {100 * row['mfu']:.1f} %  " if "mfu" in row else ""
        figures = (
            f"loss {row['loss']:.4f}  norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['samples_per_second']:.1f} samples/s  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{mfu}wait {100 * row['data_wait_seconds'] / row['step_seconds']:.0f} %"
        )
        done = int(row["step"]) + 1
        self._bar.update(self._task, completed=done, figures=figures)
        if not self._console.is_terminal and (done == self._n_steps or time.monotonic() - self._last_line >= _PLAIN_LINE_SECONDS):
            self._last_line = time.monotonic()
            left = (self._last_line - self._started) / (done - self._first_step) * (self._n_steps - done)
            line = f"{self._config.stage} step {done}/{self._n_steps}  {figures}  {left / 60:.1f} min left"
            self._say(line)

    def write_evaluation(self, row: Row) -> None:
        """Record one evaluation."""
        self._put(row)
        parts = []
        if "held_out_loss" in row:
            loss = "is not finite" if row["held_out_loss"] is None else f"{row['held_out_loss']:.4f}"
            parts.append(f"held-out loss {loss} ({row['held_out_samples']:,} samples, {row['held_out_tokens']:,} tokens)")
        if "samples" in row:
            parts.append(f"{len(row['samples'])} questions answered")
        self._say(f"evaluated before step {row['step']}/{self._n_steps}: {', '.join(parts)}, in {row[EVAL_SECONDS]:.1f} s")

    def _put(self, row: Row) -> None:
        self._lines.write(json.dumps(row))
        for backend in self._backends:
            backend.write(for_backends(row))


def for_backends(row: Row) -> Row:
    """The numbers of a row, and the questions with their answers."""
    return {key: value for key, value in row.items() if isinstance(value, int | float) or (key == ANSWERS and isinstance(value, list))}


class DeviceScalars:
    """A few scalars on their way to the host; `read` waits for these alone, not for work queued after them."""

    def __init__(self, *scalars: Tensor) -> None:
        values = torch.stack(scalars)
        self._event = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
