"""`fastllava bench report`: the tables in README and docs that committed results are behind, and charts of results.

A table stands wherever a text has its marks, `<!-- bench peers: begin -->` and `<!-- bench peers: end -->`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from benches.lib.charts import BASELINE, OTHERS, OURS, Bar, bars
from benches.lib.results import RESULTS, Row, latest
from benches.lib.rows import ORIGINAL
from benches.lib.rows import OURS as MINE
from benches.lib.world import REPO
from fastllava.errors import UserError
from fastllava_kernels.room import REFERENCE

TEXTS = ("README.md", "docs/*.md", "kernels/*.md")
GIB = 2**30
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

Table = Callable[[Path], str]


class Cells(Formatter):
    """Formats fields of a row; one that has no value is "-"."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """The text of one field."""
        return "-" if value is None else super().format_field(value, format_spec)


@dataclass(frozen=True)
class Form:
    """How rows of a kind become lines of a table."""

    kind: str
    head: str
    line: str
    """A format of a row's fields and those of `derive`."""
    about: str
    """A format of what is said of a file's first row."""
    name: str
    """A format of what is said of a row without a time."""
    derive: Callable[[Row], Row]

    def table(self, results: Path) -> str:
        """For each file of this kind: what it was measured on, a line a row, and what has no time, by reason."""
        parts = []
        for path, rows in results_of(results, self.kind):
            shown = whole(rows) if self.kind == "kernels" else rows
            text = [_world(shown[0], path), self.about.format(**shown[0])]
            text += [ON_A_CPU, ""] if shown[0]["device"].startswith("CPU") else [""]
            text += [self.head, "|" + "---|" * (self.head.count("|") - 1)]
            text += [Cells().format(self.line, **row, **self.derive(row)) for row in shown if row["void"] is None]
            reasons: dict[str, dict[str, None]] = {}
            for row in (row for row in shown if row["void"] is not None):
                reasons.setdefault(row["void"], {})[self.name.format(**row)] = None
            if reasons:
                text += ["", "Without a time:", "", *(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())]
            parts.append("\n".join(text))
        return "\n\n".join(parts) or "Nothing has been measured yet."


def results_of(results: Path, kind: str) -> Iterator[tuple[Path, list[Row]]]:
    """The rows of results/<kind>*.jsonl, then of those in the folders there, as `fastllava bench gpu` writes them."""
    for path in [*sorted(results.glob(f"{kind}*.jsonl")), *sorted(results.glob(f"*/{kind}*.jsonl"))]:
        yield path.relative_to(results), latest(path, KEYS[kind])


def whole(rows: Sequence[Row]) -> list[Row]:
    """For each shape the rows of both passes together; forward alone where there is no backward pass."""
    both = {(row["room"], row["shape"]) for row in rows if row["pass"] == "both"}
    return [row for row in rows if row["pass"] == ("both" if (row["room"], row["shape"]) in both else "forward")]


def _of_kernels(row: Row) -> Row:
    return {
        "who": row["implementation"] + (" (peer)" if row["peer"] else ""),
        "passes": "forward, backward" if row["pass"] == "both" else row["pass"],
        "mib": row["peak_bytes"] / 2**20,
        "host": "-" if row["host_us"] is None else f"{row['host_us']:.0f}{', waited for' * row['host_bound']}",
        "errors": "a lower bound" if row["error"] is None else f"{row['error']:.1e} ({row['reference_error']:.1e})",
    }


def _of_steps(row: Row) -> Row:
    times = row.get("times_original_p50")
    spread = f"{times:.2f} ({row['times_original_p20']:.2f} to {row['times_original_p80']:.2f})" if times is not None else None
    return {
        "who": f"**{MINE}**" if row["variant"] == MINE else row["variant"],
        "times": None if row["variant"] == ORIGINAL else spread,
        "gib": row["peak_bytes"] / GIB,
        "taken": f"{row['micro_batch_tokens']:,} tokens" if row.get("micro_batch") is None else f"{row['micro_batch']} samples",
    }


