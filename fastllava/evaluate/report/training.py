"""What a run's metrics tell: the figures that its page begins with, and the charts over steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastllava.evaluate.report.charts import Line, line_chart
from fastllava.evaluate.report.page import Notice, Section, Tile, fill
from fastllava.evaluate.report.run import Run
from fastllava.evaluate.report.series import MOST_POINTS, is_number, running_mean, window_of
from fastllava.train.metrics.summary import CLOSING_STEPS

_GIB = 2**30
_LISTED = 8
Row = Mapping[str, Any]


def tiles(run: Run, planned: int | None) -> list[Tile]:
    """The figures that a page begins with; `planned` is how many steps the run takes."""
    steps, found = run.rows.steps, []
    closing = [row["loss"] for row in steps[-CLOSING_STEPS:] if math.isfinite(row["loss"])]
    if closing:
        last = steps[-1]["loss"]
        found.append(
            Tile("loss, nats a token", f"{sum(closing) / len(closing):.4f}", f"mean of the last {len(closing)} steps; last {last:.4f}")
        )
    held_out = [row for row in run.rows.evaluations if is_number(row.get("held_out_loss"))]
    if held_out:
        last, first = held_out[-1], held_out[0]
        note = f"at step {last['step']:,}" + (f"; {first['held_out_loss']:.4f} at step {first['step']:,}" if first is not last else "")
        found.append(Tile("held-out loss, nats a token", f"{last['held_out_loss']:.4f}", note))
    samples = _total(steps, "samples")
    found.append(Tile("steps", f"{run.taken:,}" + (f" of {planned:,}" if planned else ""), f"{samples:,.0f} samples"))
    seconds = _total(steps, "step_seconds")
    if seconds:
        tokens = _total(steps, "tokens")
        found.append(Tile("tokens a second", f"{tokens / seconds:,.0f}", f"{samples / seconds:,.1f} samples a second, data wait included"))
        if steps and all(is_number(row.get(key)) for row in steps for key in ("mfu", "hfu", "step_seconds")):
            mfu, hfu = (sum(row[key] * row["step_seconds"] for row in steps) / seconds for key in ("mfu", "hfu"))
            found.append(Tile("MFU", f"{mfu:.1%}", f"HFU {hfu:.1%}"))
        goodput = run.summary.get("goodput")
        note = (
            f"goodput {goodput:.0%}"
            if is_number(goodput) and not run.running
            else f"data wait {_total(steps, 'data_wait_seconds') / seconds:.1%}"
        )
        found.append(Tile("time in steps", duration(seconds), note))
    peaks = [row["peak_memory_bytes"] for row in steps if is_number(row.get("peak_memory_bytes"))]
    if peaks:
        found.append(Tile("peak GPU memory", f"{max(peaks) / _GIB:.1f} GiB"))
    versions = run.summary.get("versions")
    device, processes = (versions.get("device") if isinstance(versions, dict) else None), run.summary.get("processes")
    if device:
        found.append(Tile("device", str(device), f"{processes} process{'es' if processes != 1 else ''}"))
    return found


def notices(run: Run, planned: int | None) -> list[Notice]:
    """What of a run's course a reader should not miss."""
    found = []
    again = "; the same command goes on with it"
    match run.status[0]:
        case "running":
            found.append(Notice("The run is going on: this page tells of it as it was when the page was written."))
        case "stopped":
            found.append(Notice(f"A signal stopped the run before step {run.taken:,}{again}.", serious=True))
        case "failed":
            found.append(
                Notice(f"The run ended with an error before step {run.taken:,}, which it told on its terminal{again}.", serious=True)
            )
        case "ended":
            found.append(
                Notice(
                    f"The run ended after step {run.taken - 1:,} without a word, as when it is killed or its machine stops{again}.",
                    serious=True,
                )
            )
        case "not begun":
            found.append(Notice("The run has taken no step, and no process is at work on it.", serious=True))
    for path in sorted(run.folder.glob("non_finite_step_*.json"))[:_LISTED]:
        found.append(
            Notice(f"A loss or gradient that is not finite stopped the run; {path.name} names the samples of that step.", serious=True)
        )
    if run.rows.damaged:
        lines = "1 line of metrics.jsonl is" if run.rows.damaged == 1 else f"{run.rows.damaged:,} lines of metrics.jsonl are"
        found.append(Notice(f"{lines} damaged and left out here.", serious=True))
    if lost := run.taken - len(run.rows.steps):
        found.append(Notice(f"metrics.jsonl lacks the rows of {lost:,} of {run.taken:,} steps.", serious=True))
    spikes = [row for row in run.rows.steps if isinstance(row.get("spike"), dict)]
    if spikes:
        listed = ", ".join(f"{row['step']:,}" for row in spikes[:_LISTED]) + (", ..." if len(spikes) > _LISTED else "")
        skipped = sum(bool(row["spike"].get("skipped")) for row in spikes)
        done = f"{skipped} of them skipped" if skipped else "all trained on"
        words = f"1 loss spike, at step {listed}" if len(spikes) == 1 else f"{len(spikes)} loss spikes, at steps {listed}, {done}"
        found.append(Notice(f"{words}: loss or gradient norm more than 6 sigma above the last 128 steps."))
    if run.set_aside:
        samples = "1 sample" if run.set_aside == 1 else f"{run.set_aside:,} samples"
        found.append(Notice(f"{samples} could not be read any more and left out on the way: set_aside.jsonl.", serious=True))
    noted = run.summary.get("notes")
    for note in noted if isinstance(noted, list) else ():
        found.append(Notice(str(note), serious=True))
    return found


