"""Counts of numbers in fixed bins: exact, small, summed over any number of parts. Knows nothing of tables or pages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

DIGITS = 6  # float32 columns hold 0.9 as 0.89999998: rounded to this, it falls into the bin that begins at 0.9


@dataclass(frozen=True)
class Bars:
    """Bins as a chart shows them.

    Attributes:
        edges: n + 1 ascending borders; a value on a border belongs to the bar that begins there.
        counts: n counts.
        below, above: values left of the first border and from the last one on.
    """

    edges: list[float]
    counts: list[int]
    below: int
    above: int


@dataclass
class Histogram:
    """Counts between ascending `edges`, with exact count, sum and extremes. A value equal to the last edge is inside.

    Attributes:
        edges: float64 [n + 1].
        counts: int64 [n + 2]: below the first edge, the n bins, above the last edge.
    """

    edges: np.ndarray
    counts: np.ndarray = field(default=None)
    total: int = 0
    sum: float = 0.0
    minimum: float = float("inf")
    maximum: float = float("-inf")

    def __post_init__(self):
        if self.counts is None:
            self.counts = np.zeros(len(self.edges) + 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values, float [any]; those that are not finite are left out."""
        values = values[np.isfinite(values)].astype(np.float64).round(DIGITS)
        if not values.size:
            return
        bins = np.searchsorted(self.edges, values, side="right")
        bins[values == self.edges[-1]] -= 1
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.total += values.size
        self.sum += float(values.sum())
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))

    def merge(self, other: "Histogram") -> None:
        """Add the counts of a histogram with the same edges."""
        self.counts += other.counts
        self.total += other.total
        self.sum += other.sum
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    @property
    def mean(self) -> float:
        return self.sum / self.total

    def quantile(self, share: float) -> float:
        """The value below which `share` of the values lie, within one bin's width; undefined without values."""
        cumulative = np.cumsum(self.counts)
        rank = share * self.total
        found = int(np.searchsorted(cumulative, rank, side="left"))
        lows, highs = np.concatenate(([-np.inf], self.edges)), np.concatenate((self.edges, [np.inf]))
        low, high = max(lows[found], self.minimum), min(highs[found], self.maximum)
        before = cumulative[found - 1] if found else 0
        inside = (rank - before) / self.counts[found] if self.counts[found] else 0.0
        return float(low + (high - low) * inside)

    def count_below(self, edge: float) -> int:
        """Values under `edge`, which must be one of the edges."""
        found = int(np.searchsorted(self.edges, edge - 10**-DIGITS))
        if found == len(self.edges) or abs(self.edges[found] - edge) > 10**-DIGITS:
            raise ValueError(f"{edge} is not an edge of this histogram; only at edges are counts exact")
        return int(self.counts[: found + 1].sum())

    def bars(self, start: float, stop: float, widths: Sequence[float], at_most: int) -> Bars:
        """Regroup into bars of one width from `start` to the border after `stop`, both within the edges.

        Args:
            widths: ascending choices, multiples of the bins they cover; the first that needs few enough bars is taken.
            at_most: number of bars.
        """
        wanted = [int((stop - start) / width + 10**-DIGITS) + 1 for width in widths]
        bars, width = next(
            (pair for pair in zip(wanted, widths, strict=True) if pair[0] <= at_most), (wanted[-1], widths[-1])
        )
        edges = [round(start + width * n, DIGITS) for n in range(bars + 1)]
        edges = [edge for edge in edges if edge <= self.edges[-1]]
        counts = [self.count_below(edge) for edge in edges]
        top = self.total - int(self.counts[-1]) if edges[-1] == self.edges[-1] else counts[-1]
        inside = [high - low for low, high in zip(counts, [*counts[1:-1], top], strict=False)]
        return Bars(edges, inside, below=counts[0], above=self.total - top)
