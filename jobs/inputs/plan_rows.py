"""The rows of a plan: one per item, or one per container (a tar, a Parquet row group) that is expanded when it is read.

Knows nothing of storage, of layouts or of how rows become shards.
"""

import hashlib

import numpy as np
import pyarrow as pa

PLAN_SCHEMA = pa.schema(
    [
        pa.field(
            "id", pa.string(), nullable=False
        ),  # of the item; of a container: the tar's name, or the id of the row group's first item
        pa.field("source", pa.string(), nullable=False),  # URL or absolute path of the object to open
        pa.field("layout", pa.string(), nullable=False),  # "file", "tar" or "parquet"
        pa.field("member", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("offset_s", pa.float64()),
        pa.field("duration_s", pa.float64()),
        pa.field("channel", pa.int32()),
        pa.field("size_bytes", pa.int64()),
        pa.field("audio_s", pa.float64()),  # known or estimated; null in a scan if planning has to estimate it
        pa.field("items", pa.int64()),  # null for a tar: known only when it is read
        pa.field("reference", pa.string()),
        pa.field("extra", pa.string()),  # the manifest's other keys, JSON
        pa.field("error_kind", pa.string()),  # set on rows rejected while planning; they become error rows of the table
        pa.field("error_message", pa.string()),
        pa.field("given_id", pa.string()),  # what the input calls an item whose `id` had to be made unique
    ]
)
PLACE_COLUMNS = ["source", "member", "row_group", "offset_s", "duration_s", "channel"]  # where an item's audio lies


def plan_batch(layout: str, columns: dict) -> pa.RecordBatch:
    """A batch of `PLAN_SCHEMA` from the given columns; the others are null.

    Args:
        columns: name -> list or array; `id` and `source` at least, all of one length.
    """
    length = len(columns["id"])
    arrays = []
    for column in PLAN_SCHEMA:
        if column.name == "layout":
            arrays.append(pa.repeat(pa.scalar(layout), length))
        elif column.name in columns:
            values = columns[column.name]
            arrays.append(values if isinstance(values, pa.Array) else pa.array(values, column.type))
        else:
            arrays.append(pa.nulls(length, column.type))
    return pa.RecordBatch.from_arrays(arrays, schema=PLAN_SCHEMA)


def digest_places(batch: pa.RecordBatch) -> np.ndarray:
    """What distinguishes rows with the same id: a digest of where their audio lies. uint64 [N]."""
    columns = batch.select(PLACE_COLUMNS).to_pydict()
    return digest_strings(pa.array([repr(place) for place in zip(*columns.values(), strict=True)], pa.string()))[:, 0]


def digest_strings(strings: pa.Array) -> np.ndarray:
    """Two 64-bit halves of a 128-bit BLAKE2b digest of each string, the same on every machine.

    With 128 bits, equal digests mean equal strings: the chance of one false match among 1e9 ids is 1e-21, so ids need
    not be kept or read again to compare them, and a hostile input cannot construct a collision. About 1 us per string.

    Returns:
        uint64 [N, 2].
    """
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(text.encode(), digest_size=16).digest() for text in strings.to_pylist()])
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)
