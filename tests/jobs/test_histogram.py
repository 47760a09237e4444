"""jobs/report/histogram.py and the scales of jobs/report/charts.py against numpy and plain counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.report.charts import ticks_up_to
from jobs.report.histogram import Histogram
from jobs.report.stats import CONFIDENCE_EDGES, DURATION_EDGES, RATE_EDGES

tenths = st.lists(st.integers(0, 400_000).map(lambda tenth: tenth / 10), min_size=1, max_size=60)
WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)


def filled(edges: np.ndarray, values: list[float]) -> Histogram:
    histogram = Histogram(edges)
    histogram.add(np.array(values))
    return histogram


@given(tenths, st.integers(1, 36_000))
def test_bars_count_each_value_once_and_in_its_bin(values, stop):
    bars = filled(DURATION_EDGES, values).bars(0.0, float(stop), WIDTHS_S, 40)
    assert bars.below + sum(bars.counts) + bars.above == len(values)
    last = bars.edges[-1]
    ends = last == DURATION_EDGES[-1]  # the last edge of the histogram itself is inside
    for low, high, count in zip(bars.edges, bars.edges[1:], bars.counts, strict=False):
        inside = [low <= value < high or (ends and value == high == last) for value in values]
        assert count == sum(inside)
    assert len(bars.counts) <= 40


@given(tenths, tenths)
def test_merged_histograms_equal_one_over_all_values(first, second):
    merged, whole = filled(DURATION_EDGES, first), filled(DURATION_EDGES, first + second)
    merged.merge(filled(DURATION_EDGES, second))
    assert merged.counts.tolist() == whole.counts.tolist()
    assert (merged.total, merged.minimum, merged.maximum) == (whole.total, whole.minimum, whole.maximum)
    assert merged.sum == pytest.approx(whole.sum)


@pytest.mark.parametrize("share", [0.005, 0.05, 0.25, 0.5, 0.95, 0.995])
def test_quantiles_are_within_a_bin_of_numpy(share):
    values = np.random.default_rng(0).gamma(3.0, 3.0, 5000)
    assert filled(DURATION_EDGES, values).quantile(share) == pytest.approx(np.quantile(values, share), abs=0.1)


def test_quantiles_of_one_value_are_that_value():
    assert {filled(DURATION_EDGES, [7.3]).quantile(share) for share in (0.0, 0.25, 0.5, 1.0)} == {7.3}


def test_float32_values_fall_into_the_bin_that_begins_at_them():
    values = [0.005 * n for n in range(201)]
    histogram = Histogram(CONFIDENCE_EDGES)
    histogram.add(np.array(values, np.float32).astype(np.float64))
    assert histogram.counts.tolist() == [0, *[1] * 199, 2, 0]  # 1.0 shares the last bin with 0.995


def test_nothing_is_lost_that_is_not_a_number():
    histogram = filled(RATE_EDGES, [np.nan, np.inf, -np.inf, -1.0, 0.0, 100.0, 1e9])
    assert histogram.total == 4
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1]) == (1, 1, 1, 1)


def test_counts_between_edges_are_refused():
    with pytest.raises(ValueError, match="not an edge"):
        filled(RATE_EDGES, [1.0]).count_below(0.3)


@given(st.floats(1e-6, 1e12), st.integers(2, 8))
def test_scales_reach_the_top_in_few_round_steps(top, at_most):
    ticks = ticks_up_to(top, at_most)
    assert ticks[0] == 0
    assert ticks[-1] >= top * (1 - 1e-9)
    assert len(ticks) <= at_most + 1
    assert f"{ticks[1]:.0e}"[0] in "125"
