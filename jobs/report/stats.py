"""What the report says about the rows of a table: one pass over its parts, in bounded memory. Knows nothing of HTML.

The `words` column, most of a part's bytes, is never read.
"""

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.report.histogram import Histogram
from jobs.report.markup import clip
from jobs.storage.connections import storage_errors
from jobs.storage.files import Storage
from jobs.table.parts import TABLE_FOLDER
from parakeet_core.errors import InputError

MAX_PARTS = 200  # read for one report: the shapes of the histograms settle with far fewer
READ_THREADS = 8  # on an object store a part costs a few requests of 20-100 ms; each thread holds one row group
BATCH_ROWS = 1024  # texts of three-hour items, 150 kB each, stay below 150 MB
LEAST_CONFIDENT = 20
MOST_EXTREME = 10  # at either end of the speech rates
TEXT_SHOWN = 400  # characters of a text or message that are kept
INTERVALS = 48  # of the throughput chart, at most

COLUMNS = ("id", "status", "duration_s", "text", "confidence", "chars_per_s", "error_kind", "error_message")

# Steps of 0.1 s for utterances, 1 s up to ten minutes, 10 s up to ten hours.
DURATION_EDGES = np.concatenate((np.arange(600) / 10, np.arange(60.0, 600.0), np.arange(600.0, 36_001.0, 10.0)))
CONFIDENCE_EDGES = np.arange(201) / 200
RATE_EDGES = np.arange(401) / 4  # characters per second; English is read at 10-20


@dataclass(frozen=True)
class Row:
    """A row of the table as far as the report shows it; `text` is clipped."""

    id: str
    text: str
    duration_s: float | None
    confidence: float | None
    chars_per_s: float | None


@dataclass(frozen=True)
class ErrorExample:
    """One error row of a kind; `message` is clipped."""

    id: str
    message: str


@dataclass
class TableStats:
    """Sums over rows. `merge` keeps the order of the parts, so that equal values give the same report every time.

    Attributes:
        parts: of the table.
        parts_read: fewer than `parts` where the table is sampled or parts are unreadable.
        rows: read.
        durations: seconds, of `ok` and `empty` rows; of error rows the input may claim anything.
        confidences, rates: of `ok` rows; rates in characters per second.
        examples: error_kind -> the first row of that kind.
        unreadable: (part, reason).
    """

    parts: int = 0
    parts_read: int = 0
    rows: int = 0
    durations: Histogram = field(default_factory=lambda: Histogram(DURATION_EDGES))
    confidences: Histogram = field(default_factory=lambda: Histogram(CONFIDENCE_EDGES))
    rates: Histogram = field(default_factory=lambda: Histogram(RATE_EDGES))
    least_confident: list[Row] = field(default_factory=list)
    slowest: list[Row] = field(default_factory=list)
    fastest: list[Row] = field(default_factory=list)
    examples: dict[str, ErrorExample] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def sampled(self) -> bool:
        return self.parts > MAX_PARTS

    def add(self, batch: pa.RecordBatch) -> None:
        """Count the rows of a batch with `COLUMNS`."""
        self.rows += batch.num_rows
        failed = pc.equal(batch["status"], "error")
        ok = batch.filter(pc.equal(batch["status"], "ok"))
        self.durations.add(numbers(batch.filter(pc.invert(failed))["duration_s"]))
        self.confidences.add(numbers(ok["confidence"]))
        self.rates.add(numbers(ok["chars_per_s"]))
        self._keep(
            extreme_rows(ok, "confidence", LEAST_CONFIDENT),
            extreme_rows(ok, "chars_per_s", MOST_EXTREME),
            extreme_rows(ok, "chars_per_s", MOST_EXTREME, largest=True),
        )
        self._keep_examples(first_errors(batch.filter(failed)))

    def merge(self, other: "TableStats") -> None:
        """Add the sums of later parts; `parts` stays."""
        self.parts_read += other.parts_read
        self.rows += other.rows
        for name in ("durations", "confidences", "rates"):
            getattr(self, name).merge(getattr(other, name))
        self._keep(other.least_confident, other.slowest, other.fastest)
        self._keep_examples(other.examples)
        self.unreadable += other.unreadable

    def _keep(self, least_confident: list[Row], slowest: list[Row], fastest: list[Row]) -> None:
        self.least_confident = heapq.nsmallest(
            LEAST_CONFIDENT, self.least_confident + least_confident, key=lambda row: row.confidence
        )
        self.slowest = heapq.nsmallest(MOST_EXTREME, self.slowest + slowest, key=lambda row: row.chars_per_s)
        self.fastest = heapq.nlargest(MOST_EXTREME, self.fastest + fastest, key=lambda row: row.chars_per_s)

    def _keep_examples(self, examples: dict[str, ErrorExample]) -> None:
        self.examples = examples | self.examples


