"""What workers build, in order: they hold no state, so when one dies they are started anew and the same follows."""

import gc
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fastllava.data.workers import Board, begin_worker, children, in_words, kill, stops_held
from fastllava.disk import in_words as bytes_in_words
from fastllava.errors import UserError

Report = Callable[[str], None]
Place = TypeVar("Place")

_DEATHS = 3
"""Workers that die at one sample before it is taken to be what kills them."""
_DEATH_SECONDS = 2.0
"""A broken connection is seen before the end of the worker behind it is."""
_CLOSE_SECONDS = 1.0
"""It takes milliseconds, or for ever."""
_BEGIN_SECONDS = 15.0
"""For a worker to begin, which takes milliseconds; three times that is less than the watchdog waits."""
_LOOK_SECONDS = 0.005
_SHARED = Path("/dev/shm")  # noqa: S108 (where Linux keeps shared memory)


class WorkerDied(RuntimeError):
    """A worker ended without being asked to: how, and the sample that it was reading, if any."""


class Feed(Generic[Place]):
    """What `dataset` makes of the jobs, page-locked when `pin`. `jobs_from(place)` yields those from a place on.

    `said_of(sample)` puts into words what stands on the workers' `board`. Without `workers` all is done here.
    """

    def __init__(
        self,
        dataset: Dataset,
        jobs_from: Callable[[Place], Iterator[Any]],
        first: Place,
        workers: int,
        board: Board,
        said_of: Callable[[int], str],
        *,
        pin: bool,
        report: Report,
    ) -> None:
        self._dataset, self._jobs_from, self._n_workers = dataset, jobs_from, workers
        self._board, self._said_of, self._pin, self._report = board, said_of, pin, report
        self._workers: tuple[BaseProcess, ...] = ()
        self._deaths: Counter[Any] = Counter()
        self._start(first)

    def take(self, place: Place) -> Any:
        """What was built of the job at `place`, the next in order. Raises UserError when workers die of one thing again and again."""
        while True:
            try:
                return self._next()
            except WorkerDied as died:
                how, sample = died.args
            message = f"data.workers: a worker was {how}" + ("" if sample is None else f" while it read {self._said_of(sample)}")
            self.close()
            of = place if sample is None else sample
            self._deaths[of] += 1
            if self._deaths[of] == _DEATHS:
                raise UserError(
                    f"{message}, for the third time; free memory, write fewer data.workers, or look at what it read, "
                    "and start the same command again"
                )
            self._report(f"{message}; started again, nothing is lost")
            self._start(place)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        kill(self._workers)
        gc.unfreeze()
        with suppress(ValueError):  # in another thread than the main one nothing was set
            signal.signal(signal.SIGCHLD, self._sigchld)
        # PyTorch's own way to end takes locks that a worker may have been killed with, so nobody waits for it.
        last, self._built = [self._built], iter(())
        thread = threading.Thread(target=last.clear, daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)

    def _start(self, place: Place) -> None:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._jobs_from(place),  # pyright: ignore[reportArgumentType] (any iterable will do)
            num_workers=self._n_workers,
            prefetch_factor=4 if self._n_workers else None,
            pin_memory=self._pin,
            worker_init_fn=partial(_in_worker, os.getpid(), self._board),
        )
        self._waiting, self._begun, others = False, False, children()
        self._board.clear()
        # What has been loaded by now is shared with the workers, until a garbage collector looks at it, here or there.
        gc.freeze()
        self._sigchld = signal.getsignal(signal.SIGCHLD)
        try:
            with stops_held():
                self._built: Iterator[Any] = iter(loader)
        except BaseException as error:
            kill(children() - others)
            if isinstance(error, OSError):
                raise no_workers(f"workers cannot be started ({error.strerror or error})") from None
            raise
        self._workers = tuple(children() - others)
        with suppress(ValueError):
            # In place of PyTorch's handler, which raises wherever this process is, perhaps within the optimizer's step.
            signal.signal(signal.SIGCHLD, self._on_child)

    def _next(self) -> Any:
        try:
            self._waiting = True
            self._check()
            self._see_workers_begin()
            return next(self._built)
        except WorkerDied:
            raise
        except (RuntimeError, ConnectionError, EOFError):
            self._waiting = False
            self._check(_DEATH_SECONDS)
            raise
        finally:
            self._waiting = False

    def _see_workers_begin(self) -> None:
        """Wait for all workers to begin. Raises WorkerDied when one does not.

        Python 3.11, not 3.12, may hang in the child within `os.fork`, when a library's thread (as gloo's, after a collective) holds the
        lock of the interpreter's list of threads at that moment: once in some thousand forks (github.com/python/cpython/issues/112275).
        """
        end = time.monotonic() + _BEGIN_SECONDS
        while not (self._begun or {worker.pid for worker in self._workers} <= self._board.begun()):
            if time.monotonic() >= end:
                raise WorkerDied(f"hanging ever since it was started {_BEGIN_SECONDS:.0f} s ago", None)
            time.sleep(_LOOK_SECONDS)
            self._check()
        self._begun = True

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._check()
        if callable(self._sigchld):
            self._sigchld(number, frame)

    def _check(self, patience: float = 0.0) -> None:
        """Raises WorkerDied when a worker has died, or does within `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            for worker in self._workers:
                if not worker.is_alive():
                    sample = self._board.reading().get(worker.pid or 0)
                    raise WorkerDied(in_words(worker), sample)
            if time.monotonic() >= end:
                return
            time.sleep(0.05)


def no_workers(what: str) -> UserError:
    """The error to raise when `what` keeps workers from their work: mostly /dev/shm, which containers have 64 MB of."""
    free = f"; {bytes_in_words(shutil.disk_usage(_SHARED).free)} are free there" if _SHARED.is_dir() else ""
    larger = f"make {_SHARED} larger (docker run --shm-size=16g{free})"
    return UserError(f"data.workers: {what}; {larger}, or write fewer workers, or data.workers=0, and start the same command again")


def _in_worker(parent: int, board: Board, _: int) -> None:
    begin_worker(parent)
    board.begin()
    torch.set_num_threads(1)
