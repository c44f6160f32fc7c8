"""`fastllava bench sanitizer`: every room's Triton kernels under NVIDIA's compute-sanitizer, at small and odd shapes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benches.kernels import DTYPES, TINY
from benches.lib.judging import as_list, cotangents, leaves
from benches.lib.results import CANNOT, Row, Sheet
from benches.lib.world import check_device, world
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning
from fastllava_kernels._tuning.tuning import Noted
from fastllava_kernels.masked_linear_cross_entropy.kernel_loss_rows import LARGEST_ROW
from fastllava_kernels.workload import Shape

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
"""Accesses out of bounds or misaligned; and two threads of a block at one place of shared memory without a barrier between."""
LONGEST = 200
"""Seconds of a run; under the tool a program takes tens of times as long."""
SHOWN = 6
"""Lines of the tool that a row keeps."""
TRITON = "triton"
MARK = "launched: "
"""Begins the line in which a run names the kernels that it launched."""
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def bench(device: torch.device, sheet: Sheet, names: Sequence[str] = ()) -> list[Row]:
    """A row for every check and room with Triton kernels, or for the rooms with these names."""
    check_device(device)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    for check in CHECKS:
        for name in (name for name, room in rooms().items() if TRITON in room.implementations and name in (names or rooms())):
            if not sheet.has(check=check, room=name, dtype=dtype):
                sheet.add(sanitize(check, name, device.type, dtype, sheet) | world(device), lambda row: f"{row['errors']} errors")
    return sheet.rows


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Rows with errors of a kernel, or of a run that broke."""
    return [row for row in rows if row["errors"] or (row["void"] and not row["void"].startswith(CANNOT))]


def sanitize(check: str, room: str, device: str, dtype: str, sheet: Sheet) -> Row:
    """The row of one check of a room, but for the world."""
    row: Row = {"check": check, "room": room, "implementation": TRITON, "dtype": dtype, "shapes": list(small_shapes(room))}
    row |= {"kernels": None, "errors": None, "first": [], "seconds": None, "void": None}
    if (tool := shutil.which(TOOL)) is None:
        return row | {"void": f"{CANNOT}{TOOL} is not installed"}
    began = time.monotonic()
    # -P: with this folder on the import path, transformers would take its kernels.py for a library of Hugging Face.
    program = [sys.executable, "-P", str(Path(__file__).with_name("__main__.py")), "launch", room, device, dtype]
    code, printed = _run([tool, "--tool", check, "--print-limit", "20", *program])
    sheet.say(printed)
    return row | read(code, printed) | {"seconds": round(time.monotonic() - began, 1)}


def _run(command: Sequence[str]) -> tuple[int | None, str]:
    """Exit code, None where it took too long, and all that was printed."""
    # Each tensor an allocation of its own: in one large block a neighbour hides what is read beyond the end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONGEST, env=environment, check=False)
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def read(code: int | None, printed: str) -> Row:
    """What a run's exit code and output say, as part of a row."""
    lines = printed.splitlines()
    told = [line.removeprefix("=========").strip() for line in lines if line.startswith("=========")]
    launched = next((json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)), None)
    counts = [match[1] or match[2] for line in told if (match := SUMMARY.search(line))]
    first = [line for line in told if line and "SUMMARY" not in line and line != TOOL.upper()][:SHOWN]
    row: Row = {"kernels": launched, "errors": int(counts[-1]) if counts else None, "first": first}
    if any("Device not supported" in line for line in told):
        return row | {"errors": None, "void": f"{CANNOT}{TOOL} does not support the device"}
    if row["errors"]:
        return row
    if code is None:
        return row | {"errors": None, "void": f"no end within {LONGEST} s"}
    if code or not counts or launched is None:
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return row | {"errors": None, "void": f"broke: exit code {code}: {last}"}
    return row


def small_shapes(room: str) -> Mapping[str, Shape]:
    """The workload's tiny shapes; each with fewer rows, at a number that no block divides; and with rows of logits longer than a block."""
    shapes: dict[str, Shape] = {}
    for name, shape in rooms()[room].workload.shapes.items():
        if name.partition("-")[0] == TINY:
            shapes[name] = shape
            shapes[f"{name}, odd"] = {**shape, **{key: shape[key] - 3 for key in ("rows", "patches") if shape.get(key, 0) > 8}}
            if "supervised" in shape:
                shapes[f"{name}, long"] = {**shape, "supervised": 3, "vocabulary": LARGEST_ROW + 3}
    return shapes


def launch(room: str, device: str, dtype: str) -> None:
    """What the tool watches: a room's kernels, forward and backward at every small shape. Prints which kernels were launched."""
    where = torch.device(device)
    with noted(where) as configs:
        for shape in small_shapes(room).values():
            run_once(room, shape, DTYPES[dtype], where)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    sys.stdout.write(f"{MARK}{json.dumps([name for name, config in configs.items() if config.taken])}\n")


@contextmanager
def noted(device: torch.device) -> Iterator[Mapping[str, Noted]]:
    """Every kernel runs with the configuration it has anyway, and is noted."""
    configs = {name: Noted(tuning.config(kernel, 1, device)) for name, kernel in tuning.kernels().items()}
    with ExitStack() as stack:
        for name, config in configs.items():
            stack.enter_context(tuning.override(name, config))
        yield configs


def run_once(room: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Forward as in evaluation, then as in training with, where something learns, backward."""
    args: Any = rooms()[room].workload.inputs(shape, dtype, device, 0)
    function = rooms()[room].implementations[TRITON].function
    with torch.no_grad():
        function(*args)
    outputs = as_list(function(*args))
    if learning := leaves(args):
        torch.autograd.grad(outputs, learning, cotangents(outputs), allow_unused=True)
