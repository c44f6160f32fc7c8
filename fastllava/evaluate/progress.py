"""How far the answers are: a bar on a terminal, a line now and then elsewhere."""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fastllava.console.speaker import speaker

_SECONDS = 10.0
"""Between two lines."""


class Progress:
    """Counts up to `total`, of which `done` are from an earlier start."""

    def __init__(self, what: str, done: int, total: int, console: Console) -> None:
        self._what, self._done, self._first, self._total, self._console = what, done, done, total, console
        self._began, self._line_at = time.monotonic(), -math.inf
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Bar(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=done, speed="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count `count` more."""
        self._done += count
        now = time.monotonic()
        speed = (self._done - self._first) / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=self._done, speed=f"{speed:.1f}/s")
        if not self._console.is_terminal and (self._done >= self._total or now - self._line_at >= _SECONDS):
            self._line_at = now
            left = (self._total - self._done) / speed / 60
            speaker(self._console)(f"{self._what} {self._done:,}/{self._total:,}  {speed:.1f}/s  {left:.1f} min left")
