"""`fastllava bench report`: the tables in README and docs that committed results are behind, and charts of results.

A table stands wherever a text has its marks, `<!-- bench peers: begin -->` and `<!-- bench peers: end -->`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.lib.charts import BASELINE, OTHERS, OURS, Bar, bars
from benches.lib.results import RESULTS, Row, latest
from benches.lib.rows import ORIGINAL
from benches.lib.rows import OURS as MINE
from benches.lib.world import REPO
from fastllava.errors import UserError
from fastllava_kernels.room import REFERENCE

TEXTS = ("README.md", "docs/*.md", "kernels/*.md")
GIB, MIB = 2**30, 2**20
KEYS: Mapping[str, Sequence[str]] = {
    "kernels": ("room", "implementation", "shape", "dtype", "pass", "device"),
    "peers": ("variant", "stage", "size", "layers", "dtype", "samples_per_step", "device"),
    "step": (
        *("stage", "size", "layers", "dtype", "samples_per_step"),
        *("micro_batch_tokens", "recompute", "last_layer", "compile", "device"),
    ),
}
"""By kind of results, what rows of one measurement agree in: the last of them counts."""
ON_A_CPU = "Measured on a CPU: it shows that everything runs and is right, and says nothing about a GPU."
NOTHING = "Nothing has been measured yet."

Table = Callable[[Path], str]


def results_of(results: Path, kind: str) -> Iterator[tuple[Path, list[Row]]]:
    """The rows of results/<kind>*.jsonl, then of those in the folders there, as `fastllava bench gpu` writes them."""
    for path in [*sorted(results.glob(f"{kind}*.jsonl")), *sorted(results.glob(f"*/{kind}*.jsonl"))]:
        yield path.relative_to(results), latest(path, KEYS[kind])


def kernels_table(results: Path) -> str:
    """For each file what it was measured on, then a line a room, shape and implementation."""
    head = ("room", "shape", "implementation", "pass", "ms p50 (p20 to p80)", "% of floor", "peak MiB", "error (reference's)")

    def line(row: Row) -> Sequence[str]:
        return (
            *(row["room"], row["shape"], row["implementation"] + (" (peer)" if row["peer"] else "")),
            *("forward, backward" if row["pass"] == "both" else row["pass"], f"{row['ms_p50']:.3g} {_spread(row, 'ms', '.3g')}"),
            *(f"{row['floor_share']:.0%}", f"{row['peak_bytes'] / MIB:.3g}"),
            "a lower bound" if row["error"] is None else f"{row['error']:.1e} ({row['reference_error']:.1e})",
        )

    def about(row: Row) -> str:
        return (
            f"Products {row['matmul_ceiling_tflops']:.3g} TFLOP/s and copies {row['copy_ceiling_gbs']:.3g} GB/s in the same process; "
            "the floor is the larger of FLOPs over the one and bytes over the other."
        )

    parts = ((path, whole(rows)) for path, rows in results_of(results, "kernels"))
    return _parts(parts, about, head, line, lambda row: f"{row['room']} {row['implementation']}")


def whole(rows: Sequence[Row]) -> list[Row]:
    """For each shape the rows of both passes together; forward alone where there is no backward pass."""
    both = {(row["room"], row["shape"]) for row in rows if row["pass"] == "both"}
    return [row for row in rows if row["pass"] == ("both" if (row["room"], row["shape"]) in both else "forward")]


def peers_table(results: Path) -> str:
    """For each file what it was measured on, then a line a stage, size and variant."""
    head = (
        *("stage", "model", "variant", "samples/s", "times the original's recipe (p20 to p80)", "tokens/s"),
        *("share of ceiling", "MFU", "peak GiB", "padding", "micro-batch"),
    )

    def line(row: Row) -> Sequence[str]:
        times = "-"
        if row["times_original_p50"] is not None and row["variant"] != ORIGINAL:
            times = f"{row['times_original_p50']:.2f} {_spread(row, 'times_original', '.2f')}"
        return (
            *(row["stage"], _model(row), f"**{MINE}**" if row["variant"] == MINE else row["variant"]),
            *(f"{row['samples_per_second']:.3g}", times, f"{row['tokens_per_second']:,.0f}", f"{row['ceiling_share']:.0%}"),
            *(_share(row["mfu"]), f"{row['peak_bytes'] / GIB:.2f}", f"{row['padding_share']:.0%}"),
            f"{row['micro_batch_tokens']:,} tokens" if row["micro_batch"] is None else f"{row['micro_batch']} samples",
        )

    return _parts(results_of(results, "peers"), _steps, head, line, _step_name)


def steps_table(results: Path) -> str:
    """For each file what it was measured on, then a line a stage and setting."""
    head = (
        *("stage", "model", "recompute", "compile", "samples/s", "tokens/s", "ms a step (p20 to p80)"),
        *("share of ceiling", "MFU", "HFU", "peak GiB"),
    )

    def line(row: Row) -> Sequence[str]:
        return (
            *(row["stage"], _model(row), row["recompute"], row["compile"]),
            *(f"{row['samples_per_second']:.3g}", f"{row['tokens_per_second']:,.0f}"),
            *(f"{row['step_ms_p50']:,.0f} {_spread(row, 'step_ms', ',.0f')}", f"{row['ceiling_share']:.0%}"),
            *(_share(row["mfu"]), _share(row["hfu"]), f"{row['peak_bytes'] / GIB:.2f}"),
        )

    return _parts(results_of(results, "step"), _steps, head, line, _step_name)


def plan_table(results: Path) -> str:
    """For each results/plan*.json a line a stage, and the sum: what is foreseen of runs that nobody has made."""
    head = (
        *("predicted", "stage", "samples", "steps", "recompute", "tokens a micro-batch", "memory, GiB", "s a step"),
        *("MFU", "hours", "limited by"),
    )
    lines = []
    for path in sorted(results.glob("plan*.json")):
        stages = json.loads(path.read_text(encoding="utf-8"))
        parameters = sum(stages[0]["parameters"].values())
        name = f"{parameters / 1e9:.0f}B on {stages[0]['world']} x {stages[0]['gpu']}"
        for stage in stages:
            lines.append((name, stage["stage"], f"{stage['samples']:,}", f"{stage['steps']:,}", *_foreseen(stage), stage["limit"]))
        if len(stages) > 1 and all(stage["chosen"] for stage in stages):
            hours, gpu_hours = (sum(stage[unit] for stage in stages) for unit in ("hours", "gpu_hours"))
            lines.append((name, "**both**", *[""] * 7, f"**{hours:.1f}**", f"{gpu_hours:.0f} GPU-hours"))
    return _markdown(head, lines)


def _foreseen(stage: Mapping[str, Any]) -> Sequence[str]:
    if (best := stage["chosen"]) is None:
        return ("-",) * 6
    memory = f"{best['peak_memory_bytes'] / GIB:.0f} of {stage['room_bytes'] / GIB:.0f}"
    figures = (f"{best['step_seconds']:.2f}", f"{best['mfu']:.0%}", f"{stage['hours']:.1f}")
    return (best["recompute"], f"{best['micro_batch_tokens']:,}", memory, *figures)


def _parts(
    found: Any, about: Callable[[Row], str], head: Sequence[str], line: Callable[[Row], Sequence[str]], name: Callable[[Row], str]
) -> str:
    """A part for each file: the world, `about` it, a line for each row with a time, and what has none by reason."""
    parts = []
    for path, rows in found:
        first, reasons = rows[0], {}
        for row in (row for row in rows if row["void"] is not None):
            reasons.setdefault(row["void"], {})[name(row)] = None
        text = [_world(first, path), about(first), *([ON_A_CPU] if first["device"].startswith("CPU") else []), ""]
        text.append(_markdown(head, [line(row) for row in rows if row["void"] is None]))
        if reasons:
            text += ["", "Without a time:", "", *(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())]
        parts.append("\n".join(text))
    return "\n\n".join(parts) or NOTHING


def _world(row: Row, path: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version is not None)
    commit = (row["commit"] or "unknown")[:9] + (" and changes not committed" if row["dirty"] else "")
    gpu = [] if row["driver"] is None else [f"driver {row['driver']}", f"power limit {row['power_limit_watts']} W"]
    return f"**{row['device']}**, {', '.join([row['dtype'], *gpu])}; {versions}; commit {commit}; `benches/results/{path.as_posix()}`."


def _steps(row: Row) -> str:
    return (
        f"Steps of {row['samples_per_step']} samples. Products run at {row['matmul_ceiling_tflops']:.3g} TFLOP/s in the same process; "
        "the share counts the FLOPs that the training needs, so none for padding or recomputation."
    )


def _step_name(row: Row) -> str:
    return f"{row['stage']} {row['size']} {row['variant']}"


def _model(row: Row) -> str:
    return f"{row['size']}, {row['layers']} layers"


def _spread(row: Row, name: str, form: str) -> str:
    return f"({row[f'{name}_p20']:{form}} to {row[f'{name}_p80']:{form}})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = (f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in (head, *lines))
    first, *rest = cells
    return "\n".join([first, "|" + "---|" * len(head), *rest])


TABLES: Mapping[str, Table] = {
    "plan": plan_table,
    "bench peers": peers_table,
    "bench step": steps_table,
    "bench kernels": kernels_table,
}
"""By the words of the marks."""


def write(root: Path = REPO, results: Path = RESULTS, tables: Mapping[str, Table] = TABLES) -> list[Path]:
    """Write every table anew in the texts under `root`; those texts. Raises UserError for a table that has marks in none."""
    texts = {path: path.read_text(encoding="utf-8") for pattern in TEXTS for path in sorted(root.glob(pattern))}
    for name, table in tables.items():
        mine = [path for path, text in texts.items() if f"<!-- {name}: begin -->" in text]
        if not mine:
            raise UserError(
                f"bench report: no text has the marks <!-- {name}: begin --> and <!-- {name}: end -->; put them where the table goes"
            )
        for path in mine:
            texts[path] = between_marks(texts[path], name, table(results))
    written = [path for path, text in texts.items() if any(f"<!-- {name}: begin -->" in text for name in tables)]
    for path in written:
        path.write_text(texts[path], encoding="utf-8")
    return written


def between_marks(text: str, name: str, generated: str) -> str:
    """`text` with what stands between the marks replaced. Raises UserError without the second."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"bench report: {begin.strip()} has no {end} after it")
    return before + begin + generated.rstrip("\n") + "\n" + end + after


