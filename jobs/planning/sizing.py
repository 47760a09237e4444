"""Seconds of audio for rows that have only a size: a rate per extension, measured on the headers of a small sample.

Knows nothing of shards. The sample is a function of the ids alone, so the same input gives the same estimates.
"""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.reading.containers import read_container
from jobs.sources.reader import SourceReader
from jobs.storage.connections import StorageOptions
from parakeet_core.audio_isolated import IsolatedDecoder
from parakeet_core.errors import InputError

SAMPLE_PER_KIND = 32  # speech files of one collection differ little: 32 give the mean length within about 15 %
SAMPLED_CONTAINERS = 4  # fewer, because several items of each are probed
PROBE_THREADS = 8
PROBE_ITEMS = 16  # of one container
PROBE_BYTES = 16 << 20  # of one container
MAX_PROBE_BYTES = 64 << 20  # some containers (VBR mp3) have to be read to the end to know their length
NOMINAL_CONTAINER_BYTES_PER_S = 16_000.0  # FLAC of 16 kHz speech, between WAV (32,000) and mp3 (4,000-8,000)
NOMINAL_ITEM_S = 10.0  # an item of unknown size; the mean of LibriSpeech and Common Voice lies between 5 and 12 s
NOMINAL_BYTES_PER_S = {  # of speech as usually stored, when no header of the kind can be read
    "wav": 32_000.0,  # 16 kHz, mono, 16 bit
    "flac": 17_000.0,  # FLAC halves it
    "mp3": 8_000.0,  # 64 kbit/s
    "ogg": 6_000.0,  # Vorbis or Opus, 48 kbit/s
    "opus": 4_000.0,  # 32 kbit/s
    "m4a": 12_000.0,  # AAC, 96 kbit/s
}
DEFAULT_BYTES_PER_S = 16_000.0


@dataclass(frozen=True)
class Sample:
    """One file or container whose headers are read to calibrate its kind."""

    digest: int
    layout: str
    source: str
    row_group: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class Rate:
    """How seconds follow from bytes for one kind of row.

    Args:
        kind: extension, `tar`, `parquet`, or `unsized` for manifest entries with neither duration nor size.
        bytes_per_s: 0 for `unsized`.
        item_s: seconds of one item; used where there is no size.
        measured: how many samples the rate comes from; 0 means nominal.
    """

    kind: str
    bytes_per_s: float
    item_s: float
    measured: int


class KindSampler:
    """Sorts rows without `audio_s` into kinds and keeps, per kind, the rows with the smallest id digests.

    The smallest digests are a uniform sample that does not depend on the order of the listing.
    """

    def __init__(self):
        self.kinds: list[str] = []
        self.samples: list[list[Sample]] = []

    def add(self, batch: pa.RecordBatch, digests: np.ndarray, sampled: np.ndarray) -> np.ndarray:
        """Index into `kinds` of each row of a `PLAN_SCHEMA` batch; -1 where `audio_s` is known. int16 [N].

        Args:
            digests: uint64 [N], of the ids.
            sampled: bool [N], rows whose headers may be read.
        """
        codes = np.full(len(batch), -1, np.int16)
        unknown = pc.is_null(batch["audio_s"]).to_numpy(zero_copy_only=False)
        if not unknown.any():
            return codes
        names = kinds_of(batch)
        encoded = names.dictionary_encode()
        local = encoded.indices.to_numpy(zero_copy_only=False)
        for index, kind in enumerate(encoded.dictionary.to_pylist()):
            rows = np.flatnonzero(unknown & (local == index))
            if len(rows):
                codes[rows] = code = self._code(kind)
                if sampled[rows].any():
                    self._keep(code, batch, rows[sampled[rows]], digests)
        return codes

    def _code(self, kind: str) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
            self.samples.append([])
        return self.kinds.index(kind)

    def _keep(self, code: int, batch: pa.RecordBatch, rows: np.ndarray, digests: np.ndarray) -> None:
        smallest = rows[np.argsort(digests[rows], kind="stable")[:SAMPLE_PER_KIND]]
        columns = ["layout", "source", "row_group", "size_bytes"]
        found = pa.Table.from_batches([batch.select(columns)]).take(pa.array(smallest)).to_pylist()
        fresh = [Sample(int(digest), **row) for digest, row in zip(digests[smallest], found, strict=True)]
        merged = sorted(self.samples[code] + fresh, key=lambda sample: (sample.digest, sample.source))
        self.samples[code] = merged[:SAMPLE_PER_KIND]


