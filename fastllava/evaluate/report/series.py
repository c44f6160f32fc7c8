"""Series of numbers over steps: thinned so that every extreme stays, and smoothed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 2000
"""Points of a drawn series. Of a longer one each of MOST_POINTS / 2 equal stretches shows its lowest and its highest value."""


def is_number(value: Any) -> bool:
    """Whether a value of somebody's JSON is a number that a float can hold, be it finite or not."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300)


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `most` of the points, in their order, the lowest and the highest of every stretch among them; all when they are few.

    A stretch with a value that is not finite keeps one such point in place of its lowest, so that the gap is seen.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(xs) <= most:
        return xs, ys
    kept: list[int] = []
    for part in np.array_split(np.arange(len(xs)), most // 2):
        finite = part[np.isfinite(ys[part])]
        lost = part[~np.isfinite(ys[part])]
        found = {int(lost[0])} if len(lost) else set()
        if len(finite):
            found |= {int(finite[ys[finite].argmax()])} | (set() if found else {int(finite[ys[finite].argmin()])})
        kept += sorted(found)
    return xs[kept], ys[kept]


def window_of(count: int) -> int:
    """How many steps a running mean over a run of `count` steps takes in: about a fiftieth, an odd number."""
    return max(1, count // 50) // 2 * 2 + 1


def running_mean(y: Sequence[float], window: int) -> NDArray[np.float64]:
    """The mean of the `window` values around each, fewer at the ends; values that are not finite are left out of it."""
    values = np.asarray(y, np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    begin, end = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    number = counts[end] - counts[begin]
    return np.where(number > 0, (sums[end] - sums[begin]) / np.maximum(number, 1), np.nan)
