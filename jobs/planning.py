"""Plan rows -> shards: which items are read, computed and committed together.

Shards are a pure function of the input and the options: the order of the listing, machine and time do not enter.
Strings wait on local disk; in memory an item is 44 bytes of numbers, so 10 million items fit in 2 GiB.

    batches -> spill + numbers -> unique ids -> minus what is planned -> seconds -> order -> cut -> Plan

Knows nothing of Ray, of the output, or of how rows are read.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.plan_rows import PLAN_SCHEMA, digest_strings
from jobs.sizing import KindSampler, Rate, estimate_audio_s, measure_rates
from jobs.storage import DEFAULT_OPTIONS, StorageOptions
from parakeet_core.errors import ConfigError

SHARDS_PER_FILE = 256  # a worker reads the footer of its plan file: about 200 KB at 256 row groups of 15 columns
SHARD_ITEMS = 20_000  # rows with words and times are about 1 KB each: a part of very short clips stays near 20 MB
SHARD_BYTES = (
    1 << 30
)  # 1800 s of 48 kHz stereo 24-bit are 518 MB; above 1 GiB the reading of a lost shard is dear to repeat
AUTO_SHARDS = 64  # small inputs: enough shards to spread over a few dozen workers
AUTO_MIN_S, AUTO_MAX_S = (
    120.0,
    1800.0,
)  # below, the fixed cost per block shows; 1800 s of 80-mel float16 are 29 MB, a good block
BUCKET_ROWS = 400_000  # rows sorted in memory at once while plan files are written, about 100 MB
SIZE_STEPS_PER_OCTAVE = 4  # lengths within one size group differ by at most 19 %


@dataclass(frozen=True)
class PlanOptions:
    """How shards are cut.

    Args:
        shard_audio_s: seconds of audio per shard; None: a 64th of the input, between 120 and 1800.
        shard_items, shard_bytes: caps beside it.
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
class RowFacts:
    """The numbers of all rows, in input order. Columns of N rows.

    Args:
        digest: uint64 [N, 2], of the id.
        source: uint64 [N], of the source.
        audio_s: float32 [N].
        size_bytes: int64 [N], -1 unknown.
        items: int32 [N], -1 unknown.
        offset_s: float32 [N], 0 where none.
        container: bool [N].
        rejected: bool [N].
    """

    digest: np.ndarray
    source: np.ndarray
    audio_s: np.ndarray
    size_bytes: np.ndarray
    items: np.ndarray
    offset_s: np.ndarray
    container: np.ndarray
    rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.audio_s)