KERNELS = Form(
    "kernels",
    "| room | shape | implementation | pass | ms p50 (p20 to p80) | host us | % of floor | peak MiB | error (reference's) |",
    "| {room} | {shape} | {who} | {passes} | {ms_p50:.3g} ({ms_p20:.3g} to {ms_p80:.3g}) | {host} "
    "| {floor_share:.0%} | {mib:.3g} | {errors} |",
    "Products {matmul_ceiling_tflops:.3g} TFLOP/s and copies {copy_ceiling_gbs:.3g} GB/s in the same process; the floor is the larger of "
    "FLOPs over the one and bytes over the other.",
    "{room} {implementation}",
    _of_kernels,
)
OF_STEPS = (
    "Steps of {samples_per_step} samples. Products run at {matmul_ceiling_tflops:.3g} TFLOP/s in the same process; the share counts the "
    "FLOPs that the training needs, so none for padding or recomputation.",
    "{stage} {size} {variant}",
    _of_steps,
)
PEERS = Form(
    "peers",
    "| stage | model | variant | samples/s | times the original's recipe (p20 to p80) | tokens/s | share of ceiling | MFU | peak GiB "
    "| padding | micro-batch |",
    "| {stage} | {size}, {layers} layers | {who} | {samples_per_second:.3g} | {times} | {tokens_per_second:,.0f} | {ceiling_share:.0%} "
    "| {mfu:.1%} | {gib:.2f} | {padding_share:.0%} | {taken} |",
    *OF_STEPS,
)
STEP = Form(
    "step",
    "| stage | model | recompute | compile | samples/s | tokens/s | ms a step (p20 to p80) | share of ceiling | MFU | HFU | peak GiB |",
    "| {stage} | {size}, {layers} layers | {recompute} | {compile} | {samples_per_second:.3g} | {tokens_per_second:,.0f} "
    "| {step_ms_p50:,.0f} ({step_ms_p20:,.0f} to {step_ms_p80:,.0f}) | {ceiling_share:.0%} | {mfu:.1%} | {hfu:.1%} | {gib:.2f} |",
    *OF_STEPS,
)


def plan_table(results: Path) -> str:
    """For each results/plan*.json a line a stage, and the sum: what is foreseen of runs that nobody has made."""
    head = "| predicted | stage | samples | steps | recompute | tokens a micro-batch | memory, GiB | s a step | MFU | hours | limited by |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for path in sorted(results.glob("plan*.json")):
        stages = json.loads(path.read_text(encoding="utf-8"))
        parameters = sum(stages[0]["parameters"].values())
        name = f"{parameters / 1e9:.0f}B on {stages[0]['world']} x {stages[0]['gpu']}"
        for stage in stages:
            foreseen = _foreseen(stage) if stage["chosen"] else ("-",) * 6
            cells = (name, stage["stage"], f"{stage['samples']:,}", f"{stage['steps']:,}", *foreseen, stage["limit"])
            lines.append(f"| {' | '.join(cells)} |")
        if len(stages) > 1 and all(stage["chosen"] for stage in stages):
            hours, gpu_hours = (sum(stage[unit] for stage in stages) for unit in ("hours", "gpu_hours"))
            lines.append(f"| {name} | **both** | | | | | | | | **{hours:.1f}** | {gpu_hours:.0f} GPU-hours |")
    return "\n".join(lines)


def _foreseen(stage: Mapping[str, Any]) -> Sequence[str]:
    best = stage["chosen"]
    memory = f"{best['peak_memory_bytes'] / GIB:.0f} of {stage['usable_bytes'] / GIB:.0f}"
    figures = (f"{best['step_seconds']:.2f}", f"{best['mfu']:.0%}", f"{stage['hours']:.1f}")
    return (best["recompute"], f"{best['micro_batch_tokens']:,}", memory, *figures)


def _world(row: Row, path: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version is not None)
    commit = (row["commit"] or "unknown")[:9] + (" and changes not committed" if row["dirty"] else "")
    gpu = [] if row["driver"] is None else [f"driver {row['driver']}", f"power limit {row['power_limit_watts']} W"]
    return f"**{row['device']}**, {', '.join([row['dtype'], *gpu])}; {versions}; commit {commit}; `benches/results/{path.as_posix()}`."


TABLES: Mapping[str, Table] = {
    "plan": plan_table,
    "bench peers": PEERS.table,
    "bench step": STEP.table,
    "bench kernels": KERNELS.table,
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
