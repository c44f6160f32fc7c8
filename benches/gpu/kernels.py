"""Piece `kernels` of `fastllava bench gpu`: every room and its peers at the shapes of a size, as `fastllava bench kernels`.

At 7b 25 shapes give about 440 rows. At 0.2 s each that is 90 s, beside about 220 s in which torch.compile and Triton make code, and 30 s
of judging: predicted, 6 of the 8 minutes.
"""

from collections.abc import Sequence
from typing import Any

from benches import kernels as timing_kernels
from benches.gpu.context import Context, Piece, say
from benches.results import Row
from fastllava_kernels import rooms

SECONDS = 0.2
"""To spend on a row."""
FIRST_ROOMS = ("masked_linear_cross_entropy", "projector_splice", "attention")
"""What is looked at first: what has a target, and what takes the most time."""
LATER_SHARES = ("-1%", "-50%", "-100%")
"""Shares of supervised rows that no stage has."""


def kernel_units(size: str) -> list[str]:
    """Room and shape, those with a target first."""
    found = []
    for name, room in rooms().items():
        kept: list[Any] = []
        for shape, sizes in room.workload.shapes.items():
            part = shape.partition("-")[0]
            # Shapes of the tower are the same beside every decoder; equal shapes are measured once.
            if (part == size or (part == "tower" and size != timing_kernels.TINY)) and sizes not in kept:
                kept.append(sizes)
                found.append(f"{name} {shape}")
    return sorted(found, key=_rank)


def _rank(unit: str) -> tuple[bool, int]:
    """Of what is measured first, the least. Sorting keeps the order of equals."""
    name = unit.partition(" ")[0]
    later = unit.removesuffix("-head").endswith(LATER_SHARES)
    return later, FIRST_ROOMS.index(name) if name in FIRST_ROOMS else len(FIRST_ROOMS)


def measure_kernel(context: Context, unit: str) -> None:
    """The rows of "room shape", or those of one implementation: "room shape implementation"."""
    name, shape, *implementations = unit.split()
    plan = timing_kernels.Plan(
        {name: rooms()[name]}, context.device, context.dtype, implementations=implementations, seconds=context.seconds(SECONDS)
    )
    for row in timing_kernels.measure_shape(plan, rooms()[name], shape, context.ceilings):
        say(timing_kernels.in_words(row))
        failed = timing_kernels.failures([row])
        context.note.row(row, f"{name} {row['implementation']} {row['pass']}: {row['void']}" if failed else None)


def split_kernel(unit: str) -> list[str]:
    """Where a whole room broke off, one implementation at a time, each in turn with what it may break."""
    name, _, *implementations = unit.split()
    if implementations:
        return []
    return [f"{unit} {implementation}" for implementation in rooms()[name].implementations]


def kernels_in_words(rows: Sequence[Row]) -> str:
    """Counts."""
    timed = sum(row["void"] is None for row in rows)
    shapes = len({(row["room"], row["shape"]) for row in rows})
    wrong = sorted({f"{row['room']} {row['implementation']}" for row in timing_kernels.failures(rows)})
    return f"{timed} rows with a time and {len(rows) - timed} void at {shapes} shapes" + (f"; wrong: {', '.join(wrong)}" if wrong else "")


KERNELS = Piece("every room and its peers", kernel_units, measure_kernel, kernels_in_words, split_kernel)