@dataclass
class Plan:
    """The shards of one generation, not yet stored. Its rows lie in a temporary folder until `close`.

    Args:
        generation: 0 for the first, one more each time the input has grown.
        shard_audio_s: the limit that was used.
        facts, shard_of, renamed: see `_Draft`; `shard_of` is int32 [N], -1 for rows of earlier generations.
        shard_audio: float64 [shards], longest first. shard_rows, shard_items: int64 [shards]; items count containers of
            unknown content as 0.
        items: items known; with `exact` False there are more, inside tars not opened.
        already_planned: rows left out because an earlier generation holds their id.
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
    duplicates: int
    rates: list[Rate]
    fingerprint: str
    renamed: "Renamed" = field(repr=False)
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
    planned: np.ndarray | None = None,
    generation: int = 0,
) -> Plan:
    """Cut a stream of plan rows into shards.

    Rows of similar length come together, rows of one source stay together where they fit. In a size group the order
    is that of a hash of the source: a shard is a random sample of its size group and of the input's folders.

    Args:
        batches: of `PLAN_SCHEMA`, e.g. `InputScan.batches()`.
        planned: uint64 [P, 2], digests of the ids in earlier generations (`plan_store.planned_digests`).
    """
    spill = tempfile.TemporaryDirectory(prefix="parakeet-plan-")
    facts, codes, sampler = collect_rows(batches, spill.name)
    renamed = make_unique(facts, spill.name)
    fresh = np.ones(len(facts), bool) if planned is None else ~contains(planned, facts.digest)
    rates = measure_rates(sampler, options.storage)
    facts.audio_s = estimate_audio_s(rates, codes, facts.size_bytes, facts.audio_s)
    del codes
    total_s = float(facts.audio_s[fresh].sum(dtype=np.float64))
    limit_s = options.shard_audio_s or float(np.clip(total_s / AUTO_SHARDS, AUTO_MIN_S, AUTO_MAX_S))
    order = order_rows(facts, np.flatnonzero(fresh))
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
        duplicates=len(renamed.rows),
        rates=rates,
        fingerprint=_fingerprint(facts, order, shard_of, limit_s),
        renamed=renamed,
        spill=spill,
    )


def collect_rows(batches: Iterable[pa.RecordBatch], folder: str) -> tuple[RowFacts, np.ndarray, KindSampler]:
    """Spill the rows to `folder/rows.arrow` and keep their numbers, and each row's kind (int16 [N])."""
    sampler = KindSampler()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*RowFacts.__dataclass_fields__, "codes"]}
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(f"{folder}/rows.arrow", "wb") as file,
        pa.ipc.new_stream(file, PLAN_SCHEMA, options=options) as writer,
    ):
        for batch in batches:
            if not len(batch):
                continue
            writer.write_batch(batch)
            digest = digest_strings(batch["id"])
            columns["digest"].append(digest)
            columns["source"].append(_source_hashes(batch["source"]))
            columns["audio_s"].append(_numbers(batch["audio_s"], np.float32, np.nan))
            columns["size_bytes"].append(_numbers(batch["size_bytes"], np.int64, -1))
            columns["items"].append(_numbers(batch["items"], np.int32, -1))
            columns["offset_s"].append(_numbers(batch["offset_s"], np.float32, 0))
            columns["container"].append(_mask(pc.not_equal(batch["layout"], "file")))
            columns["rejected"].append(_mask(pc.is_valid(batch["error_kind"])))
            columns["codes"].append(sampler.add(batch, digest[:, 0]))
    empty = {"digest": np.empty((0, 2), np.uint64), "codes": np.empty(0, np.int16), "container": np.empty(0, bool)}
    arrays = {}
    for name in list(columns):  # one column at a time, so that only one is in memory twice
        chunks = columns.pop(name)
        arrays[name] = np.concatenate(chunks) if chunks else empty.get(name, np.empty(0))
    codes = arrays.pop("codes")
    return RowFacts(**arrays), codes, sampler


def _source_hashes(sources: pa.Array) -> np.ndarray:
    encoded = sources.dictionary_encode()  # the segments of a file name it again and again
    return digest_strings(encoded.dictionary)[:, 0][encoded.indices.to_numpy()]


def _numbers(column: pa.Array, dtype: type, missing: float) -> np.ndarray:
    return pc.fill_null(column, missing).to_numpy(zero_copy_only=False).astype(dtype)


