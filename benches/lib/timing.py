"""Time and memory of calls: interleaved, with a cold cache, as quantiles."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benches.lib import ahead

FEWEST, MOST = 6, 300
"""Fewest and most rounds, whatever the budget says."""


def nothing() -> None:
    """Prepare a call that needs no preparation."""


@dataclass(frozen=True)
class Call:
    """`run(prepare())`: only `run` is measured."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Times:
    """Quantiles of some times, in milliseconds."""

    p20: float
    p50: float
    p80: float
    host_us: float | None = None
    """Median microseconds that the host took to launch the call; None where it computes itself."""
    host_bound: bool = False
    """Whether the GPU waited for the host, so that its times say less about the GPU."""

    @staticmethod
    def of(taken: Sequence[float]) -> "Times":
        """The quantiles of at least two measurements."""
        fifths = statistics.quantiles(taken, n=5, method="inclusive")
        return Times(fifths[0], statistics.median(taken), fifths[3])


def quantiles(name: str, times: Times | None) -> dict[str, float | None]:
    """The fields `<name>_p20`, `_p50` and `_p80` of a row, None where nothing was timed."""
    return {f"{name}_{part}": times and getattr(times, part) for part in ("p20", "p50", "p80")}


def interleaved(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Times]:
    """Times of calls that take turns, so that a clock that falls or a busy neighbour meets all of them alike.

    `seconds`: budget for each call, of the clock on the wall, preparation included; at least `FEWEST` rounds. On a GPU, the time of the
    GPU alone, after the L2 cache was overwritten (`benches.lib.ahead`), and the host's beside it; on a CPU the host's clock, caches
    as they are.
    """
    return _on_gpu(calls, ahead.Gpu(device), seconds) if device.type == "cuda" else _on_cpu(calls, seconds)


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Time a call that is long beside what it takes to launch; on a GPU from idle to idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _on_gpu(calls: Mapping[str, Call], gpu: ahead.Gpu, seconds: float) -> dict[str, Times]:
    known = ahead.warm(calls, gpu)
    for number in _rounds(seconds * len(calls)):
        ahead.measure(calls, known, gpu, number)
    return {
        name: dataclasses.replace(Times.of(one.milliseconds), host_us=statistics.median(one.host), host_bound=one.host_bound)
        for name, one in known.items()
    }


def _on_cpu(calls: Mapping[str, Call], seconds: float) -> dict[str, Times]:
    for call in calls.values():
        _milliseconds(call)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in _rounds(seconds * len(calls)):
        for name, call in calls.items():
            taken[name].append(_milliseconds(call))
    return {name: Times.of(each) for name, each in taken.items()}


def _rounds(seconds: float) -> Iterator[int]:
    """Numbers from 0 until the time is up."""
    began = time.perf_counter()
    for number in range(MOST):
        if number >= FEWEST and time.perf_counter() - began > seconds:
            return
        yield number


def _milliseconds(call: Call) -> float:
    state = call.prepare()
    start = time.perf_counter_ns()
    call.run(state)
    return (time.perf_counter_ns() - start) / 1e6


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes allocated at once while `run` runs, above what was allocated before `prepare`: what it saved counts.

    From the CUDA allocator's statistics; on a CPU from the profiler's record of every allocation and release, those inside
    custom ops too. Call it when the same has run once: workspaces that libraries keep are then no part of it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        state = call.prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call.run(state)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    state, changes = allocations(call.prepare)
    kept = sum(changes)
    _, changes = allocations(lambda: call.run(state))
    now = most = kept
    for change in changes:
        now += change
        most = max(most, now)
    return most


def allocations(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `function` gives, and the size of every CPU allocation (releases negative) meanwhile, in order."""
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        result = function()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler of PyTorch 2.13 writes two lines to stderr each time; they go nowhere."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