def kernels_charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`folder/<room>.png` for each room with a time: forward and backward together, or forward where nothing learns."""
    colours = "blue: what kernels.<room> can choose; orange: the reference, eager PyTorch; grey: peers, which only this bench runs"

    def bar(row: Row) -> Bar:
        colour = BASELINE if row["implementation"] == REFERENCE else OTHERS if row["peer"] else OURS
        label = row["implementation"] + (" (peer)" if row["peer"] else "")
        return Bar(row["shape"], label, row["ms_p50"], row["ms_p20"], row["ms_p80"], row["floor_share"], colour)

    written = []
    for room in dict.fromkeys(row["room"] for row in rows):
        shown = [row for row in whole(rows) if row["room"] == room]
        if timed := [row for row in shown if row["void"] is None]:
            title = f"{room} in {timed[0]['dtype']} on {timed[0]['device']}"
            notes = [colours, *([f"{len(shown) - len(timed)} more are void: see the results"] if len(timed) < len(shown) else [])]
            notes += [ON_A_CPU] if timed[0]["device"].startswith("CPU") else []
            written.append(folder / f"{room}.png")
            labels = "milliseconds, forward and backward where something learns (p50; p20 to p80)", "% of the floor"
            bars([bar(row) for row in timed], written[-1], title, *labels, "\n".join(notes))
    return written


def peers_charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`folder/peers_<size>_<stage>.png` for each size and stage with a time."""

    def bar(row: Row) -> Bar:
        speed, middle = row["samples_per_second"], row["step_ms_p50"]
        colour = {MINE: OURS, ORIGINAL: BASELINE}.get(row["variant"], OTHERS)
        # Samples over the sum of all times lie beside the median's where steps differ in length.
        low, *_, high = sorted((speed, speed * middle / row["step_ms_p80"], speed * middle / row["step_ms_p20"]))
        return Bar(f"{row['size']} {row['stage']}", row["variant"], speed, low, high, row["peak_bytes"] / GIB, colour)

    written = []
    for size, stage in dict.fromkeys((row["size"], row["stage"]) for row in rows):
        if timed := [row for row in rows if (row["size"], row["stage"], row["void"]) == (size, stage, None)]:
            first = timed[0]
            title = f"{stage}, {size} with {first['layers']} decoder layers, {first['dtype']} on {first['device']}"
            note = f"blue: fastllava; orange: the original's recipe; grey: transformers; {first['samples_per_step']} samples a step"
            written.append(folder / f"peers_{size}_{stage}.png")
            labels = "samples a second (spread: step time p20 to p80)", "peak memory, GiB"
            bars([bar(row) for row in timed], written[-1], title, *labels, note, 1.0)
    return written


CHARTS: Mapping[str, Callable[[Sequence[Row], Path], list[Path]]] = {"kernels": kernels_charts, "peers": peers_charts}


def charts_of_results(folder: Path, results: Path = RESULTS) -> list[Path]:
    """For each file of results a folder in `folder` that is called as the file is, with its charts."""
    found = ((draw, path, rows) for kind, draw in CHARTS.items() for path, rows in results_of(results, kind))
    return [chart for draw, path, rows in found for chart in draw(rows, folder / path.with_suffix(""))]
