"""What the results of `fastllava bench peers` and `step` look like: a chart of speed and memory, and the tables in docs/benchmarks.md."""

from collections.abc import Sequence
from pathlib import Path

from benches.charts import BASELINE, OTHERS, OURS, Bar, bars
from benches.peer_rows import ORIGINAL
from benches.peer_rows import OURS as MINE
from benches.results import RESULTS, Row, files, latest

KEY = ("variant", "stage", "size", "layers", "dtype", "samples_per_step", "device")
STEP_KEY = ("stage", "size", "layers", "dtype", "samples_per_step", "micro_batch_tokens", "recompute", "last_layer", "compile", "device")
GIB = 2**30
COLOURS = "blue: fastllava; orange: the original's recipe; grey: transformers"


def charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`folder/peers_<size>_<stage>.png` for each size and stage with a time."""
    written = []
    for size, stage in dict.fromkeys((row["size"], row["stage"]) for row in rows):
        timed = [row for row in rows if (row["size"], row["stage"]) == (size, stage) and row["void"] is None]
        if not timed:
            continue
        path = folder / f"peers_{size}_{stage}.png"
        first = timed[0]
        title = f"{stage}, {size} with {first['layers']} decoder layers, {first['dtype']} on {first['device']}"
        note = f"{COLOURS}; steps of {first['samples_per_step']} samples, the same for all, in turns"
        bars([_bar(row) for row in timed], path, title, "samples a second (spread: step time p20 to p80)", "peak memory, GiB", note, 1.0)
        written.append(path)
    return written


def charts_of_results(folder: Path, results: Path = RESULTS) -> list[Path]:
    """For each file of results a folder in `folder` that is called as the file is, with its charts."""
    found = files(results, "peers")
    return [chart for path in found for chart in charts(latest(path, KEY), folder / path.relative_to(results).with_suffix(""))]


def _bar(row: Row) -> Bar:
    speed, middle = row["samples_per_second"], row["step_ms_p50"]
    colour = {MINE: OURS, ORIGINAL: BASELINE}.get(row["variant"], OTHERS)
    low, high = sorted((speed * middle / row["step_ms_p80"], speed * middle / row["step_ms_p20"]))
    # Samples over the sum of all times lie beside the median's where steps differ in length.
    low, high = min(low, speed), max(high, speed)
    return Bar(f"{row['size']} {row['stage']}", row["variant"], speed, low, high, row["peak_bytes"] / GIB, colour)


def table(results: Path = RESULTS) -> str:
    """Markdown: for each file of results what it was measured on, then a line a stage, size and variant."""
    parts = [_part(latest(path, KEY), path.relative_to(results)) for path in files(results, "peers")]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _part(rows: Sequence[Row], path: Path) -> str:
    timed, void = ([row for row in rows if (row["void"] is None) is wanted] for wanted in (True, False))
    lines = [
        *_world(rows[0], path),
        "| stage | model | variant | samples/s | times the original's recipe (p20 to p80) | tokens/s | share of ceiling | MFU "
        "| peak GiB | padding | micro-batch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(row) for row in timed] + _void_lines(void))


def _world(first: Row, path: Path) -> list[str]:
    """What a file was measured on, and how its shares are meant."""
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version is not None)
    commit = (first["commit"] or "unknown")[:9] + (" and changes not committed" if first["dirty"] else "")
    return [
        f"**{first['device']}**, {first['dtype']}, steps of {first['samples_per_step']} samples; {versions}; commit {commit}; "
        f"`benches/results/{path.as_posix()}`.",
        f"Products run at {first['matmul_ceiling_tflops']:.3g} TFLOP/s in the same process; the share counts the FLOPs that the training "
        "needs, so none for padding or recomputation.",
        "",
    ]


def _line(row: Row) -> str:
    times = "-"
    if row["times_original_p50"] is not None and row["variant"] != ORIGINAL:
        times = f"{row['times_original_p50']:.2f} ({row['times_original_p20']:.2f} to {row['times_original_p80']:.2f})"
    micro_batch = f"{row['micro_batch_tokens']:,} rows" if row["micro_batch"] is None else f"{row['micro_batch']} samples"
    cells = [
        *(row["stage"], f"{row['size']}, {row['layers']} layers", f"**{MINE}**" if row["variant"] == MINE else row["variant"]),
        *(f"{row['samples_per_second']:.3g}", times, f"{row['tokens_per_second']:,.0f}", f"{row['ceiling_share']:.0%}"),
        *("-" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['peak_bytes'] / GIB:.2f}", f"{row['padding_share']:.0%}", micro_batch),
    ]
    return f"| {' | '.join(cells)} |"


def steps_table(results: Path = RESULTS) -> str:
    """Markdown: for each file of results of `bench step` what it was measured on, then a line a stage and setting."""
    parts = [_steps(latest(path, STEP_KEY), path.relative_to(results)) for path in files(results, "step")]
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _steps(rows: Sequence[Row], path: Path) -> str:
    lines = [
        *_world(rows[0], path),
        "| stage | model | recompute | compile | samples/s | tokens/s | ms a step (p20 to p80) | share of ceiling | MFU | HFU | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_step_line(row) for row in rows if row["void"] is None]
    return "\n".join(lines + _void_lines([row for row in rows if row["void"] is not None]))


def _step_line(row: Row) -> str:
    cells = [
        *(row["stage"], f"{row['size']}, {row['layers']} layers", row["recompute"], row["compile"]),
        *(f"{row['samples_per_second']:.3g}", f"{row['tokens_per_second']:,.0f}"),
        f"{row['step_ms_p50']:,.0f} ({row['step_ms_p20']:,.0f} to {row['step_ms_p80']:,.0f})",
        f"{row['ceiling_share']:.0%}",
        *("-" if row[share] is None else f"{row[share]:.1%}" for share in ("mfu", "hfu")),
        f"{row['peak_bytes'] / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _void_lines(rows: Sequence[Row]) -> list[str]:
    """What has no time, and why."""
    lines = [f"- {row['stage']} {row['size']} {row['variant']}: {row['void']}" for row in rows]
    return ["", "Without a time:", "", *lines] if lines else []
