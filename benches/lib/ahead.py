"""The time that a GPU takes for a call, and the time that the host takes to launch it, apart from each other.

A kernel of 60 us behind an autograd function that takes the host 150 us to launch looks like one of 150 us, whatever the kernel. So the GPU
is kept busy, by a kernel that only waits, until the host has launched the whole call. Whether it was is asked of the GPU in every round,
and the wait has two lengths in turn: where the answers differ, the time is not the GPU's alone.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

SHORTEST, LONGEST = 100.0, 200_000.0
"""Microseconds to keep the GPU busy at first, and at most."""
_GROWTH = 4
_SAME = 0.05, 0.002
"""How far the medians of the two lengths may lie apart: a share, or milliseconds, whichever is more."""


class Gpu:
    """One GPU's queue."""

    def __init__(self, device: torch.device) -> None:
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
        self._cache = torch.empty(size, dtype=torch.int8, device=device)
        self._cycles = 1.0
        cycles = 10_000_000
        for _ in range(2):
            start = self.mark()
            torch.cuda._sleep(cycles)
            end = self.mark()
            self.wait()
            self._cycles = cycles / (1e3 * start.elapsed_time(end))

    def keep_busy(self, microseconds: float) -> None:
        """Overwrite the cache, then do nothing for that long."""
        self._cache.zero_()
        torch.cuda._sleep(round(microseconds * self._cycles))

    def mark(self) -> torch.cuda.Event:
        """Mark the place that the queue has grown to."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the queue is empty."""
        torch.cuda.synchronize()


@dataclass
class Ahead:
    """What is known of one call."""

    sleep: float = SHORTEST
    """Microseconds to keep the GPU busy, or twice as many."""
    device: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    """Milliseconds on the GPU, by the length of the wait."""
    host: list[float] = field(default_factory=list)
    """Microseconds that the host launched for."""
    late: int = 0
    """Rounds in which the GPU did not wait for the whole call."""

    @property
    def milliseconds(self) -> list[float]:
        """All times on the GPU."""
        return [*self.device[0], *self.device[1]]

    @property
    def host_bound(self) -> bool:
        """Whether the times are not the GPU's alone, such as those of a call that waits for the GPU itself."""
        short, long = map(statistics.median, self.device)
        return self.late > len(self.host) // 5 or abs(long - short) > max(_SAME[0] * short, _SAME[1])


def warm(calls: Mapping[str, Any], gpu: Gpu) -> dict[str, Ahead]:
    """Run each call until the GPU waits for all of it; that is longer at first, when kernels are compiled and memory is found."""
    known = {name: Ahead() for name in calls}
    for name, one in known.items():
        _run(calls[name], one.sleep, gpu)
        while _run(calls[name], one.sleep, gpu)[2] and one.sleep < LONGEST:
            one.sleep *= _GROWTH
    return known


def measure(calls: Mapping[str, Any], known: Mapping[str, Ahead], gpu: Gpu, number: int) -> None:
    """Round `number`: each call once."""
    for name, one in known.items():
        milliseconds, host, late = _run(calls[name], one.sleep * (1 + number % 2), gpu)
        one.device[number % 2].append(milliseconds)
        one.host.append(host)
        one.late += late


def _run(call: Any, sleep: float, gpu: Gpu) -> tuple[float, float, bool]:
    """Milliseconds on the GPU, microseconds on the host, and whether the GPU had begun before the host was done."""
    state = call.prepare()
    gpu.keep_busy(sleep)
    start = gpu.mark()
    began = time.perf_counter_ns()
    call.run(state)
    host = (time.perf_counter_ns() - began) / 1e3
    end = gpu.mark()
    late = start.query()
    gpu.wait()
    return start.elapsed_time(end), host, late