def kinds_of(batch: pa.RecordBatch) -> pa.Array:
    """The kind of each row of a `PLAN_SCHEMA` batch, a string array."""
    extension = pc.struct_field(pc.extract_regex(pc.utf8_lower(batch["source"]), r"\.(?P<x>[a-z0-9]{1,5})$"), "x")
    is_file = pc.equal(batch["layout"], "file")
    sized = pc.is_valid(batch["size_bytes"])
    file_kind = pc.if_else(sized, pc.fill_null(extension, "other"), "unsized")
    return pc.if_else(is_file, file_kind, batch["layout"])


def measure_rates(sampler: KindSampler, options: StorageOptions) -> list[Rate]:
    """The rate of each kind, in the order of `sampler.kinds`, from the headers of its samples.

    Headers are read in a separate process, because one that crashes its decoder must not end the planning.
    """
    reader = SourceReader(options)
    if not sampler.kinds:
        return []
    with ThreadPoolExecutor(PROBE_THREADS) as pool, IsolatedDecoder() as decoder:
        rates = []
        for kind, samples in zip(sampler.kinds, sampler.samples, strict=True):
            chosen = samples[:SAMPLED_CONTAINERS] if kind in ("tar", "parquet") else samples
            found = pool.map(lambda sample: _measure(reader, decoder, sample), chosen)
            measured = [facts for facts in found if facts]
            rates.append(_rate(kind, measured))
    return rates


def _measure(reader: SourceReader, decoder: IsolatedDecoder, sample: Sample) -> tuple[float, float, int] | None:
    """(bytes, seconds, items) of one sample; None if its headers give no length or cannot be read."""
    try:
        if sample.layout != "file":
            return _probe_container(reader, decoder, sample)
        if (sample.size_bytes or 0) > MAX_PROBE_BYTES and not sample.source.lower().endswith((".wav", ".flac")):
            return None
        with reader.open(sample.source) as file:
            file.read(1)  # fetches the first block, for most files the only one, while the decoder is busy
            seconds = decoder.probe(file).duration_s
        # ADTS, and FLAC that was written to a pipe, do not say how long they are.
        return None if seconds is None else (float(sample.size_bytes or 0), seconds, 1)
    except InputError:
        return None


def _probe_container(reader: SourceReader, decoder: IsolatedDecoder, sample: Sample) -> tuple[float, float, int] | None:
    """(bytes, seconds, items) of the first items of a container; None if none can be probed."""
    row = {"id": "probe#0", "layout": sample.layout, "source": sample.source}
    row |= {"row_group": sample.row_group, "items": PROBE_ITEMS}
    size, seconds, items = 0.0, 0.0, 0
    for item in islice(read_container(row, reader), PROBE_ITEMS):
        if not isinstance(item.payload, bytes):
            continue
        try:
            duration_s = decoder.probe(item.payload).duration_s
        except InputError:
            continue  # it becomes an error row when it is read; here only its length is missing
        if duration_s is None:
            continue
        seconds += duration_s
        size += len(item.payload) + (tarfile.BLOCKSIZE if sample.layout == "tar" else 0)
        items += 1
        if size > PROBE_BYTES:
            break
    return (size, seconds, items) if items else None


def _rate(kind: str, measured: list[tuple[float, float, int]]) -> Rate:
    size, seconds, items = (sum(column) for column in zip(*measured, strict=True)) if measured else (0.0, 0.0, 0)
    nominal = {"tar": NOMINAL_CONTAINER_BYTES_PER_S, "parquet": NOMINAL_CONTAINER_BYTES_PER_S, "unsized": 0.0}
    if seconds <= 0:
        return Rate(kind, nominal.get(kind, NOMINAL_BYTES_PER_S.get(kind, DEFAULT_BYTES_PER_S)), NOMINAL_ITEM_S, 0)
    return Rate(kind, size / seconds, seconds / items, len(measured))


def estimate_audio_s(rates: list[Rate], codes: np.ndarray, size_bytes: np.ndarray, known_s: np.ndarray) -> np.ndarray:
    """Seconds per row: the known ones, else from size and rate, else those of the mean item.

    Args:
        codes: int16 [N], from `KindSampler.add`; -1 where known.
        size_bytes: int64 [N], -1 where unknown.
        known_s: float32 [N], NaN where unknown.
    """
    if not rates:
        return known_s
    bytes_per_s = np.array([rate.bytes_per_s for rate in rates] + [1.0])  # the last stands for code -1
    item_s = np.array([rate.item_s for rate in rates] + [0.0])
    sized = (size_bytes >= 0) & (bytes_per_s[codes] > 0)
    estimate = np.where(sized, size_bytes / np.maximum(bytes_per_s[codes], 1e-9), item_s[codes])
    return np.where(codes < 0, known_s, estimate).astype(np.float32)
