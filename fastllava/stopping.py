"""Ctrl-C and SIGTERM as a request: the step in hand is finished and the state saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """The list fills with the first SIGINT or SIGTERM; a second one acts at once, as it would without this."""
    received: list[signal.Signals] = []
    before = {}

    def note(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        for one, handler in before.items():
            signal.signal(one, handler)

    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, note)
    except ValueError:
        pass  # not the main thread: whoever started this one answers signals
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
