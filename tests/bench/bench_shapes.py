"""What static shapes would cost: padding of batches as the engine makes them beside batches of fixed shapes.

    python tests/bench/bench_shapes.py [--repeat N]

A captured graph, or a compiler that takes no symbols, needs batches of a few shapes known in advance. Here the lengths
of those shapes are the best possible for the input. Every shard is planned as the job plans it, and then cut into
batches of those shapes that hold only its own items, since a shard is what is committed. Counts frames; runs no model.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import harness
import numpy as np
import pyarrow as pa
from harness import print_table

from jobs.inputs.plan_rows import plan_batch
from jobs.planning.shards import plan_shards
from parakeet_core.batching import frame_cost, plan_batches
from parakeet_core.engine import CUDA_BUDGET_FRAMES

LENGTHS = (6, 12, 24)  # how many padded lengths there may be; each is a graph, or several
LENGTH_STEP = 8  # feature frames: lengths of shapes are whole encoder frames
SIZES = {  # rows that a batch of `items` items is padded to, where a full one has `most`
    "any": lambda items, most: items,
    "eighths": lambda items, most: min(-(-items * 8 // most) * -(-most // 8), most),
    "one": lambda items, most: most,
}


def main() -> None:
    parser = harness.bench_arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20, help="how often the listing is repeated")
    options = parser.parse_args()
    durations = harness.speech_durations() * options.repeat
    shards = _shards(durations)
    real = sum(map(sum, shards))
    rows = []
    for budget in (CUDA_BUDGET_FRAMES, CUDA_BUDGET_FRAMES // 4):
        batches = [(len(batch.indices), batch.frames) for lens in shards for batch in plan_batches(lens, budget)]
        rows.append([f"{budget:,}", "as its items give it", *_shares(batches, real)])
        for count in LENGTHS:
            lengths = best_lengths(harness.frames_of(durations), count)
            for name, rounded in SIZES.items():
                batches = [shape for lens in shards for shape in static_batches(lens, lengths, budget, rounded)]
                rows.append([f"{budget:,}", f"{count} lengths, sizes: {name}", *_shares(batches, real)])
    hours = sum(durations) / 3600
    title = f"{hours:.0f} h, {len(durations):,} items, {len(shards)} shards of at most 1,800 s"
    print_table(title, ["budget, frames", "shape of a batch", "batches", "shapes", "padding, %"], rows)


def _shards(durations: list[float]) -> list[list[int]]:
    """Feature frames of the items of each shard, as the job cuts them."""
    names = [f"{number:07d}.flac" for number in range(len(durations))]
    rows = plan_batch("file", {"id": pa.array(names), "source": pa.array(names), "audio_s": pa.array(durations)})
    with plan_shards([rows]) as plan:
        order = np.argsort(plan.shard_of, kind="stable")
        frames = np.array(harness.frames_of(plan.facts.audio_s[order]))
        return [shard.tolist() for shard in np.split(frames, np.cumsum(plan.shard_rows)[:-1])]


def _shares(batches: list[tuple[int, int]], real: int) -> list[object]:
    padded = sum(size * frames for size, frames in batches)
    return [len(batches), len(set(batches)), 100 * (1 - real / padded)]


def static_batches(
    lens: Sequence[int], lengths: Sequence[int], budget_frames: float, rounded: Callable[[int, int], int]
) -> list[tuple[int, int]]:
    """(rows, frames) of each batch of a shard, each item in the shortest of `lengths` that holds it."""
    counts = Counter(next(length for length in lengths if length >= frames) for frames in lens)
    batches = []
    for length, items in counts.items():
        most = max(1, math.floor(budget_frames / frame_cost(length)))
        batches += [(most, length)] * (items // most)
        if items % most:
            batches.append((rounded(items % most, most), length))
    return batches


def best_lengths(lens: Sequence[int], count: int) -> list[int]:
    """The `count` lengths that pad items of `lens` frames least, in order: dynamic programming over the histogram."""
    steps = -(-np.maximum(np.asarray(lens, dtype=np.int64), 1) // LENGTH_STEP) * LENGTH_STEP
    lengths, counts = np.unique(steps, return_counts=True)
    items = np.concatenate([[0], np.cumsum(counts)])
    n, count = len(lengths), min(count, len(lengths))
    padded = np.full((count + 1, n + 1), np.inf)  # [b, j]: frames of the first j lengths, padded to b of them
    padded[0, 0] = 0
    came_from = np.zeros((count + 1, n + 1), dtype=np.int64)
    for b in range(1, count + 1):
        for j in range(1, n + 1):
            options = padded[b - 1, :j] + (items[j] - items[:j]) * lengths[j - 1]
            came_from[b, j] = int(options.argmin())
            padded[b, j] = options[came_from[b, j]]
    chosen, j = [], n
    for b in range(count, 0, -1):
        chosen.append(int(lengths[j - 1]))
        j = int(came_from[b, j])
    return chosen[::-1]


if __name__ == "__main__":
    main()
