"""A thread that ends a run which has come to a standstill, or whose other processes have gone, and says where it stood.

The main thread says what it is at, and that is all it does for the watch. `standstill` says what counts as one. Every process
then writes its stacks to stderr, one of them what was found, and all end.
"""

import faulthandler
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from rich.console import Console

from fastllava.data.workers import Board, kill, process_state
from fastllava.distributed.processes import Processes
from fastllava.train.watch.beats import Exchange
from fastllava.train.watch.standstill import TICK_SECONDS, Beat, Judge, Motion, Phase

STUCK = 75
"""Exit code, EX_TEMPFAIL of sysexits.h: start the same command again."""
ENDED = 2
"""Exit code after another process has ended, whose error the user sees."""


_GRACE_SECONDS = 5.0
"""For the main thread to end by itself when another process has ended, before this thread ends all."""
_GRACE_WRITING_SECONDS = 600.0
_LAST_SECONDS = 1.0
"""For all processes to have written their stacks, before one ends and torchrun ends the others."""


class Watchdog:
    """Watches the run between `__enter__` and `__exit__`. Without `seconds` it looks for processes that have ended only."""

    def __init__(self, seconds: float | None, group: Processes, workers: int) -> None:
        self.board = Board(workers)
        self.sample_in_words: Callable[[int], str] = lambda number: f"record number {number} of data.records"
        """A name for the number on the board: of a record as long as the run prepares its data, then of a sample."""
        self.goes_on: Callable[[], str] = lambda: "the same command starts anew"
        """Where from, when the run has to end."""
        self._seconds, self._group = seconds or math.inf, group
        self._tick = min(TICK_SECONDS, self._seconds / 10)
        self._phase, self._marks, self._steps, self._evaluations = Phase.STARTING, 0, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._exchange: Exchange | None = None

    def now(self, phase: Phase) -> None:
        """The main thread is at this from here on."""
        self._phase = phase
        self._marks += 1
        self._steps += phase is Phase.STEPPING
        self._evaluations += phase is Phase.EVALUATING

    @contextmanager
    def reads(self, board: Board, sample_in_words: Callable[[int], str]) -> Iterator[None]:
        """A block in which the data workers are others than else, on a board of their own."""
        before = self.board, self.sample_in_words
        self.board, self.sample_in_words = board, sample_in_words
        try:
            yield
        finally:
            self.board, self.sample_in_words = before

    def __enter__(self) -> Self:
        if self._group.world > 1:
            try:
                self._exchange = Exchange(self._group)
            except OSError as error:
                line = f"train.watchdog_seconds: process {self._group.rank} cannot reach process 0 ({error}); neither watches the other"
                Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)
        if self._exchange is not None or self._seconds < math.inf:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._exchange is not None:
            self._exchange.send({"end": "bye" if kind is None else "failed"})
            self._exchange.close()

    def _watch(self) -> None:
        judge, motion = Judge(self._seconds, self._group, self._exchange), Motion(self._tick)
        while not self._over.wait(self._tick):
            phase = self._phase
            begun = self._evaluations if phase is Phase.EVALUATING else self._steps
            if motion.look(phase, self._marks, begun, self.board.state()):
                judge.begin_again(motion.at)
            # While it starts it may read records, one after another.
            waits = phase is Phase.FETCHING or (phase is Phase.STARTING and bool(self.board.reading()))
            trouble = self._trouble(motion.waited) if waits and motion.waited > self._seconds else None
            verdict = judge.verdict(Beat(motion.moves, phase, trouble), motion.at)
            if verdict is not None:
                self._end_stuck(verdict, judge)
            grace = _GRACE_WRITING_SECONDS if phase is Phase.WRITING else _GRACE_SECONDS
            if judge.ended_at is not None and motion.at - judge.ended_at > grace:
                kill(multiprocessing.active_children())
                os._exit(ENDED)

    def _trouble(self, seconds: float) -> str:
        """What is wrong with this process, whose workers have not moved for so long."""
        stopped = [str(child.pid) for child in multiprocessing.active_children() if process_state(child.pid or 0) in ("T", "t")]
        reading = [self.sample_in_words(sample) for sample in self.board.reading().values()]
        where = f"which read {', '.join(reading)}" if reading else "which read nothing"
        if stopped:
            where += f"; worker {', '.join(stopped)} is stopped"
        who = f"process {self._group.rank}" if self._group.world > 1 else "the run"
        whom = "its data workers" if self._phase is Phase.FETCHING else "what prepares its data"
        return f"{who} has waited {seconds:.0f} s for {whom}, {where}"

    def _end_stuck(self, verdict: str, judge: "Judge") -> None:
        """Say where everything stands, and end this process; it does not return."""
        _write(f"watchdog: stacks of process {self._group.rank}, which is {self._phase.value}\n")
        with suppress(Exception):
            faulthandler.dump_traceback(file=2, all_threads=True)
        workers = multiprocessing.active_children()
        for worker in workers:
            with suppress(OSError):
                os.kill(worker.pid or 0, signal.SIGUSR1)
        time.sleep(_LAST_SECONDS)
        if judge.tells:
            _write(f"error: train.watchdog_seconds: {verdict}; the run has ended, {self.goes_on()}\n")
        kill(workers)
        judge.kill_silent()
        os._exit(STUCK)


def _write(text: str) -> None:
    """To stderr, past its buffers: whoever hangs may hold them."""
    with suppress(OSError):
        os.write(2, text.encode(errors="replace"))
