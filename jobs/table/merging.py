"""Small parts of the table -> one large file of the same rows, ordered by id, in bounded memory.

Each part is sorted on its own and kept on local disk; then one row group after another is gathered from all of them.
Memory holds the ids, one row group and one part. Knows nothing of which files are merged or where the result goes.
"""

import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.storage.connections import storage_errors
from jobs.storage.files import Storage
from jobs.table.schema import TRANSCRIPT_SCHEMA
from parakeet_core.errors import ErrorKind, InputError

ROW_GROUP_ROWS = 122_880  # DuckDB's own size; each of its threads, and of Spark's, takes one row group
ROW_GROUP_BYTES = 128 << 20  # in memory; so fewer rows if items are long


def merge_parts(output: Storage, names: Sequence[str], metadata: dict[bytes, bytes], target: Path) -> int:
    """Write the rows of the parts `names` to the local file `target`; returns how many.

    The same parts give the same bytes. Rows that share an id, which a table does not have, would all be kept.
    """
    with tempfile.TemporaryDirectory(prefix="parakeet-merge-", dir=target.parent) as folder:
        runs = [_sorted_run(output, name, Path(folder, f"{number}.arrow")) for number, name in enumerate(names)]
        rows = sum(run.num_rows for run in runs)
        group_rows = _group_rows(rows, sum(run.nbytes for run in runs))
        schema = TRANSCRIPT_SCHEMA.with_metadata(metadata)
        with pq.ParquetWriter(target, schema, compression="zstd", write_page_index=True) as writer:
            for group in _merged(runs, group_rows):
                writer.write_table(group, row_group_size=max(group.num_rows, 1))
        return rows


def _sorted_run(output: Storage, name: str, path: Path) -> pa.Table:
    """The rows of a part, ordered by id, as a table memory-mapped from disk."""
    try:
        with storage_errors(output.source(name), output.options), output.open(name) as file:
            table = pq.read_table(file, schema=TRANSCRIPT_SCHEMA)
    except pa.ArrowException as error:
        raise InputError(ErrorKind.STORAGE, f"{output.source(name)}: not a whole Parquet file ({error})") from error
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TRANSCRIPT_SCHEMA) as writer:
        writer.write_table(table.sort_by("id").replace_schema_metadata(None))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _group_rows(rows: int, size_bytes: int) -> int:
    by_size = int(ROW_GROUP_BYTES * rows / size_bytes) if size_bytes else ROW_GROUP_ROWS
    return max(1, min(ROW_GROUP_ROWS, by_size))


def _merged(runs: list[pa.Table], group_rows: int) -> Iterator[pa.Table]:
    """Tables of about `group_rows` rows, each ordered by id, all its ids before those of the next."""
    ids = pa.chunked_array([chunk for run in runs for chunk in run["id"].chunks], pa.string())
    order = pc.sort_indices(ids)
    borders = ids.take(order[group_rows::group_rows]).to_pylist()
    del ids, order
    starts = [0] * len(runs)
    for border in [*borders, None]:
        ends = [run.num_rows if border is None else _rows_before(run["id"], border) for run in runs]
        pieces = [run.slice(start, end - start) for run, start, end in zip(runs, starts, ends, strict=True)]
        starts = ends
        yield pa.concat_tables(pieces).sort_by("id")


def _rows_before(ids: pa.ChunkedArray, border: str) -> int:
    """How many of the ascending ids are before `border`, in the order of Arrow, which is that of UTF-8 bytes."""
    return bisect_left(range(len(ids)), border.encode(), key=lambda row: ids[row].as_py().encode())
