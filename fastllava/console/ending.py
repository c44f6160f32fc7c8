"""How the program ends: within seconds of its last word, and never for want of someone who listens to it."""

import errno
import io
import os
import signal
import sys
import threading
import time

_SECONDS = 5.0


def end_soon(code: int) -> None:
    """From when the main thread ends on, the process lasts seconds, whatever waits at its end: threads, children, libraries."""
    threading.Thread(target=_end, args=(code,), daemon=True).start()


def _end(code: int) -> None:
    threading.main_thread().join()
    # Should this thread be gone by then: the system's own clock, which nothing within the process holds up.
    signal.setitimer(signal.ITIMER_REAL, 2 * _SECONDS)
    time.sleep(_SECONDS)
    os._exit(code)


def talk_to_whoever_listens() -> None:
    """From here on what is said on stdout and stderr is dropped where nobody takes it.

    The reader has left, the disk is full, the terminal is closed: nothing of that is worth what is being done.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lasts)
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            kept = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
            raw = _Forgiving(stream.fileno(), "wb", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), write_through=stream.write_through, **kept))


class _Forgiving(io.FileIO):
    """A file that takes all that is written, whether or not it gets anywhere."""

    _lost = False

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] (of any bytes-like class)
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if not self._lost and error.errno != errno.EPIPE and self.fileno() == 1 and sys.stderr is not None:
                self._lost = True
                sys.stderr.write(
                    f"stdout cannot be written ({error.strerror}); what is said there from here on is lost, all else goes on\n"
                )
            return len(data)
