"""`fastllava bench tuning`: each kernel's configurations by time, into tables beside the results, not into the source.

What is timed is the kernel alone, with the arguments that the room gives it, launched again with a cold L2 cache on a GPU that was kept
busy until the host was done (`benches.lib.ahead`), all candidates in turn. What the ahead-of-time gate refuses, such as for spills, is no
candidate.

To take them over, copy TABLES/<arch>.json to kernels/fastllava_kernels/_tuning/tables/ and write kernels/aot.md anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.lib.results import CANNOT, Row, Sheet, first_line
from benches.lib.timing import Call, Times, interleaved
from benches.lib.world import check_device, world
from fastllava.errors import UserError
from fastllava_kernels._tuning import aot, tune, tuning
from fastllava_kernels._tuning.tuning import ANY, Config, Kernel

SECONDS = 0.3
"""For a candidate, on a GPU."""


def bench(device: torch.device, sheet: Sheet, tables: Path, size: str, names: Sequence[str] = ()) -> list[Row]:
    """A row for each kernel and bucket, and the fastest of each in `tables`. Raises UserError on a kernel that is none."""
    check_device(device)
    for name in names:
        if name not in tuning.kernels():
            raise UserError(f"bench tuning: '{name}' is no kernel; write some of {', '.join(tuning.kernels())}")
    for name in names or tuning.kernels():
        kernel, chosen = tuning.kernels()[name], {}
        for bound in (*kernel.buckets, None):
            bucket = str(bound or ANY)
            if not sheet.has(kernel=name, bucket=bucket, arch=tuning.architecture(device)):
                row, after = measure(name, bound, device, size)
                chosen |= {} if after is None else {bucket: after}
                sheet.add(row | world(device), in_words)
        if chosen:
            sheet.say(f"wrote {tune.write(tuning.architecture(device), {name: chosen}, tables)}")
    return sheet.rows


def measure(name: str, bound: int | None, device: torch.device, size: str) -> tuple[Row, Config | None]:
    """The row of one bucket of a kernel, but for the world, and the fastest configuration that passes the gate."""
    kernel, arch = tuning.kernels()[name], tuning.architecture(device)
    now = {key: value for key, value in tuning.config(kernel, bound or 2**31, device).items() if key not in tuning.FUSION}
    row: Row = {"kernel": name, "room": kernel.room, "arch": arch, "triton": aot.triton_minor(), "bucket": str(bound or ANY), "before": now}
    row |= {"shape": None, "after": None, "before_ms": None, "after_ms": None, "candidates": [], "refused": [], "void": None}
    passing, refused = _passing(kernel, arch, device)
    row["refused"] = refused
    if not passing:
        return row | {"void": f"no candidate for {arch} passes"}, None
    try:
        shape, run = tune.launching(kernel, passing[0], bound, device, size)
    except ValueError as error:
        return row | {"void": f"{CANNOT}{error}"}, None
    timed = _timed(kernel, passing, run, device, refused)
    if not timed:
        return row | {"shape": shape, "void": f"no candidate for {arch} runs"}, None
    row |= {"shape": shape, "candidates": [[dict(one.config), one.times.p50] for one in timed]}
    if any(one.times.host_bound for one in timed):
        return row | {"void": "the GPU waited for the host, so these are not its times alone"}, None
    best = min(timed, key=lambda one: one.times.p50)
    before = next((one.times.p50 for one in timed if dict(one.config) == now), None)
    return row | {"after": dict(best.config), "before_ms": before, "after_ms": best.times.p50}, best.config


@dataclass(frozen=True)
class _Timed:
    config: Config
    times: Times


def _passing(kernel: Kernel, arch: str, device: torch.device) -> tuple[list[Config], list[str]]:
    """The candidates that pass the ahead-of-time gate, and what it has against the others."""
    passing, refused = [], []
    for config in kernel.candidates[arch]:
        # Without a GPU there is no machine code to look at.
        problems = tune.gate(kernel, config, arch) if device.type == "cuda" else []
        if problems:
            refused.append(f"{dict(config)}: {', '.join(problems)}")
        else:
            passing.append(config)
    return passing, refused


def _timed(kernel: Kernel, candidates: Sequence[Config], run: Callable[[], None], device: torch.device, refused: list[str]) -> list[_Timed]:
    """The candidates that launch, with the times of their launches; why others did not, such as for want of memory, goes to `refused`."""
    calls, configs = dict[str, Call](), dict[str, Config]()
    for number, config in enumerate(candidates):
        try:
            with tune.launches(kernel, config) as launches:
                run()
        except Exception as error:
            refused.append(f"{dict(config)}: {type(error).__name__}: {first_line(error)}")
            continue
        name = str(number)
        calls[name], configs[name] = Call(lambda _, again=tuple(launches): [launch() for launch in again]), config
    if not calls:
        return []
    found = interleaved(calls, device, SECONDS if device.type == "cuda" else 0.0)
    return [_Timed(configs[name], times) for name, times in found.items()]


def in_words(row: Row) -> str:
    """Whether the entry changes, and by how much."""
    if row["after"] == row["before"]:
        return f"stays, {row['after_ms']:.4g} ms"
    return f"changes, {row['before_ms'] or float('nan'):.4g} to {row['after_ms']:.4g} ms"