def section(run: Run) -> Section:
    """The charts over steps."""
    steps = run.rows.steps
    charts = [chart for draw in _CHARTS if (chart := draw(run, window_of(len(steps)))) is not None]
    thinned = len(steps) > MOST_POINTS
    body = fill("training.html", charts=charts, steps=len(steps), thinned=thinned, stretches=MOST_POINTS // 2, window=window_of(len(steps)))
    return Section("training", "Training", body)


def duration(seconds: float) -> str:
    """A length of time in the two units that suit it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _loss(run: Run, window: int) -> Markup | None:
    x, y = _series(run.rows.steps, "loss")
    lines = [Line("each step", x, y, "pale")] if x else []
    if window > 1:
        lines.append(Line(f"mean of {window}", x, running_mean(y, window).tolist(), "blue"))
    elif lines:
        lines = [Line("each step", x, y, "blue")]
    held_x, held_y = _series(run.rows.evaluations, "held_out_loss")
    if held_x:
        lines.append(Line("held out", held_x, held_y, "orange", dots=True))
    positive = [value for line in lines for value in line.y if math.isfinite(value)]
    steep = bool(positive) and min(positive) > 0 and max(positive) > 30 * sorted(positive)[len(positive) // 2]
    return line_chart("Loss", "nats a supervised token", lines, log=steep) if lines else None


def _held_out(run: Run, window: int) -> Markup | None:
    x, y = _series(run.rows.evaluations, "held_out_loss")
    return (
        line_chart("Held-out loss", "nats a supervised token", [Line("held-out loss", x, y, "orange", dots=True)]) if len(x) > 1 else None
    )


def _rate(run: Run, window: int) -> Markup | None:
    return _plain(run, "lr", "Learning rate", "", "learning rate")


def _norm(run: Run, window: int) -> Markup | None:
    x, y = _series(run.rows.steps, "grad_norm")
    if not x:
        return None
    lines = [Line("each step", x, y, "pale" if window > 1 else "blue")]
    if window > 1:
        lines.append(Line(f"mean of {window}", x, running_mean(y, window).tolist(), "blue"))
    return line_chart("Gradient norm", "norm, before clipping", lines, log=True)


def _throughput(run: Run, window: int) -> Markup | None:
    return _smooth(run, window, "tokens_per_second", "Throughput", "tokens a second", 1.0)


def _samples(run: Run, window: int) -> Markup | None:
    return _smooth(run, window, "samples_per_second", "Samples", "samples a second", 1.0)


def _mfu(run: Run, window: int) -> Markup | None:
    return _smooth(run, window, "mfu", "MFU", "percent of the GPU's bf16 peak", 100.0)


def _wait(run: Run, window: int) -> Markup | None:
    rows = [
        row
        for row in run.rows.steps
        if is_number(row.get("data_wait_seconds")) and is_number(row.get("step_seconds")) and row["step_seconds"]
    ]
    x, y = [row["step"] for row in rows], [100 * row["data_wait_seconds"] / row["step_seconds"] for row in rows]
    return _with_mean("Data wait", "percent of the step's time", x, y, window) if x else None


def _memory(run: Run, window: int) -> Markup | None:
    return _plain(run, "peak_memory_bytes", "Peak GPU memory", "GiB", "peak memory", 1 / _GIB)


_CHARTS: Sequence[Callable[[Run, int], Markup | None]] = (_loss, _held_out, _rate, _norm, _throughput, _samples, _mfu, _wait, _memory)


def _plain(run: Run, key: str, title: str, unit: str, name: str, scale: float = 1.0) -> Markup | None:
    x, y = _series(run.rows.steps, key, scale)
    return line_chart(title, unit or name, [Line(name, x, y)]) if x else None


def _smooth(run: Run, window: int, key: str, title: str, unit: str, scale: float) -> Markup | None:
    x, y = _series(run.rows.steps, key, scale)
    return _with_mean(title, unit, x, y, window) if x else None


def _with_mean(title: str, unit: str, x: Sequence[float], y: Sequence[float], window: int) -> Markup:
    lines = [Line("each step", x, y, "pale" if window > 1 else "blue")]
    if window > 1:
        lines.append(Line(f"mean of {window}", x, running_mean(y, window).tolist(), "blue"))
    return line_chart(title, unit, lines)


def _series(rows: Sequence[Row], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and values of a key, of the rows that have a number there."""
    found = [(row["step"], scale * row[key]) for row in rows if is_number(row.get(key))]
    return [step for step, _ in found], [float(value) for _, value in found]


def _total(rows: Sequence[Row], key: str) -> float:
    return sum(row[key] for row in rows if is_number(row.get(key)) and math.isfinite(row[key]))
