"""`fastllava bench tuning`: each kernel's configurations by time, into tables beside the results, not into the source.

To take them over, copy TABLES/<arch>.json to kernels/fastllava_kernels/_tuning/tables/ and write kernels/aot.md anew.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from benches.lib.results import CANNOT, Row, Sheet
from benches.lib.world import check_device, world
from fastllava.errors import UserError
from fastllava_kernels._tuning import aot, tune, tuning
from fastllava_kernels._tuning.tuning import ANY, Config


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
    try:
        found = tune.measure(kernel, bound, device, size, tune.ROUNDS if device.type == "cuda" else 1)
    except ValueError as error:
        return row | {"void": f"{CANNOT}{error}"}, None
    timed = [(dict(kernel.candidates[arch][number]), ms) for number, ms in found.milliseconds.items()]
    ms = {tuple(config.items()): each for config, each in timed}
    row |= {"shape": found.shape, "after": dict(found.chosen), "candidates": [list(each) for each in timed], "refused": list(found.refused)}
    row |= {"before_ms": ms.get(tuple(now.items())), "after_ms": ms[tuple(dict(found.chosen).items())]}
    return row, found.chosen


def in_words(row: Row) -> str:
    """Whether the entry changes, and by how much."""
    if row["after"] == row["before"]:
        return f"stays, {row['after_ms']:.4g} ms"
    return f"changes, {row['before_ms'] or float('nan'):.4g} to {row['after_ms']:.4g} ms"
