"""Piece `tuning` of `fastllava bench gpu`: each kernel's configurations by time, into tables beside the results, not into the source.

To take them over, copy DIR/tables/<arch>.json to kernels/fastllava_kernels/_tuning/tables/ and write kernels/aot.md anew.
"""

from collections.abc import Sequence

from benches.gpu.context import Context, Piece, say
from benches.peer_trials import CANNOT
from benches.results import Row
from benches.world import world
from fastllava_kernels._tuning import aot, tune, tuning
from fastllava_kernels._tuning.tuning import ANY, Config

TABLES = "tables"
"""Folder beside the results."""


def tuning_units(size: str) -> list[str]:
    """The kernels."""
    return list(tuning.kernels())


def measure_tuning(context: Context, unit: str) -> None:
    """A row for each bucket."""
    kernel, arch = tuning.kernels()[unit], tuning.architecture(context.device)
    chosen: dict[str, Config] = {}
    for bound in (*kernel.buckets, None):
        now = {key: value for key, value in tuning.config(kernel, bound or 2**31, context.device).items() if key not in tuning.FUSION}
        row: Row = {"kernel": unit, "room": kernel.room, "arch": arch, "triton": aot.triton_minor(), "bucket": str(bound or ANY)}
        row |= {
            "before": now,
            "shape": None,
            "after": None,
            "before_ms": None,
            "after_ms": None,
            "candidates": [],
            "refused": [],
            "void": None,
        }
        try:
            found = tune.measure(kernel, bound, context.device, context.size, tune.ROUNDS if context.on_gpu else 1)
        except ValueError as error:
            row["void"] = f"{CANNOT}{error}"
        else:
            configs = kernel.candidates[arch]
            timed = {number: (dict(configs[number]), ms) for number, ms in found.milliseconds.items()}
            before = [ms for config, ms in timed.values() if config == now]
            after = next(ms for config, ms in timed.values() if config == dict(found.chosen))
            row |= {"shape": found.shape, "after": dict(found.chosen), "before_ms": before[0] if before else None, "after_ms": after}
            row |= {"candidates": [[config, ms] for config, ms in timed.values()], "refused": list(found.refused)}
            chosen[str(bound or ANY)] = found.chosen
        say(tuning_in_words([row]))
        context.note.row(row | world(context.device))
    if chosen:
        say(f"wrote {tune.write(arch, {unit: chosen}, context.folder / TABLES)}")


def tuning_in_words(rows: Sequence[Row]) -> str:
    """Which entries change, and by how much."""
    timed = [row for row in rows if row["void"] is None]
    changed = [
        f"{row['kernel']} {row['bucket']}: {row['before_ms'] or float('nan'):.4g} to {row['after_ms']:.4g} ms"
        for row in timed
        if row["after"] != row["before"]
    ]
    said = [f"{len(timed)} entries timed", f"changed: {', '.join(changed)}" if changed else "none changed"]
    return "; ".join(said + [f"{len(rows) - len(timed)} void"] * (len(rows) > len(timed)))


TUNING = Piece("the tables of kernel configurations", tuning_units, measure_tuning, tuning_in_words)
