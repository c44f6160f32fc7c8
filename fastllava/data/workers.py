"""Worker processes: they end when their parent goes or asks, and show on a board which sample they are at."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from torch.utils.data import get_worker_info

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that terminals, torchrun and schedulers send to a whole group: the parent answers for all."""
_LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def begin_worker(parent: int) -> None:
    """To be called in a worker first of all: from here on only the process `parent` ends it, by a SIGTERM or by going.

    Workers hold no state, so none has anything to finish.
    """
    signal.set_wakeup_fd(-1)
    # For whoever wants to know where it hangs.
    faulthandler.register(signal.SIGUSR1, file=2)
    for number in STOPS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The kernel's own way, which reaches one that is stopped or hangs; the thread below is for all other systems.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, _LOOK_SECONDS)
        if sent is not None and sent.si_pid == parent:
            break
    os._exit(1)


@contextmanager
def stops_held() -> Iterator[None]:
    """Processes that start within this block get no stop signal before `begin_worker`; the caller gets its own at the block's end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def children() -> set[BaseProcess]:
    """This process's own, as far as `multiprocessing` has started them, by whichever library."""
    return set(multiprocessing.active_children())


def kill(workers: Iterable[BaseProcess]) -> None:
    """End them all, stopped or hanging ones too."""
    workers = list(workers)
    for process in workers:
        process.kill()
    for process in workers:
        process.join(_LOOK_SECONDS)


class Board:
    """In shared memory: the number of the sample, or of the record, that each worker is at. Without workers the caller is the one."""

    def __init__(self, workers: int) -> None:
        self._slots = multiprocessing.RawArray("q", 3 * max(1, workers))
        self.slot: int | None = None
        """This worker's own; of PyTorch's workers when left out."""

    @contextmanager
    def at(self, sample: int) -> Iterator[None]:
        """This worker reads `sample` within the block."""
        slot, info = self.slot, get_worker_info()
        slot = 3 * (slot if slot is not None else 0 if info is None else info.id)
        self._slots[slot : slot + 3] = [self._slots[slot] + 1, os.getpid(), sample + 1]
        try:
            yield
        finally:
            self._slots[slot + 2] = 0

    def state(self) -> Sequence[int]:
        """Changes whenever a worker begins or ends a sample."""
        return list(self._slots)

    def reading(self) -> dict[int, int]:
        """The number of the sample that each process, by its id, is reading now."""
        state = self.state()
        return {state[i + 1]: state[i + 2] - 1 for i in range(0, len(state), 3) if state[i + 2]}


def in_words(process: BaseProcess) -> str:
    """How `process` ended."""
    code = process.exitcode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"gone with exit code {code}"
