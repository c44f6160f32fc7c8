"""Piece `sanitizer` of `fastllava bench gpu`: every room's Triton kernels under NVIDIA's compute-sanitizer, at small and odd shapes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from benches.gpu.context import Context, Piece, say
from benches.gpu.launches import MARK, TRITON, small_shapes
from benches.peer_trials import CANNOT
from benches.results import Row
from benches.world import world
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")
"""Accesses out of bounds or misaligned; and two threads of a block at one place of shared memory without a barrier between."""
LONGEST = 200
"""Seconds of a run; under the tool a program takes tens of times as long."""
SHOWN = 6
"""Lines of the tool that a row keeps."""
PROGRAM = "import sys; from fastllava.bench import bench_module; bench_module('gpu.launches').exercise(*sys.argv[1:])"
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def sanitizer_units(size: str) -> list[str]:
    """A check and a room that has kernels."""
    return [f"{check} {name}" for check in CHECKS for name, room in rooms().items() if TRITON in room.implementations]


def sanitize(context: Context, unit: str) -> None:
    """One row."""
    check, room = unit.split()
    row: Row = {"check": check, "room": room, "implementation": TRITON, "dtype": context.dtype, "shapes": list(small_shapes(room))}
    row |= {"kernels": None, "errors": None, "first": [], "seconds": None, "void": None}
    failure = None
    if (tool := shutil.which(TOOL)) is None:
        row["void"] = f"{CANNOT}{TOOL} is not installed"
    else:
        began = time.monotonic()
        row |= read(*_run([tool, "--tool", check, "--print-limit", "20", *program(room, context)]))
        row["seconds"] = round(time.monotonic() - began, 1)
        if row["errors"] or (row["void"] and not row["void"].startswith(CANNOT)):
            failure = f"{check} {room}: {row['void'] or next(iter(row['first']), 'errors')}"
    say(sanitizer_in_words([row]))
    context.note.row(row | world(context.device), failure)


def program(room: str, context: Context) -> list[str]:
    """The command that the tool watches."""
    return [sys.executable, "-P", "-c", PROGRAM, room, context.device.type, context.dtype]


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
    say(printed)
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


def sanitizer_in_words(rows: Sequence[Row]) -> str:
    """Errors by check."""
    ran = [row for row in rows if row["errors"] is not None]
    wrong = [f"{row['check']} {row['room']} {row['errors']}" for row in ran if row["errors"]]
    void = sorted({row["void"] for row in rows if row["void"] is not None})
    kernels = {kernel for row in ran for kernel in row["kernels"] or ()}
    said = [f"{len(ran)} runs over {len(kernels)} of {len(tuning.kernels())} kernels, errors: {', '.join(wrong) or 'none'}"] if ran else []
    return "; ".join(said + [f"void: {reason}" for reason in void]) or "nothing yet"


SANITIZER = Piece("compute-sanitizer over the kernels", sanitizer_units, sanitize, sanitizer_in_words)
