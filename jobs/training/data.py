"""Labelled shards -> prepared audio, decoded once to 16-bit samples at the model's rate; and its reader.

    OUTPUT/data/<split>/audio-<shard>.arrow   the samples of one shard's items that have a text
    OUTPUT/data/<split>/index.parquet         written last; one row per item of the split: its audio, or what is wrong

An hour takes 115 MB. Workers map the files of a local output into memory, and fetch those of an object store once per
node.
"""

import hashlib
import io
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.models import cache_folder
from jobs.reading.isolation import ShardDecoder
from jobs.reading.items import ReadItem, SourceFile
from jobs.storage.files import Storage
from jobs.storage.local_files import write_local
from jobs.training.labels import Rejection
from jobs.training.sources import LabelledShard
from parakeet_core.errors import InputError

INDEX_FILE = "index.parquet"
FULL_SCALE = 32768.0  # of 16-bit samples
INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("text", pa.string()),
        pa.field("samples", pa.int64()),  # 0 if the item was not decoded
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),  # number in the file
        pa.field("rejection", pa.string()),  # a `labels.Rejection`; null if the item can be used
        pa.field("message", pa.string()),
    ]
)
AUDIO_SCHEMA = pa.schema([pa.field("audio", pa.large_binary())])  # int16, little-endian


def read_index(folder: Storage) -> pa.Table | None:
    """The index of a split (`INDEX_SCHEMA`); None if the split is not prepared yet."""
    if not folder.exists(INDEX_FILE):
        return None
    return pq.read_table(io.BytesIO(folder.read_bytes(INDEX_FILE)), schema=INDEX_SCHEMA)


def prepare_split(
    shards: Sequence[LabelledShard], folder: Storage, sample_rate_hz: int, max_audio_s: float
) -> pa.Table:
    """Decode a split on all CPUs of the cluster, and return its index.

    Rows are in the order of the shards and of the items in them, whatever order they were decoded in.

    Args:
        folder: OUTPUT/data/<split>.
        max_audio_s: longer items are not kept.

    Raises:
        ray.exceptions.RayError: a task failed for good.
    """
    import ray  # the rest of this module works without Ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    prepare = ray.remote(num_cpus=1, max_retries=0)(prepare_shard)
    first_try = [prepare.remote(shard, folder, sample_rate_hz, max_audio_s) for shard in shards]
    tables = []
    for shard, table in zip(shards, first_try, strict=True):
        try:
            tables.append(ray.get(table))
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError):  # the next try survives items that crash it
            again = prepare.options(max_retries=3).remote(shard, folder, sample_rate_hz, max_audio_s, careful=True)
            tables.append(ray.get(again))
    return write_index(folder, tables)


def write_index(folder: Storage, tables: Sequence[pa.Table]) -> pa.Table:
    """Join the indices of the shards to the index of the split, and write it, after all other files."""
    index = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
    sink = io.BytesIO()
    pq.write_table(index, sink, compression="zstd")
    folder.write_atomic(INDEX_FILE, sink.getvalue())
    return index


def prepare_shard(
    shard: LabelledShard, folder: Storage, sample_rate_hz: int, max_audio_s: float, careful: bool = False
) -> pa.Table:
    """Write the audio file of one shard and return its part of the index.

    Args:
        careful: decode in a separate process, so that an item which crashes it costs only its own row.
    """
    decoder = ShardDecoder(careful_shards=1 if careful else 0)
    with decoder.shard():
        rows, audio = _decoded_rows(shard, decoder, sample_rate_hz, max_audio_s)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, AUDIO_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(audio, pa.large_binary())], schema=AUDIO_SCHEMA))
    folder.write_atomic(_file_name(shard), sink.getvalue().to_pybytes())
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def _file_name(shard: LabelledShard) -> str:
    return f"audio-{shard.name}.arrow"


def _decoded_rows(
    shard: LabelledShard, decoder: ShardDecoder, sample_rate_hz: int, max_audio_s: float
) -> tuple[list[dict], list[bytes]]:
    """(rows of the index, samples of the items that are kept)."""
    rows, audio = [], []
    for item, text, doubtful in shard.items():
        row = {"id": item.id, "text": text, "samples": 0, "file": _file_name(shard), "row": len(audio)}
        rows.append(row)
        if not (text or "").strip():
            row["rejection"] = Rejection.LOW_CONFIDENCE if doubtful else Rejection.NO_TEXT
            continue
        try:
            samples = decode_samples(item, decoder, sample_rate_hz)
        except InputError as error:
            row |= {"rejection": Rejection.UNREADABLE, "message": f"{error.kind}: {error.message}"}
            continue
        row["samples"] = len(samples)
        if len(samples) > max_audio_s * sample_rate_hz:
            row["rejection"] = Rejection.TOO_LONG
            continue
        audio.append(samples.tobytes())
    return rows, audio


def decode_samples(item: ReadItem, decoder: ShardDecoder, sample_rate_hz: int) -> np.ndarray:
    """Samples [S] int16 of an item. Raises InputError."""
    if isinstance(item.payload, InputError):
        raise item.payload
    channel = "mix" if item.channel is None else item.channel
    try:
        audio = decoder.load(item.payload, sample_rate_hz, item.offset_s or 0.0, item.duration_s, channel)
    finally:
        if isinstance(item.payload, SourceFile):
            item.payload.close()
            item.payload.raise_error()  # a storage failure that looked like the end of the file to the decoder
    return np.clip(np.rint(audio.waveform * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype("<i2")


class PreparedAudio:
    """Random access to the waveforms of one split, from several threads.

    Args:
        folder: OUTPUT/data/<split>.
    """

    def __init__(self, folder: Storage):
        self.folder = folder
        self._files: dict[str, pa.Table] = {}
        self._lock = threading.Lock()

    def waveform(self, file: str, row: int) -> np.ndarray:
        """[S] float32, full scale 1.0."""
        with self._lock:
            if file not in self._files:
                self._files[file] = pa.ipc.open_file(pa.memory_map(str(self._local(file)))).read_all()
        samples = np.frombuffer(self._files[file]["audio"][row].as_buffer(), dtype="<i2")
        return samples.astype(np.float32) / np.float32(FULL_SCALE)

    def _local(self, file: str) -> Path:
        if self.folder.is_local:
            return Path(self.folder.path(file))
        # What the store reports about a file (size, time, digest) tells it from a later file of the same name.
        found = self.folder.call(file, self.folder.fs.info, self.folder.path(file))
        told = [str(found.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "updated")]
        version = hashlib.sha256(" ".join(told).encode()).hexdigest()[:12]
        path = cache_folder() / "training" / self.folder.root / f"{version}-{file}"
        if not path.exists():
            with self.folder.open(file) as source:
                write_local(str(path), source, False, str(path.parent / ".tmp"))
        return path
