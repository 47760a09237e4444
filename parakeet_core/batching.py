"""Lengths -> padded batches under a budget. Plain integers only.

Lengths and budgets are in feature frames (10 ms). The cost of a batch is `size * frame_cost(longest)`: its padded
frames, with a quadratic part for attention, whose scores take as much memory as a layer's other states at
QUADRATIC_FRAMES.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUADRATIC_FRAMES = 4000  # 40 s, 500 encoder frames: 8 heads x 2 x 500 scores a frame, as wide as two feed-forwards
MAX_PADDING = 0.1  # share of a batch's frames; under the budget alone, LibriSpeech in batches of 1280 s would pad 11 %


@dataclass(frozen=True)
class Batch:
    """Items to run together: positions in the list of lengths, and the length that all are padded to."""

    indices: tuple[int, ...]
    frames: int


def frame_cost(frames: int) -> float:
    """Cost of one item padded to `frames`, in frames of a short item."""
    return frames * (1 + frames / QUADRATIC_FRAMES)


def plan_batches(lens: Sequence[int], budget_frames: float, max_size: int | None = None) -> list[Batch]:
    """Group items of similar length, shortest first, each batch as large as the budget and MAX_PADDING allow.

    Args:
        lens: feature frames of each item.
        budget_frames: greatest cost of a batch; an item that alone exceeds it is a batch of its own.
        max_size: most items in a batch.

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


def padding_share(lens: Sequence[int], batches: Sequence[Batch]) -> float:
    """Share of the padded frames that are padding, in [0, 1)."""
    padded = sum(batch.frames * len(batch.indices) for batch in batches)
    return 1 - sum(lens[index] for batch in batches for index in batch.indices) / padded if padded else 0.0
