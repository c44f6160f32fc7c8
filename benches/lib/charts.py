"""Charts of results as PNG: a bar a measurement, grouped, with its spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, BASELINE = "#2f6fb3", "#b9b9b9", "#e0a13a"
ROW_INCHES = 0.27
LOG_FROM = 30.0
"""The ratio of the longest to the shortest bar from which the axis is logarithmic."""


@dataclass(frozen=True)
class Bar:
    """One measurement."""

    group: str
    label: str
    value: float
    low: float
    high: float
    share: float
    """What the second panel shows: a share of the ceiling, 1 being all of it, or another figure."""
    colour: str


def bars(found: Sequence[Bar], path: Path, title: str, value_label: str, share_label: str, note: str = "", scale: float = 100.0) -> None:
    """Two panels: the values with their spread, and the shares times `scale`. As high as there are bars; groups keep their order."""
    figure = Figure(figsize=(11, 1.7 + ROW_INCHES * (len(found) + len({bar.group for bar in found}))), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    values, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = _places(found)
    for bar, place in zip(found, places, strict=True):
        spread = [[bar.value - bar.low], [bar.high - bar.value]]
        values.barh(place, bar.value, color=bar.colour, height=0.8, xerr=spread, error_kw={"lw": 0.8, "ecolor": "#444444"})
        values.annotate(f" {bar.value:.3g}", (bar.high, place), va="center", fontsize=7.5)
        shares.barh(place, scale * bar.share, color=bar.colour, height=0.8)
        shares.annotate(f" {scale * bar.share:.3g}", (scale * bar.share, place), va="center", fontsize=7.5)
    values.set_yticks(places, [bar.label for bar in found], fontsize=8)
    _name_groups(values, found, places)
    values.set_ylim(places[-1] + 0.6, -0.4)
    ratio = max(bar.high for bar in found) / min(bar.value for bar in found)
    _finish(values, value_label, [bar.value for bar in found], max(bar.high for bar in found), logarithmic=ratio > LOG_FROM)
    _finish(shares, share_label, [scale * bar.share for bar in found], scale * max(bar.share for bar in found), logarithmic=False)
    if note:
        figure.supxlabel(note, fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in it, the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _places(found: Sequence[Bar]) -> list[float]:
    """One apart, with a gap before every group for its name."""
    places: list[float] = []
    group, place = None, -1.0
    for bar in found:
        place += 1.0 if bar.group == group else 2.0
        group = bar.group
        places.append(place)
    return places


def _name_groups(axes: Axes, found: Sequence[Bar], places: Sequence[float]) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
    named = set()
    for bar, place in zip(found, places, strict=True):
        if bar.group not in named:
            named.add(bar.group)
            axes.annotate(bar.group, (0, place - 1), xycoords=axes.get_yaxis_transform(), xytext=(3, 0), **style)


def _finish(axes: Axes, label: str, lengths: Sequence[float], longest: float, logarithmic: bool) -> None:
    """Limits that leave room for the numbers at the bars' ends."""
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(min(lengths))), longest * 2)
        label += ", logarithmic"
    else:
        axes.set_xlim(0, longest * 1.15)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
