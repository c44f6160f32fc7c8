"""What the results of `fastllava bench kernels` look like: a chart a room, and the table in kernels/README.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benches.charts import BASELINE, OTHERS, OURS, Bar, bars
from benches.results import RESULTS, Row, files, latest
from fastllava_kernels.room import REFERENCE

KEY = ("room", "implementation", "shape", "dtype", "pass", "device")
ON_A_CPU = "Measured on a CPU with tiny shapes: it shows that everything runs and is right, and says nothing about a GPU."
COLOURS = "blue: what kernels.<room> can choose; orange: the reference, eager PyTorch; grey: peers, which only this bench runs"
MIB = 2**20


def charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`folder/<room>.png` for each room with a time: forward and backward together, or forward where nothing learns."""
    written = []
    for room in dict.fromkeys(row["room"] for row in rows):
        shown = [row for row in whole(rows) if row["room"] == room]
        timed = [row for row in shown if row["void"] is None]
        if not timed:
            continue
        path = folder / f"{room}.png"
        voids = len(shown) - len(timed)
        notes = [COLOURS]
        if voids:
            notes.append(f"{voids} more could not run or are void: see the results")
        if on_a_cpu(timed[0]):
            notes.append(ON_A_CPU)
        title = f"{room} in {timed[0]['dtype']} on {timed[0]['device']}: {passes_of(timed)}"
        bars([_bar(row) for row in timed], path, title, "milliseconds (p50; p20 to p80)", "% of the floor", "\n".join(notes))
        written.append(path)
    return written


def whole(rows: Sequence[Row]) -> list[Row]:
    """Of each shape the rows of both passes together; forward alone where there is no backward pass."""
    both = {(row["room"], row["shape"]) for row in rows if pass_of(row) == "both"}
    return [row for row in rows if pass_of(row) == ("both" if (row["room"], row["shape"]) in both else "forward")]


def passes_of(rows: Iterable[Row]) -> str:
    """In words."""
    kinds = {pass_of(row) for row in rows}
    if len(kinds) > 1:
        return "forward and backward, or forward where nothing learns"
    return "forward and backward" if kinds == {"both"} else "forward"


def pass_of(row: Row) -> str:
    """forward, backward or both."""
    return row["pass"]


def on_a_cpu(row: Row) -> bool:
    """Whether the row tells nothing about a GPU."""
    return row["device"].startswith("CPU")


def charts_of_results(folder: Path, results: Path = RESULTS) -> list[Path]:
    """For each file of results a folder in `folder` that is called as the file is, with its charts."""
    found = files(results, "kernels")
    return [chart for path in found for chart in charts(latest(path, KEY), folder / path.relative_to(results).with_suffix(""))]


def _bar(row: Row) -> Bar:
    colour = BASELINE if row["implementation"] == REFERENCE else OTHERS if row["peer"] else OURS
    label = row["implementation"] + (" (peer)" if row["peer"] else "")
    return Bar(row["shape"], label, row["ms_p50"], row["ms_p20"], row["ms_p80"], row["floor_share"], colour)


def table(results: Path = RESULTS) -> str:
    """Markdown: for each file of results what it was measured on, then a line a room, shape and implementation."""
    parts = [_part(latest(path, KEY), path.relative_to(results)) for path in files(results, "kernels")]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _part(rows: Sequence[Row], path: Path) -> str:
    shown = whole(rows)
    first = shown[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version is not None)
    commit = (first["commit"] or "unknown")[:9] + (" and changes not committed" if first["dirty"] else "")
    power = "" if first["power_limit_watts"] is None else f", power limit {first['power_limit_watts']:g} W"
    driver = "" if first["driver"] is None else f", driver {first['driver']}"
    dtypes = "/".join(dict.fromkeys(row["dtype"] for row in shown))
    lines = [
        f"**{first['device']}**, {dtypes}{driver}{power}; {versions}; commit {commit}; `benches/results/{path.as_posix()}`.",
        f"Products {first['matmul_ceiling_tflops']:.3g} TFLOP/s and copies {first['copy_ceiling_gbs']:.3g} GB/s in the same process;",
        "the floor is the larger of FLOPs over the one and bytes over the other.",
        *([ON_A_CPU] if on_a_cpu(first) else []),
        "",
        "| room | shape | implementation | pass | ms p50 (p20 to p80) | % of floor | peak MiB | error (reference's) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in shown if row["void"] is None]
    lines += _void_lines([row for row in shown if row["void"] is not None])
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = f"{row['implementation']}{' (peer)' if row['peer'] else ''}"
    time = f"{row['ms_p50']:.3g} ({row['ms_p20']:.3g} to {row['ms_p80']:.3g})"
    error = "a lower bound" if row["error"] is None else f"{row['error']:.1e} ({row['reference_error']:.1e})"
    passes = "forward, backward" if pass_of(row) == "both" else pass_of(row)
    cells: list[Any] = [row["room"], row["shape"], name, passes, time, f"{row['floor_share']:.0%}", f"{row['peak_bytes'] / MIB:.3g}", error]
    return f"| {' | '.join(map(str, cells))} |"


def _void_lines(rows: Sequence[Row]) -> list[str]:
    """What has no time, by reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        reasons.setdefault(row["void"], {})[f"{row['room']} {row['implementation']}"] = None
    return ["", "Without a time:", "", *(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())] if reasons else []