def _mask(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def read_spill(folder: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(index of the first row, batch) of the spilled rows, in input order."""
    first = 0
    with pa.OSFile(f"{folder}/rows.arrow") as file:
        for batch in pa.ipc.open_stream(file):
            yield first, batch
            first += len(batch)


@dataclass
class Renamed:
    """Rows whose id was not the first of its name: row numbers, ascending int64 [R], and their new ids."""

    rows: np.ndarray
    ids: pa.Array

    def apply(self, first: int, ids: pa.Array) -> pa.Array:
        """The ids of the rows from `first` on, with those replaced that have a new one."""
        start, stop = np.searchsorted(self.rows, [first, first + len(ids)])
        if start == stop:
            return ids
        mask = np.zeros(len(ids), bool)
        mask[self.rows[start:stop] - first] = True
        return pc.replace_with_mask(ids, pa.array(mask), self.ids.slice(start, stop - start))


def make_unique(facts: RowFacts, folder: str) -> Renamed:
    """Give every row its own id: the 2nd, 3rd, ... row of one id, in input order, get `~2`, `~3`, ... behind it.

    Should the new id be taken as well, the rule is applied again (`a~2~2`). Updates `facts.digest`.
    """
    renamed = Renamed(np.empty(0, np.int64), pa.array([], pa.string()))
    while True:
        rows, occurrence = repeated_rows(facts.digest)
        if not len(rows):
            return renamed
        ids = pc.binary_join_element_wise(
            _ids_of(rows, renamed, folder), pc.cast(pa.array(occurrence), pa.string()), "~"
        )
        facts.digest[rows] = digest_strings(ids)
        kept = ~np.isin(renamed.rows, rows)
        merged = np.concatenate([renamed.rows[kept], rows])
        order = np.argsort(merged)
        joined = pa.concat_arrays([renamed.ids.filter(pa.array(kept)), ids])
        renamed = Renamed(merged[order], joined.take(pa.array(order)))


def repeated_rows(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, whose digest occurred in an earlier row, and which occurrence each is (2, 3, ...)."""
    order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable: equal digests stay in input order
    sorted_digest = digest[order]
    same = np.zeros(len(order), bool)
    same[1:] = (sorted_digest[1:] == sorted_digest[:-1]).all(axis=1)
    positions = np.flatnonzero(same)
    if not len(positions):
        return positions, positions
    first = np.flatnonzero(~same)
    run_start = first[np.searchsorted(first, positions, side="right") - 1]
    rows = order[positions]
    by_row = np.argsort(rows)
    return rows[by_row], (positions - run_start + 1)[by_row]


def _ids_of(rows: np.ndarray, renamed: Renamed, folder: str) -> pa.Array:
    found = []
    for first, batch in read_spill(folder):
        start, stop = np.searchsorted(rows, [first, first + len(batch)])
        if start < stop:
            found.append(renamed.apply(first, batch["id"]).take(pa.array(rows[start:stop] - first)))
    return pa.concat_arrays(found)


def contains(known: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """For each digest [N, 2] whether it is among `known` [P, 2]. bool [N]."""
    known = known[np.lexsort((known[:, 1], known[:, 0]))]
    position = np.searchsorted(known[:, 0], digest[:, 0])
    found = np.zeros(len(digest), bool)
    candidates = np.arange(len(digest))
    while len(candidates):  # a second round only for two known ids with equal first halves
        candidates = candidates[position[candidates] < len(known)]
        at = position[candidates]
        half = known[at, 0] == digest[candidates, 0]
        full = half & (known[at, 1] == digest[candidates, 1])
        found[candidates[full]] = True
        candidates = candidates[half & ~full]
        position[candidates] += 1
    return found


def order_rows(facts: RowFacts, rows: np.ndarray) -> np.ndarray:
    """`rows` ordered by size group, then source, then offset; int64."""
    sources, of_row = np.unique(facts.source[rows], return_inverse=True)
    seconds = np.bincount(of_row, weights=facts.audio_s[rows], minlength=len(sources))
    items = np.bincount(of_row, weights=np.maximum(facts.items[rows], 1), minlength=len(sources))
    mean_s = np.maximum(seconds / np.maximum(items, 1), 0.01)
    group = np.floor(np.log2(mean_s) * SIZE_STEPS_PER_OCTAVE).astype(np.int8)[of_row]
    del sources, of_row, seconds, items, mean_s
    digest = facts.digest
    keys = (digest[rows, 1], digest[rows, 0], facts.offset_s[rows], facts.source[rows], group)
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
    audio = facts.audio_s[order].astype(np.float64)
    items = np.maximum(facts.items[order], 1).astype(np.int64)
    size = np.maximum(facts.size_bytes[order], 0)
    new_source = np.ones(len(order), bool)
    new_source[1:] = facts.source[order[1:]] != facts.source[order[:-1]]
    unit_start = new_source | facts.container[order]
    starts = np.flatnonzero(unit_start)
    over = (np.add.reduceat(audio, starts) > limit_s) | (np.add.reduceat(items, starts) > options.shard_items)
    lengths = np.diff(np.append(starts, len(order)))
    starts = np.flatnonzero(
        unit_start | np.repeat(over, lengths)
    )  # a source too long for one shard is cut at its segments
    sums = [np.concatenate([[0], np.cumsum(np.add.reduceat(column, starts))]) for column in (audio, items, size)]
    cuts = _greedy_cuts(sums, (limit_s, options.shard_items, options.shard_bytes))
    row_cuts = np.append(starts, len(order))[cuts]
    shard_audio = np.add.reduceat(audio, row_cuts[:-1])
    by_length = np.argsort(-shard_audio, kind="stable")
    number = np.empty(len(by_length), np.int32)
    number[by_length] = np.arange(len(by_length), dtype=np.int32)
    shard_of[order] = np.repeat(number, np.diff(row_cuts))
    return shard_of, shard_audio[by_length]


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
    for start in range(0, len(order), 1 << 20):
        rows = order[start : start + (1 << 20)]
        for column in (facts.digest, facts.source, facts.audio_s, facts.size_bytes, facts.items, shard_of):
            digest.update(np.ascontiguousarray(column[rows]))
    return digest.hexdigest()
