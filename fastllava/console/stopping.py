"""Ctrl-C, SIGTERM and SIGHUP as a request: the step in hand is finished and the state saved. A second one ends the process at once."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TWICE_SECONDS = 0.1
"""Within these, a signal is the same request again: `timeout` and schedulers send one to a process and to its group."""

_at_once: list[bool] = []


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """The list fills with the first SIGINT, SIGTERM or SIGHUP; a second one acts at once, as it would without this.

    One that was ignored before, as nohup has it of SIGHUP, stays ignored.
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}
    first_at = 0.0

    def note(number: int, _: Any) -> None:
        nonlocal first_at
        if not received:
            received.append(signal.Signals(number))
            first_at = time.monotonic()
        elif not _at_once and time.monotonic() - first_at > _TWICE_SECONDS:
            for one, handler in before.items():
                signal.signal(one, handler)
            signal.raise_signal(number)

    try:
        for one in STOPS:
            if signal.getsignal(one) is not signal.SIG_IGN:
                before[one] = signal.signal(one, note)
    except ValueError:
        pass  # not the main thread: whoever started this one answers signals
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def ends_imports() -> None:
    """From here on a Ctrl-C while a module is imported ends the process with 130, as nothing has been begun that a kill would lose.

    Elsewhere it raises KeyboardInterrupt as ever. Native modules do not stand that while they initialise: they report another error,
    print a traceback or go on.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_or_interrupt)


def _end_or_interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


@contextmanager
def second_signal_ends() -> Iterator[None]:
    """Within this block, the main thread's, a second stop signal ends the process with 128 plus its number, wherever it is.

    A thread sees to it: the main one may be within a library that lets no handler run.
    """
    ours, systems = socket.socketpair()
    systems.setblocking(False)
    before = signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_count, args=(ours,), daemon=True)
    thread.start()
    _at_once.append(True)
    try:
        yield
    finally:
        _at_once.pop()
        signal.set_wakeup_fd(before)
        systems.close()
        thread.join()
        ours.close()


@contextmanager
def every_interrupt_is_the_first() -> Iterator[None]:
    """Within this block, the main thread's, a Ctrl-C raises KeyboardInterrupt however often there was one: it ends no more than it hits."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


def _count(ours: socket.socket) -> None:
    first_at = None
    while numbers := ours.recv(64):
        for number in set(numbers) & set(STOPS):
            if first_at is None:
                first_at = time.monotonic()
            elif time.monotonic() - first_at > _TWICE_SECONDS:
                os._exit(128 + number)
