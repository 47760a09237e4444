"""Lengths -> padded batches under a budget, and the static shapes that a compiled engine runs. Plain integers only.

Lengths and budgets are in feature frames (10 ms). The cost of a batch is `size * frame_cost(longest)`: its padded
frames, with a quadratic part for attention, whose scores take as much memory as a layer's other states at
QUADRATIC_FRAMES.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUADRATIC_FRAMES = 4000  # 40 s, 500 encoder frames: 8 heads x 2 x 500 scores a frame, as wide as two feed-forwards
MAX_PADDING = 0.1  # share of a batch's frames; by the budget alone, LibriSpeech in batches of 1280 s would pad 11 %
BUCKET_STEP = 8  # feature frames: bucket lengths are whole encoder frames


@dataclass(frozen=True)
class Batch:
    """Items to run together: positions in the list of lengths, and the padded length of all."""

    indices: tuple[int, ...]
    frames: int


@dataclass(frozen=True)
class Bucket:
    """A static shape: `size` items of `frames` feature frames each."""

    frames: int
    size: int


def frame_cost(frames: int) -> float:
    """Cost of one item padded to `frames`, in frames of a short item."""
    return frames * (1 + frames / QUADRATIC_FRAMES)


def plan_batches(lens: Sequence[int], budget_frames: float, max_size: int | None = None) -> list[Batch]:
    """Group items of similar length, shortest first, each batch as large as the budget and MAX_PADDING allow.

    Args:
        lens: feature frames of each item.
        budget_frames: greatest cost of a batch; an item that exceeds it alone is a batch of its own.
        max_size: most items of a batch.

    Returns:
        Batches that hold every index exactly once. A pure function of the arguments: ties keep their order.
    """
    order = np.argsort(np.asarray(lens, dtype=np.int64), kind="stable").tolist()
    groups: list[list[int]] = []
    size = frames = 0  # of the last group
    for index in order:
        size, frames = size + 1, frames + lens[index]
        full = max_size is not None and size > max_size
        uneven = frames < (1 - MAX_PADDING) * size * lens[index]
        if not groups or full or uneven or size * frame_cost(lens[index]) > budget_frames:
            groups.append([])
            size, frames = 1, lens[index]
        groups[-1].append(index)
    return [Batch(tuple(group), lens[group[-1]]) for group in groups]


def plan_buckets(lens: Sequence[int], budget_frames: float, max_buckets: int = 12) -> list[Bucket]:
    """The static shapes with the least padding for these lengths.

    Lengths are rounded up to BUCKET_STEP; then the best `max_buckets` of them are found exactly, by dynamic programming
    over the histogram.

    Args:
        lens: feature frames, a sample of the job's items.
        budget_frames: greatest cost of a bucket; one longer than the budget has size 1.
        max_buckets: most shapes; each costs compilation and, on a GPU, a captured graph.

    Returns:
        Buckets in order of length; the last one fits the longest item.
    """
    rounded = -(-np.maximum(np.asarray(lens, dtype=np.int64), 1) // BUCKET_STEP) * BUCKET_STEP
    lengths, counts = np.unique(rounded, return_counts=True)
    cut = _least_padding(lengths, counts, min(max_buckets, len(lengths)))
    return [Bucket(int(frames), max(1, int(budget_frames // frame_cost(int(frames))))) for frames in lengths[cut]]


def _least_padding(lengths: np.ndarray, counts: np.ndarray, buckets: int) -> list[int]:
    """Positions of the `buckets` lengths that, as upper bounds, pad `counts` items of `lengths` least."""
    n = len(lengths)
    items = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((buckets + 1, n + 1), np.inf)  # cost[b, j]: padded frames of the first j lengths in b buckets
    came_from = np.zeros((buckets + 1, n + 1), dtype=np.int64)
    cost[0, 0] = 0
    for b in range(1, buckets + 1):
        for j in range(1, n + 1):
            options = cost[b - 1, :j] + (items[j] - items[:j]) * lengths[j - 1]
            came_from[b, j] = int(options.argmin())
            cost[b, j] = options[came_from[b, j]]
    cut, j = [], n
    for b in range(buckets, 0, -1):
        cut.append(j - 1)
        j = int(came_from[b, j])
    return cut[::-1]


def padding_share(lens: Sequence[int], batches: Sequence[Batch]) -> float:
    """Share of the padded frames that are padding, in [0, 1)."""
    padded = sum(batch.frames * len(batch.indices) for batch in batches)
    return 1 - sum(lens[index] for batch in batches for index in batch.indices) / padded if padded else 0.0
