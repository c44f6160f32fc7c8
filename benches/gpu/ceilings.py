"""Piece `ceilings` of `fastllava bench gpu`: the machine as it is, and what it gives at best: products of many sizes, a copy."""

import subprocess
from collections.abc import Sequence

import torch

from benches import kernels as timing_kernels
from benches.ceilings import COPIED, copy_gbs, product_tflops, timed_copy, timed_product
from benches.gpu.context import Context, Piece
from benches.results import Row
from benches.timing import Times
from benches.world import world


def ceiling_units(size: str) -> list[str]:
    """The world, every product, the copy, and the world again, warm: its clocks are those of work."""
    return ["world", *(f"product {'x'.join(map(str, sizes))}" for sizes in PRODUCTS), "copy", "world warm"]


PRODUCTS = (
    *((8192, 8192, 8192), (4096, 4096, 4096), (16384, 16384, 16384)),
    # A micro-batch of 16,384 rows: q, k, v and o; gate and up; down; the head on every row and on a twentieth.
    *((16384, 4096, 4096), (16384, 4096, 11008), (16384, 11008, 4096), (16384, 4096, 32000), (819, 4096, 32000)),
    # The projector's two, on 16 images; and the tower's MLP.
    *((9216, 1024, 4096), (9216, 4096, 4096), (9232, 1024, 4096)),
)
"""Rows, inner, columns."""


def measure_ceiling(context: Context, unit: str) -> None:
    """One row."""
    device, dtype = context.device, timing_kernels.DTYPES[context.dtype]
    what, _, given = unit.partition(" ")
    row: Row = {"what": what, "dtype": context.dtype}
    if what == "world":
        row |= conditions(device)
    elif what == "copy":
        times = timed_copy(device, dtype, context.seconds(1.0))
        row |= {"bytes": COPIED[device.type], **_times(times), "gbs": copy_gbs(times, device)}
    else:
        rows, inner, columns = sizes = _sizes(given, 1 if context.on_gpu else 64)
        times = timed_product(sizes, device, dtype, context.seconds(1.0))
        row |= {"rows": rows, "inner": inner, "columns": columns, **_times(times), "tflops": product_tflops(sizes, times)}
    context.note.row(row | world(device))


def _sizes(given: str, smaller: int) -> tuple[int, int, int]:
    """Of "rowsxinnerxcolumns"."""
    rows, inner, columns = (max(1, int(number) // smaller) for number in given.split("x"))
    return rows, inner, columns


def _times(times: Times) -> Row:
    return {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80}


QUERIED = (
    *("name", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw"),
    *("power.limit", "power.max_limit", "ecc.mode.current", "mig.mode.current", "compute_mode", "pcie.link.gen.current"),
)


def conditions(device: torch.device) -> Row:
    """What nvidia-smi says of the GPU now; None where it cannot be asked."""
    found: str | None = None
    if device.type == "cuda":
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found = None
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {"conditions": None if found is None else dict(zip(QUERIED, found.split(", "), strict=False)), "memory_bytes": memory}


def ceilings_in_words(rows: Sequence[Row]) -> str:
    """The highest of each."""
    products = [row for row in rows if row["what"] == "product"]
    copies = [row["gbs"] for row in rows if row["what"] == "copy"]
    best = max(products, key=lambda row: row["tflops"], default=None)
    said = [f"{best['tflops']:.4g} TFLOP/s at {best['rows']}x{best['inner']}x{best['columns']}"] if best else []
    return ", ".join(said + [f"{max(copies):.4g} GB/s copied"] * bool(copies)) or "nothing yet"


CEILINGS = Piece("the machine, and what it gives at best", ceiling_units, measure_ceiling, ceilings_in_words)
