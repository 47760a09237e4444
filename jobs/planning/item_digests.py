"""Which items a plan holds: their ids as 128-bit digests, in files beside the plan.

    plan/plan-0000-1f2e3d4c-items-00000.parquet
        id: digest of an item's id; given: digest of what the input calls it, null where that is the id

A run over an existing output asks which items of the input are new. For 100,000 shards the rows of the plan lie in 400
files, each costing several requests; of the digest files there is one per million items.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.inputs.plan_rows import PLACE_COLUMNS, digest_places, digest_strings
from jobs.planning.generations import FOLDER, Generation
from jobs.planning.planned_items import NO_DIGESTS, PlannedItems, contains
from jobs.planning.shards import Plan
from jobs.storage.files import Storage

ITEMS_PER_FILE = 1 << 20  # 16 MiB: one put and one get
READ_THREADS = 8  # files read at a time: each is a few requests of 20-100 ms on an object store
DIGEST = pa.binary(16)
ITEMS_SCHEMA = pa.schema([pa.field("id", DIGEST, nullable=False), pa.field("given", DIGEST)])


def item_files(plan: Plan) -> Iterator[bytes]:
    """The content of each digest file of a plan's generation; it does not depend on the order of the input."""
    digest = plan.facts.digest
    named_as_given = plan.shard_of >= 0
    named_as_given[plan.renamed.rows] = False
    files = -(-int(plan.shard_rows.sum()) // ITEMS_PER_FILE)
    new_ids = digest[plan.renamed.rows]
    for number in range(files):
        rows = np.flatnonzero(named_as_given & (_file_of(digest, files) == number))
        others = np.flatnonzero(_file_of(new_ids, files) == number)
        ids = np.concatenate([digest[rows], new_ids[others]])
        given = np.concatenate([digest[rows], plan.renamed.given[others]])
        order = np.lexsort((ids[:, 1], ids[:, 0]))
        same = pa.array(order < len(rows))
        columns = [_to_arrow(ids[order]), pc.if_else(same, pa.scalar(None, DIGEST), _to_arrow(given[order]))]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
        yield sink.getvalue().to_pybytes()


def _file_of(digests: np.ndarray, files: int) -> np.ndarray:
    """Which of `files` files holds each digest: equal ranges of the first half."""
    return np.minimum(digests[:, 0] // np.uint64((2**64 - 1) // files), files - 1)


def planned_items(storage: Storage, generations: Sequence[Generation]) -> PlannedItems:
    """What the generations hold; 16 bytes per item in memory."""
    if not generations:
        return PlannedItems()
    names = [name for generation in generations for name in generation.items_files]
    return PlannedItems(*_gather(names, partial(_read_digests, storage)), partial(_places, storage, generations))


def _read_digests(storage: Storage, name: str) -> tuple[np.ndarray, ...]:
    """Digests: (ids that are as the input gave them, what it gave for the other items, ids of those)."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(f"{FOLDER}/{name}")), schema=ITEMS_SCHEMA)
    renamed = pc.is_valid(table["given"])
    others = table.filter(renamed)
    return tuple(map(_to_numpy, (table["id"].filter(pc.invert(renamed)), others["given"], others["id"])))


def _places(storage: Storage, generations: Sequence[Generation], digests: np.ndarray) -> tuple[np.ndarray, ...]:
    """Digests of (the given id, where the audio lies) for each item whose given id is one of `digests`."""

    def read(name: str) -> tuple[np.ndarray, ...]:
        found = [(NO_DIGESTS, np.empty(0, np.uint64))]
        with storage.open(f"{FOLDER}/{name}") as file:
            for batch in pq.ParquetFile(file).iter_batches(1 << 16, columns=["given_id", "id", *PLACE_COLUMNS]):
                digest = digest_strings(pc.coalesce(batch["given_id"], batch["id"]))
                chosen = contains(digests, digest)
                found.append((digest[chosen], digest_places(batch.filter(pa.array(chosen)))))
        return tuple(map(np.concatenate, zip(*found, strict=True)))

    return _gather([name for generation in generations for name in generation.files], read)


def _gather(names: list[str], read: Callable[[str], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """The arrays of every file, in order, joined."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return tuple(map(np.concatenate, zip(*pool.map(read, names), strict=True)))


def _to_arrow(digests: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        DIGEST, len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests))]
    )


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, 2] of a column without nulls."""
    if not len(column):
        return NO_DIGESTS
    array = column.combine_chunks()
    return np.frombuffer(array.buffers()[1], "<u8", 2 * len(array), 16 * array.offset).reshape(-1, 2)


__all__ = ["item_files", "planned_items"]
