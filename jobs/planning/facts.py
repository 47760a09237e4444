"""Plan rows, split: their strings on local disk, their numbers in memory (44 bytes per row).

Knows nothing of shards or of storage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.inputs.plan_rows import PLAN_SCHEMA, digest_strings
from jobs.planning.planned_items import PlannedItems
from jobs.planning.sizing import KindSampler

SPILL_FILE = "rows.arrow"


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


def collect_rows(
    batches: Iterable[pa.RecordBatch], folder: str, planned: PlannedItems
) -> tuple[RowFacts, np.ndarray, KindSampler]:
    """Spill the rows to `SPILL_FILE` in `folder`; return their numbers, each row's kind (int16 [N]) and the sampler.

    Only rows that are not `planned` are sampled: what has been planned is not opened again.
    """
    sampler = KindSampler()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*RowFacts.__dataclass_fields__, "codes"]}
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(f"{folder}/{SPILL_FILE}", "wb") as file,
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
            columns["codes"].append(sampler.add(batch, digest[:, 0], ~planned.holds(digest)))
    empty = {"digest": np.empty((0, 2), np.uint64), "codes": np.empty(0, np.int16)}
    empty |= {"container": np.empty(0, bool), "rejected": np.empty(0, bool)}
    arrays = {}
    for name in list(columns):  # one column at a time, so that only one is in memory twice
        chunks = columns.pop(name)
        arrays[name] = np.concatenate(chunks) if chunks else empty.get(name, np.empty(0))
    codes = arrays.pop("codes")
    return RowFacts(**arrays), codes, sampler


def _source_hashes(sources: pa.Array) -> np.ndarray:
    encoded = sources.dictionary_encode()  # segments of one file repeat its name
    return digest_strings(encoded.dictionary)[:, 0][encoded.indices.to_numpy()]


def _numbers(column: pa.Array, dtype: type, missing: float) -> np.ndarray:
    return pc.fill_null(column, missing).to_numpy(zero_copy_only=False).astype(dtype)


def _mask(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def read_spill(folder: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(index of the first row, batch) of the spilled rows, in input order."""
    first = 0
    with pa.OSFile(f"{folder}/{SPILL_FILE}") as file:
        for batch in pa.ipc.open_stream(file):
            yield first, batch
            first += len(batch)