def gather_stats(output: Storage) -> TableStats:
    """Read the parts under OUTPUT/transcripts/, evenly spaced ones where there are more than MAX_PARTS.

    A part that cannot be read is named in `unreadable`; the others are counted all the same.

    Raises:
        InputError: the folder cannot be listed.
    """
    names = [name for name in output.list_names(TABLE_FOLDER) if name.endswith(".parquet")]
    stats = TableStats(parts=len(names))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for part in pool.map(lambda name: read_part(output, name), evenly_spaced(names, MAX_PARTS)):
            stats.merge(part)
    return stats


def read_part(output: Storage, name: str) -> TableStats:
    """The sums of one part, or its name in `unreadable`."""
    stats, path = TableStats(), f"{TABLE_FOLDER}/{name}"
    try:
        with storage_errors(output.source(path), output.options), output.open(path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            missing = set(COLUMNS) - set(parquet.schema_arrow.names)
            if missing:
                return TableStats(unreadable=[(name, f"it has no column {', '.join(sorted(missing))}")])
            for group in range(parquet.num_row_groups):  # one at a time: prefetched data is kept until the end
                for batch in parquet.iter_batches(BATCH_ROWS, [group], list(COLUMNS), use_threads=False):
                    stats.add(batch)
    except InputError as error:
        return TableStats(unreadable=[(name, clip(error.message, TEXT_SHOWN))])
    except pa.ArrowException as error:
        return TableStats(unreadable=[(name, clip(f"not a whole Parquet file ({error})", TEXT_SHOWN))])
    stats.parts_read = 1
    return stats


def evenly_spaced(names: list[str], limit: int) -> list[str]:
    """At most `limit` names, from the middles of equal stretches."""
    if len(names) <= limit:
        return names
    return [names[(2 * n + 1) * len(names) // (2 * limit)] for n in range(limit)]


def numbers(column: pa.Array) -> np.ndarray:
    """float64 [rows], NaN for null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def extreme_rows(batch: pa.RecordBatch, column: str, count: int, largest: bool = False) -> list[Row]:
    """The rows with the smallest or largest finite values of a column, the most extreme first."""
    values = numbers(batch[column])
    order = np.argsort(-values if largest else values, kind="stable")
    order = order[np.isfinite(values[order])][:count]
    return [
        Row(row["id"], clip(row["text"] or "", TEXT_SHOWN), row["duration_s"], row["confidence"], row["chars_per_s"])
        for row in batch.select(["id", "text", "duration_s", "confidence", "chars_per_s"]).take(order).to_pylist()
    ]


def first_errors(batch: pa.RecordBatch) -> dict[str, ErrorExample]:
    """error_kind -> the first of the error rows of that kind."""
    examples = {}
    for kind in pc.unique(batch["error_kind"].drop_null()).to_pylist():
        found = pc.index(batch["error_kind"], kind).as_py()
        message = batch["error_message"][found].as_py() or ""
        examples[kind] = ErrorExample(batch["id"][found].as_py(), clip(message, TEXT_SHOWN))
    return examples


def committed_over_time(throughput: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Equal intervals of a run, at most INTERVALS and no more than there are commits.

    Args:
        throughput: (seconds since start, seconds of audio committed so far), ascending. The audio of a commit is
            spread over the time since the one before.

    Returns:
        Borders of the intervals in seconds, float64 [n + 1], and the audio seconds committed at each. Empty without
        commits.
    """
    points = [(0.0, 0.0), *throughput]
    seconds, audio_s = np.array(points, np.float64).T
    commits = int(np.count_nonzero(np.diff(seconds) > 0))
    if not commits or not audio_s[-1]:
        return np.empty(0), np.empty(0)
    borders = np.linspace(0.0, seconds[-1], min(commits, INTERVALS) + 1)
    return borders, np.interp(borders, seconds, audio_s)
