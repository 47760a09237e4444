"""Plan rows -> shards: which items are read, computed and committed together.

Shards are a pure function of the input and the options, whatever the order of the listing, the machine or the time.
Strings wait on local disk; in memory an item is 44 bytes of numbers, so 10 million items fit in 2 GiB.

    batches -> spill + numbers -> minus what is planned -> unique ids -> seconds -> order -> cut -> Plan

Knows nothing of Ray, of the output, or of how rows are read.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from jobs.planning.facts import RowFacts, collect_rows
from jobs.planning.planned_items import BLOCK_ROWS, PlannedItems
from jobs.planning.sizing import Rate, estimate_audio_s, measure_rates
from jobs.planning.unique_ids import Renamed, find_new, leave_out_broken, leave_out_rewritten, make_unique
from jobs.storage.connections import DEFAULT_OPTIONS, StorageOptions
from parakeet_core.errors import ConfigError

SHARD_ITEMS = 20_000  # rows with words and times are about 1 KB each: a part of very short clips stays near 20 MB
SHARD_BYTES = 1 << 30  # 1800 s of 48 kHz stereo 24-bit are 518 MB; above, reading a lost shard again costs too much
AUTO_SHARDS = 64  # small inputs: enough shards to spread over a few dozen workers
AUTO_MIN_S = 120.0  # below this, Ray's fixed cost per block is noticeable
AUTO_MAX_S = 1800.0  # as 80-mel float16 features they are 29 MB, a good block size
SIZE_STEPS_PER_OCTAVE = 4  # lengths within one size group differ by at most 19 %


@dataclass(frozen=True)
class PlanOptions:
    """How shards are cut.

    Args:
        shard_audio_s: seconds of audio per shard; None: a 64th of the input, between 120 and 1800.
        shard_items, shard_bytes: further limits of a shard.
        storage: how to reach the headers that are sampled.
    """

    shard_audio_s: float | None = None
    shard_items: int = SHARD_ITEMS
    shard_bytes: int = SHARD_BYTES
    storage: StorageOptions = DEFAULT_OPTIONS

    def __post_init__(self):
        if self.shard_audio_s is not None and not self.shard_audio_s > 0:
            raise ConfigError(f"shard_audio_s is {self.shard_audio_s}; expected more than 0 seconds")
        if self.shard_items < 1 or self.shard_bytes < 1:
            raise ConfigError("shard_items and shard_bytes: expected 1 or more")


@dataclass
class Plan:
    """The shards of one generation, not yet stored. Its rows lie in a temporary folder until `close`.

    Args:
        generation: 0 for the first, one more each time the input has grown.
        shard_audio_s: the limit that was used.
        facts: the numbers of all rows; renamed: new ids of some of them.
        shard_of: int32 [N], -1 for rows of earlier generations.
        shard_audio: float64 [shards], longest first. shard_rows, shard_items: int64 [shards]; items count containers of
            unknown content as 0.
        items: known items; if `exact` is False there are more, inside tars that were not opened.
        already_planned: rows left out because an earlier generation holds them.
        rewritten: those of them that are row groups of Parquet files written again under the same name.
        duplicates: rows whose id was made unique.
        rates: how seconds were estimated.
        fingerprint: hex digest of the rows' numbers and of the cut.
    """

    generation: int
    shard_audio_s: float
    facts: RowFacts = field(repr=False)
    shard_of: np.ndarray = field(repr=False)
    shard_audio: np.ndarray = field(repr=False)
    shard_rows: np.ndarray = field(repr=False)
    shard_items: np.ndarray = field(repr=False)
    items: int
    exact: bool
    rejected: int
    already_planned: int
    rewritten: int
    duplicates: int
    rates: list[Rate]
    fingerprint: str
    renamed: Renamed = field(repr=False)
    spill: tempfile.TemporaryDirectory = field(repr=False)

    @property
    def shards(self) -> int:
        return len(self.shard_audio)

    @property
    def audio_s(self) -> float:
        return float(self.shard_audio.sum())

    def close(self) -> None:
        self.spill.cleanup()

    def __enter__(self) -> "Plan":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def plan_shards(
    batches: Iterable[pa.RecordBatch],
    options: PlanOptions = PlanOptions(),
    planned: PlannedItems | None = None,
    generation: int = 0,
) -> Plan:
    """Cut a stream of plan rows into shards.

    Rows of similar length come together, and rows of one source stay together where they fit. Within a size group rows
    are ordered by a hash of the source, so a shard is a random sample of its size group and of the input's folders.

    Args:
        batches: of `PLAN_SCHEMA`, e.g. `InputScan.batches()`.
        planned: what earlier generations hold (`item_digests.planned_items`).
    """
    spill = tempfile.TemporaryDirectory(prefix="parakeet-plan-")
    planned = planned or PlannedItems()
    facts, codes, sampler = collect_rows(batches, spill.name, planned)
    fresh = find_new(facts, spill.name, planned)
    leave_out_broken(facts, fresh, spill.name, planned)
    rewritten = leave_out_rewritten(facts, fresh)
    renamed = make_unique(facts, fresh, spill.name, planned)
    rates = measure_rates(sampler, options.storage)
    facts.audio_s = estimate_audio_s(rates, codes, facts.size_bytes, facts.audio_s)
    del codes
    order = order_rows(facts, np.flatnonzero(fresh))
    total_s = float(facts.audio_s[order].sum(dtype=np.float64))  # summed in this order, because sums are rounded
    limit_s = options.shard_audio_s or float(np.clip(total_s / AUTO_SHARDS, AUTO_MIN_S, AUTO_MAX_S))
    shard_of, audio = cut_shards(facts, order, limit_s, options)
    rows = np.bincount(shard_of[order], minlength=len(audio))
    items = np.bincount(shard_of[order], weights=np.maximum(facts.items[order], 0), minlength=len(audio))
    return Plan(
        generation=generation,
        shard_audio_s=limit_s,
        facts=facts,
        shard_of=shard_of,
        shard_audio=audio,
        shard_rows=rows,
        shard_items=items.astype(np.int64),
        items=int(items.sum()),
        exact=bool((facts.items[order] >= 0).all()),
        rejected=int(facts.rejected[order].sum()),
        already_planned=int(len(facts) - len(order)),
        rewritten=rewritten,
        duplicates=len(renamed.rows),
        rates=rates,
        fingerprint=_fingerprint(facts, order, shard_of, limit_s),
        renamed=renamed,
        spill=spill,
    )


def order_rows(facts: RowFacts, rows: np.ndarray) -> np.ndarray:
    """`rows` ordered by size group, then source, then offset, then id; int64."""
    if not len(rows):
        return rows
    rows = rows[np.argsort(facts.source[rows], kind="stable")]
    new_source = np.ones(len(rows), bool)
    new_source[1:] = facts.source[rows[1:]] != facts.source[rows[:-1]]
    starts = np.flatnonzero(new_source)
    lengths = np.diff(np.append(starts, len(rows)))
    shared = np.flatnonzero(np.repeat(lengths > 1, lengths))  # only segments of one source need the finer keys
    rows[shared] = _order_segments(facts, rows[shared])
    mean_s = np.add.reduceat(facts.audio_s[rows], starts, dtype=np.float64)
    mean_s /= np.add.reduceat(np.maximum(facts.items[rows], 1), starts, dtype=np.int64)
    group = np.floor(np.log2(np.maximum(mean_s, 0.01)) * SIZE_STEPS_PER_OCTAVE).astype(np.int8)
    del mean_s, starts, new_source
    return rows[np.argsort(np.repeat(group, lengths), kind="stable")]


def _order_segments(facts: RowFacts, rows: np.ndarray) -> np.ndarray:
    keys = (facts.digest[rows, 1], facts.digest[rows, 0], facts.offset_s[rows], facts.source[rows])
    return rows[np.lexsort(keys)]


def cut_shards(
    facts: RowFacts, order: np.ndarray, limit_s: float, options: PlanOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the ordered rows; shard 0 is the longest, so that no long shard is left for the end of the job.

    Returns:
        (shard of each row of `facts`, int32 [N], -1 where not in `order`; seconds per shard, float64 [shards]).
    """
    shard_of = np.full(len(facts), -1, np.int32)
    if not len(order):
        return shard_of, np.empty(0)
    new_source = np.ones(len(order), bool)
    new_source[1:] = facts.source[order[1:]] != facts.source[order[:-1]]
    unit_start = new_source | facts.container[order]
    starts = np.flatnonzero(unit_start)
    over = np.diff(_running_sum(facts.audio_s, order, starts)) > limit_s
    over |= np.diff(_running_sum(facts.items, order, starts, least=1)) > options.shard_items
    lengths = np.diff(np.append(starts, len(order)))
    starts = np.flatnonzero(
        unit_start | np.repeat(over, lengths)
    )  # a source too long for one shard is cut at its segments
    del over, lengths, unit_start, new_source
    sums = [
        _running_sum(facts.audio_s, order, starts),
        _running_sum(facts.items, order, starts, least=1),
        _running_sum(facts.size_bytes, order, starts),
    ]
    cuts = _greedy_cuts(sums, (limit_s, options.shard_items, options.shard_bytes))
    del sums
    row_cuts = np.append(starts, len(order))[cuts]
    shard_audio = np.add.reduceat(facts.audio_s[order], row_cuts[:-1], dtype=np.float64)
    by_length = np.argsort(-shard_audio, kind="stable")
    number = np.empty(len(by_length), np.int32)
    number[by_length] = np.arange(len(by_length), dtype=np.int32)
    shard_of[order] = np.repeat(number, np.diff(row_cuts))
    return shard_of, shard_audio[by_length]


