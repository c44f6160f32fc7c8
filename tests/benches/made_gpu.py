"""A GPU and a clock that are made up, in place of those that `benches.lib.ahead` times on."""

import pytest

from benches.lib import ahead


class Made:
    """A GPU that takes what it is told to; the host's clock moves only when the host is said to work, or waits."""

    def __init__(self) -> None:
        self.host = 0.0
        self.free = 0.0
        """When the queue is empty, in microseconds as `host`."""

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + device

    def keep_busy(self, microseconds: float) -> None:
        self.launch(5, 80 + microseconds)

    def mark(self) -> "Mark":
        self.free = max(self.free, self.host)
        return Mark(self, self.free)

    def wait(self) -> None:
        self.host = max(self.host, self.free)


class Mark:
    def __init__(self, gpu: Made, at: float) -> None:
        self.gpu, self.at = gpu, at

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def elapsed_time(self, other: "Mark") -> float:
        return (other.at - self.at) / 1e3


def in_place_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Let `benches.lib.ahead` take it."""
    made = Made()
    monkeypatch.setattr(ahead, "Gpu", lambda device: made)
    monkeypatch.setattr(ahead.time, "perf_counter_ns", lambda: round(1e3 * made.host))
    return made
