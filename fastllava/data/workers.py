"""Worker processes: they end when their parent goes or asks, and show on a board that they have begun and which sample they are at."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.utils.data import get_worker_info

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that terminals, torchrun and schedulers send to a whole group: the parent answers for all."""
STACKS = signal.SIGUSR1
"""The signal at which a worker writes its stacks to stderr, for whoever wants to know where it hangs."""
_LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_TELLS_SENDER = hasattr(signal, "sigtimedwait")
"""Whether the system says who sent a signal; where it does not, a worker's SIGTERM is ignored, and its parent ends it by SIGKILL."""


def begin_worker(parent: int) -> None:
    """To be called in a worker first of all: from here on only the process `parent` ends it, by a SIGTERM or by going.

    Workers hold no state, so none has anything to finish.
    """
    signal.set_wakeup_fd(-1)
    _answer_stacks()
    for number in STOPS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The kernel's own way, which reaches one that is stopped or hangs; the thread below is for all other systems.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _TELLS_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # Where a server forks the workers it is the server that ends with the parent.
    forked_by = os.getppid()
    while os.getppid() == forked_by and _exists(parent):
        if not _TELLS_SENDER:
            time.sleep(_LOOK_SECONDS)
        elif (sent := signal.sigtimedwait({signal.SIGTERM}, _LOOK_SECONDS)) is not None and sent.si_pid == parent:
            break
    os._exit(1)


def _exists(process: int) -> bool:
    """Whether it has not ended; one that nobody has waited for yet has."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return process_state(process) != "Z"


def process_state(pid: int) -> str:
    """The letter that /proc has for it, such as T for stopped or Z for ended; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


_held: list[bool] = []


@contextmanager
def stops_held() -> Iterator[None]:
    """Processes that start within this block get no stop signal before `begin_worker`; the caller gets its own at the block's end.

    Nor does STACKS end them: one that is forked answers it from its first moment on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, STACKS})
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer_stacks() -> None:
    faulthandler.register(STACKS, file=2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS})


def _after_fork() -> None:
    # What libraries do in a child before `begin_worker` may hang: a fork inherits locks, but not the threads that hold them.
    if _held:
        _answer_stacks()


os.register_at_fork(after_in_child=_after_fork)


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
    """In shared memory: each worker that has begun, and the number of the sample or record that it is at.

    Without workers the caller is the one.
    """

    def __init__(self, workers: int) -> None:
        self._slots = multiprocessing.RawArray("q", 3 * max(1, workers))
        self.slot: int | None = None
        """This worker's own; of PyTorch's workers when left out."""

    @contextmanager
    def at(self, sample: int) -> Iterator[None]:
        """This worker reads `sample` within the block."""
        slot = self._note(sample)
        try:
            yield
        finally:
            self._slots[slot + 2] = 0

    def begin(self) -> None:
        """This worker has started, and reads nothing yet."""
        self._note(-1)

    def clear(self) -> None:
        """Forget all workers: those that were on the board have ended."""
        self._slots[:] = [0] * len(self._slots)

    def _note(self, sample: int) -> int:
        """Write down that this worker reads `sample`; where."""
        slot, info = self.slot, get_worker_info()
        slot = 3 * (slot if slot is not None else 0 if info is None else info.id)
        self._slots[slot : slot + 3] = [self._slots[slot] + 1, os.getpid(), sample + 1]
        return slot

    def state(self) -> Sequence[int]:
        """Changes whenever a worker begins or ends a sample."""
        return list(self._slots)

    def begun(self) -> set[int]:
        """The ids of the processes that have begun."""
        return set(self.state()[1::3]) - {0}

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
