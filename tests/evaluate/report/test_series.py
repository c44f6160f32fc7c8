"""Long series: thinned so that no extreme is lost, and smoothed without what is not finite."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllava.evaluate.report.series import running_mean, thinned, window_of


def test_extremes_stay_and_so_do_gaps() -> None:
    y = np.sin(np.arange(100_000) / 500)
    y[40_123], y[70_001], y[90_000] = 50.0, -60.0, math.nan
    x, kept = thinned(np.arange(100_000).tolist(), y.tolist(), most=2000)
    assert len(x) <= 2000
    assert dict(zip(x.tolist(), kept.tolist(), strict=True))[40_123] == 50.0
    assert dict(zip(x.tolist(), kept.tolist(), strict=True))[70_001] == -60.0
    assert x[np.isnan(kept)].tolist() == [90_000]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60), st.sampled_from([2, 10, 30]))
def test_every_thinned_series_is_a_part_of_it_with_its_extremes(values: list[float], most: int) -> None:
    x, y = thinned(list(range(len(values))), values, most)
    assert len(x) <= max(most, 2)
    assert (np.diff(x) > 0).all()
    assert all(v == values[int(i)] or (math.isnan(v) and math.isnan(values[int(i)])) for i, v in zip(x, y, strict=True))
    finite = [v for v in values if math.isfinite(v)]
    if finite and len(finite) == len(values):
        assert {min(finite), max(finite)} <= set(y.tolist())


def test_a_running_mean_is_that_of_the_values_around() -> None:
    assert running_mean([1, 2, 3, 4, 5], 3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert running_mean([1, math.nan, 3, math.inf, 5], 3).tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(running_mean([math.nan], 3)).all()


@pytest.mark.parametrize(("count", "window"), [(0, 1), (5, 1), (99, 1), (150, 3), (5198, 103)])
def test_a_window_is_a_fiftieth(count: int, window: int) -> None:
    assert window_of(count) == window
