"""How far a build is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastllava.console.speaker import Say, speaker

_SAY_EVERY = 15.0


class Working:
    """The display of one build. A context manager."""

    def __init__(self, console: Console) -> None:
        self.say: Say = speaker(console)
        columns = (BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
        self._shown = console.is_terminal
        self._task: TaskID | None = None
        self._name, self._done, self._total, self._said = "", 0, 0, time.monotonic()

    def __enter__(self) -> Self:
        if self._shown:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, name: str, total: int) -> None:
        """Goes on to the next piece, of `total` bytes or records."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._name, self._done, self._total = name, 0, total
        self._task = self._bar.add_task(name, total=total)

    def advance(self, count: int) -> None:
        """Notes that so much more is done."""
        self._done += count
        if self._shown and self._task is not None:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            self.say(f"  {self._name}: {100 * self._done // max(1, self._total)} %")