def _running_sum(column: np.ndarray, order: np.ndarray, starts: np.ndarray, least: int = 0) -> np.ndarray:
    """Sums of `column` before each unit, and the total, [units + 1]; values under `least` count as `least`."""
    kind = np.float64 if column.dtype.kind == "f" else np.int64
    sums = np.zeros(len(starts) + 1, kind)
    np.cumsum(np.add.reduceat(np.maximum(column[order], least), starts, dtype=kind), out=sums[1:])
    return sums


def _greedy_cuts(sums: list[np.ndarray], limits: tuple[float, ...]) -> np.ndarray:
    """Unit indices where shards begin, and the end: each takes units, at least one, while it is within all limits."""
    units = len(sums[0]) - 1
    cuts = [0]
    while cuts[-1] < units:
        at = cuts[-1]
        ends = [np.searchsorted(s, s[at] + limit, side="right") - 1 for s, limit in zip(sums, limits, strict=True)]
        cuts.append(max(int(min(ends)), at + 1))
    return np.array(cuts)


def _fingerprint(facts: RowFacts, order: np.ndarray, shard_of: np.ndarray, limit_s: float) -> str:
    digest = hashlib.blake2b(repr(limit_s).encode(), digest_size=16)
    for start in range(0, len(order), BLOCK_ROWS):
        rows = order[start : start + BLOCK_ROWS]
        for column in (facts.digest, facts.source, facts.audio_s, facts.size_bytes, facts.items, shard_of):
            digest.update(np.ascontiguousarray(column[rows]))
    return digest.hexdigest()
