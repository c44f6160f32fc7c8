"""Charts of a page: lines over steps, horizontal bars, and histograms, drawn by matplotlib, with their values under the pointer."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastllava.console.printable import printable, shortened
from fastllava.evaluate.report.page import fill
from fastllava.evaluate.report.series import thinned
from fastllava.evaluate.report.svg import COLOURS, SETTINGS, svg_of

Colour = Literal["blue", "pale", "orange", "green", "red", "grey"]
_WIDTH, _HEIGHT = 4.7, 2.55
"""Inches of a drawing; a page shows it about as large."""
_BOX = (0.165, 0.185, 0.795, 0.785)
"""Where the axes lie in charts over steps, as shares of the drawing: left, bottom, width, height. The same in all, so they line up."""
_LONGEST_LABEL = 34


@dataclass(frozen=True)
class Line:
    """A series of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Colour = "blue"
    dots: bool = False
    """Whether its points are marked, as those of a series with few."""


def line_chart(title: str, unit: str, lines: Sequence[Line], *, x_label: str = "optimizer step", log: bool = False) -> Markup:
    """Series over steps. Values that are not finite are gaps. `log`: a logarithmic scale, where all values are positive.

    Long series are drawn as `thinned` leaves them, which the values under the pointer are of too.
    """
    drawn = [_thinned(line) for line in lines]
    finite = [value for line in drawn for value in line.y if math.isfinite(value)]
    log = log and bool(finite) and min(finite) > 0
    with rc_context(SETTINGS):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        axes = figure.add_axes(_BOX)
        for line in drawn:
            marker = "o" if line.dots or len(line.x) == 1 else None
            # Dots at the borders are whole.
            axes.plot(line.x, line.y, color=COLOURS[line.colour], marker=marker, linewidth=1.3, markersize=3.6, clip_on=marker is None)
        if log:
            axes.set_yscale("log")
        _scale(axes, drawn, finite, log)
        axes.set(xlabel=x_label, ylabel=unit)
        # At the same place whatever the ticks are.
        axes.yaxis.set_label_coords(-0.163, 0.5)
        hover = _hover(figure, axes, drawn, x_label.rpartition(" ")[2])
    return _figure(title, figure, drawn if len(drawn) > 1 else (), hover)


def bar_chart(title: str, unit: str, values: Mapping[str, float], most: float | None = None, colour: Colour = "blue") -> Markup:
    """Horizontal bars with their values, the first on top; `most` is where the scale ends, when it is known."""
    finite = {_label(name): value for name, value in values.items() if math.isfinite(value)}
    end = most if most is not None else 1.12 * max([*finite.values(), 0.0])
    with rc_context(SETTINGS):
        figure = Figure(figsize=(_WIDTH, 0.62 + 0.23 * max(len(finite), 1)), layout="constrained")
        axes = figure.subplots()
        places = range(len(finite))
        axes.barh(places, list(finite.values()), height=0.62, color=COLOURS[colour])
        axes.set_yticks(places, list(finite))
        axes.set_ylim(len(finite) - 0.45, -0.55)
        axes.set_xlim(0, end or 1.0)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        for place, value in zip(places, finite.values(), strict=True):
            inside = value > 0.88 * (end or 1.0)
            at, side = (value - 0.012 * end, "right") if inside else (value + 0.012 * end, "left")
            axes.text(at, place, short(value), va="center", ha=side, fontsize=8.5, color="#ffffff" if inside else COLOURS["soft"])
    return _figure(title, figure)


def histogram(title: str, x_label: str, y_label: str, values: Sequence[int], bins: int = 40) -> Markup:
    """How many of the whole numbers `values`, of which there is one at least, lie in each of equal stretches."""
    counts, edges = np.histogram(values, bins=_edges(int(min(values)), int(max(values)), bins))
    with rc_context(SETTINGS):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        axes = figure.add_axes(_BOX)
        axes.stairs(counts, edges, fill=True, color=COLOURS["blue"])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.yaxis.set_label_coords(-0.163, 0.5)
        axes.set_ylim(0, None)
        _ticks(axes)
    return _figure(title, figure)


def tick(value: float) -> str:
    """A number as an axis bears it, thousands as k, M or G."""
    for letter, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}".replace("e-0", "e-")


def short(value: float) -> str:
    """A number of four digits at most as a bar bears it."""
    return f"{value:.4g}" if abs(value) < 1e4 else tick(value)


def _figure(title: str, figure: Figure, keys: Sequence[Line] = (), hover: Mapping[str, Any] | None = None) -> Markup:
    data = None if hover is None else Markup(escape(json.dumps(hover, separators=(",", ":"), allow_nan=False)))  # noqa: S704 (escaped)
    return fill("chart.html", title=title, keys=keys, svg=svg_of(figure, printable(title)), hover=data)


def _scale(axes: Axes, lines: Sequence[Line], finite: Sequence[float], log: bool) -> None:
    """Where the axes begin and end, and their ticks."""
    steps = [x for line in lines for x in line.x]
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    axes.set_xlim(low, high if high > low else low + 1)
    if finite and not log:
        least, most = min(finite), max(finite)
        room = 0.06 * (most - least) or 0.06 * abs(most) or 1.0
        # Near zero the scale begins there; further up it shows what changes.
        axes.set_ylim(0.0 if 0 <= least < 0.5 * most or least == most == 0 else least - room, most + room)
    _ticks(axes, log)


def _ticks(axes: Axes, log: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _hover(figure: Figure, axes: Axes, lines: Sequence[Line], name: str) -> dict[str, Any]:
    """What page.js needs to tell the values under the pointer: places in units of the drawing, values to five digits."""
    width, height = 72 * figure.get_size_inches()
    box = axes.get_position()
    left, right, top, bottom = box.x0 * width, box.x1 * width, (1 - box.y1) * height, (1 - box.y0) * height
    series = [
        {"name": printable(line.name), "x": [_plain(x) for x in line.x], "y": [_rounded(y) for y in line.y]} for line in lines if line.x
    ]
    return {"box": [round(float(v), 2) for v in (left, top, right, bottom)], "x": list(axes.get_xlim()), "name": name, "series": series}


def _edges(least: int, most: int, bins: int) -> Any:
    """Borders of at most `bins` stretches of whole numbers, all of one width."""
    width = max(1, math.ceil((most - least + 1) / bins))
    return np.arange(least, most + width + 1, width) - 0.5


def _thinned(line: Line) -> Line:
    x, y = thinned(line.x, line.y)
    return replace(line, x=x.tolist(), y=y.tolist())


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _label(name: str) -> str:
    return (
        shortened(" ".join(printable(name).split()), _LONGEST_LABEL)
        if len(name) <= _LONGEST_LABEL
        else f"{printable(name)[: _LONGEST_LABEL - 3]}..."
    )
