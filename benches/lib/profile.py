"""Where the time of one step goes: operations by time, how long the device had nothing to do, and where the host waited for it."""

import gzip
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benches.lib.ours import Fastllava
from benches.lib.timing import quiet
from fastllava.data.plan import Step

WAITS = (
    *("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"),
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
)
"""What makes the host wait for a GPU; one reads as two where one contains the other."""
ROWS = 40
"""Rows of the table."""
SMALL_TRACE = 8 * 2**20
"""Bytes of a compressed trace that is kept."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one step went."""

    table: str
    operations: list[dict[str, Any]]
    """`operation`, `calls`, `ms`, `share` of the time of all, the longest first: a GPU's kernels, or a CPU's operators."""
    milliseconds: float
    """By the host's clock, the profiler's own work included."""
    host_waits: dict[str, int]
    """How often each of WAITS was called; those that were not are left out."""
    idle_share: float | None
    """Share of the step's time in which the device ran no kernel; None on a CPU."""

    def in_words(self) -> str:
        """Say it in one line."""
        waits = ", ".join(f"{count} {name}" for name, count in self.host_waits.items()) or "none"
        idle = "" if self.idle_share is None else f", the device idle for {self.idle_share:.1%}"
        return f"{self.milliseconds:.0f} ms under the profiler{idle}; host waits: {waits}"

    def write(self, path: Path) -> None:
        """Write the line, then the table."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{self.in_words()}\n\n{self.table}\n", encoding="utf-8")


def profile_step(trainer: Fastllava, step: Step, trace: Path | None = None) -> Profile:
    """Profile a step that is like those before it; nothing is read from the device while it runs.

    `trace`: file for a Chrome trace, kept compressed where it is small.
    """
    batches = trainer.batches(step)
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with quiet(), profile(activities=activities) as profiler:
        began = time.perf_counter()
        trainer.step(batches)
        if on_gpu:
            torch.cuda.synchronize(trainer.device)
        seconds = time.perf_counter() - began
    averages = profiler.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    waits = {event.key: event.count for event in averages if event.key in WAITS}
    if on_gpu:
        # Ours, above.
        waits["cudaDeviceSynchronize"] = waits.get("cudaDeviceSynchronize", 1) - 1
    idle = 1 - _busy(profiler.events(), seconds) if on_gpu else None
    table = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=70)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        packed = gzip.compress(trace.read_bytes(), 6)
        trace.unlink()
        if len(packed) <= SMALL_TRACE:
            trace.with_suffix(".json.gz").write_bytes(packed)
    waits = {name: count for name, count in waits.items() if count > 0}
    return Profile(table, operations(averages, on_gpu), 1e3 * seconds, waits, idle)


def operations(averages: Iterable[Any], on_gpu: bool) -> list[dict[str, Any]]:
    """The rows of a profile. An operator's time on the GPU is that of its kernels, so that only these count there."""
    if on_gpu:
        timed = [(e.key, e.count, e.self_device_time_total) for e in averages if _is_kernel(e)]
    else:
        timed = [(e.key, e.count, e.self_cpu_time_total) for e in averages if not _is_annotation(e)]
    total = sum(microseconds for *_, microseconds in timed) or 1.0
    timed.sort(key=lambda each: -each[2])
    return [
        {"operation": name, "calls": count, "ms": microseconds / 1e3, "share": microseconds / total}
        for name, count, microseconds in timed[:ROWS]
    ]


def _is_kernel(event: Any) -> bool:
    """Whether it is a kernel or a copy on the GPU, and no region with a name, which spans gaps too, such as an optimizer's whole step."""
    return event.device_type.name == "CUDA" and not _is_annotation(event)


def _is_annotation(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))


def _busy(events: Sequence[Any] | Any, seconds: float) -> float:
    """Share of the time in which a kernel ran, those that ran at once counted once."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if _is_kernel(e))
    busy = end = 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6 / seconds
