"""Plans on storage: immutable generations under `plan/`, committed by their small JSON file, which is written last.

    plan/plan-0000-1f2e3d4c-00000.parquet        rows of 256 shards, one row group per shard
    plan/plan-0000-1f2e3d4c-items-00000.parquet  digests of the items' ids (jobs.planning.item_digests)
    plan/plan-0000-1f2e3d4c-shards.parquet       one row per shard: what the driver reads
    plan/plan-0000.json                          the commit point: counts, fingerprint, names of the files above

The names hold the plan's fingerprint, and so do the names of its shards and of their parts, so two drivers that plan at
the same time cannot mix their files; the JSON file decides.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.inputs.plan_rows import PLAN_SCHEMA
from jobs.planning.facts import SPILL_FILE, read_spill
from jobs.planning.generations import FOLDER, PLAN_FORMAT, RACE, Generation, generation_name, read_generation
from jobs.planning.item_digests import item_files
from jobs.planning.shards import Plan
from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError, ErrorKind, InputError

SHARDS_PER_FILE = 256  # a worker reads the footer of its plan file: about 200 KB at 256 row groups of 15 columns
BUCKET_ROWS = 400_000  # rows sorted in memory at once while plan files are written, about 100 MB
BUCKET_BYTES = 128 << 20  # of the spill, which is compressed to a half or third; fewer rows if their texts are long
PLAN_DIGITS = 8  # of a plan's fingerprint, in names
SHARD_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # "0000-000012-1f2e3d4c": generation, number, plan
        pa.field("plan_file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("items", pa.int64(), nullable=False),  # known items; tars count as 0 until they are read
        pa.field("audio_s", pa.float64(), nullable=False),
    ]
)


def shard_name(generation: int, index: int, fingerprint: str) -> str:
    return f"{generation:04d}-{index:06d}-{fingerprint[:PLAN_DIGITS]}"


def read_plan(storage: Storage, generations: Sequence[Generation]) -> pa.Table:
    """All shards of the generations, `SHARD_SCHEMA`, longest first within a generation."""
    tables = [
        pq.read_table(pa.BufferReader(storage.read_bytes(f"{FOLDER}/{generation.shards_file}")), schema=SHARD_SCHEMA)
        for generation in generations
    ]
    return pa.concat_tables(tables) if tables else SHARD_SCHEMA.empty_table()


def read_shard(storage: Storage, plan_file: str, row_group: int) -> pa.Table:
    """The rows of one shard, `PLAN_SCHEMA`, in reading order."""
    with storage.open(f"{FOLDER}/{plan_file}") as file:
        return pq.ParquetFile(file).read_row_group(row_group).cast(PLAN_SCHEMA)


def write_plan(storage: Storage, plan: Plan, options: dict | None = None) -> Generation:
    """Store a plan as its generation. If stopped before its last write, it leaves no generation behind.

    Args:
        options: what the plan depends on besides the input, kept beside it as JSON.

    Returns:
        The generation that is committed: another driver's, if one was faster.

    Raises:
        ConfigError: the plan has no shards, or another driver is replacing it at this moment.
    """
    if not plan.shards:
        raise ConfigError("the plan has no shards: nothing in the input is new")
    stem = f"plan-{plan.generation:04d}-{plan.fingerprint[:PLAN_DIGITS]}"
    files = []
    for chunk, data in plan_files(plan):
        files.append(f"{stem}-{chunk:05d}.parquet")
        storage.write_atomic(f"{FOLDER}/{files[-1]}", data)
    items_files = []
    for number, data in enumerate(item_files(plan)):
        items_files.append(f"{stem}-items-{number:05d}.parquet")
        storage.write_atomic(f"{FOLDER}/{items_files[-1]}", data)
    shards_file = f"{stem}-shards.parquet"
    storage.write_atomic(f"{FOLDER}/{shards_file}", _parquet_bytes([shard_table(plan, files)], SHARD_SCHEMA))
    generation = Generation(
        generation=plan.generation,
        fingerprint=plan.fingerprint,
        shards=plan.shards,
        rows=int(plan.shard_rows.sum()),
        items=plan.items,
        exact=plan.exact,
        audio_s=plan.audio_s,
        rejected=plan.rejected,
        duplicates=plan.duplicates,
        shard_audio_s=plan.shard_audio_s,
        shards_file=shards_file,
        files=tuple(files),
        items_files=tuple(items_files),
        options=options or {},
    )
    name = f"{FOLDER}/{generation_name(plan.generation)}"
    record = {"plan_format": PLAN_FORMAT, **vars(generation)}
    storage.write_atomic(name, json.dumps(record, indent=1, sort_keys=True).encode(), exclusive=True)
    try:  # not every server honours `exclusive`, so read back which plan holds
        return read_generation(storage, name.removeprefix(f"{FOLDER}/"))
    except InputError as error:
        if error.kind != ErrorKind.MISSING_OBJECT:
            raise
        raise ConfigError(
            f"{storage.url}: {RACE}"
        ) from error  # rclone serves neither object while one replaces the other


def shard_table(plan: Plan, files: list[str]) -> pa.Table:
    """One row per shard of a plan whose rows are in `files`."""
    index = np.arange(plan.shards)
    columns = {
        "shard": [shard_name(plan.generation, number, plan.fingerprint) for number in index],
        "plan_file": [files[number // SHARDS_PER_FILE] for number in index],
        "row_group": index % SHARDS_PER_FILE,
        "rows": plan.shard_rows,
        "items": plan.shard_items,
        "audio_s": plan.shard_audio,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SHARD_SCHEMA], schema=SHARD_SCHEMA)


def plan_files(plan: Plan) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each plan file: the spilled rows, gathered by shard, in reading order."""
    bucket_of_file = _buckets(plan)
    folder = f"{plan.spill.name}/buckets"
    _distribute(plan, bucket_of_file, folder)
    for bucket in np.unique(bucket_of_file).tolist():
        with pa.OSFile(f"{folder}-{bucket}.arrow") as file:
            table = _in_one_chunk(pa.ipc.open_stream(file).read_all())
        keys = [(name, "ascending") for name in ("shard", "source", "offset_s", "channel", "id")]
        order = pc.sort_indices(table, sort_keys=keys)
        shards = table["shard"].to_numpy()[order.to_numpy()]
        for number in np.flatnonzero(bucket_of_file == bucket):
            first, last = number * SHARDS_PER_FILE, min((number + 1) * SHARDS_PER_FILE, plan.shards)
            edges = np.searchsorted(shards, np.arange(first, last + 1)).tolist()
            # Shard by shard: a file may hold more text than one Arrow column of strings can.
            groups = (_rows_of(table, order[start:stop]) for start, stop in itertools.pairwise(edges))
            yield int(number), _parquet_bytes(groups, PLAN_SCHEMA)


def _rows_of(table: pa.Table, rows: pa.Array) -> pa.Table:
    return table.take(rows).drop_columns(["shard"]).cast(PLAN_SCHEMA)


def _in_one_chunk(table: pa.Table) -> pa.Table:
    """With large strings: to take rows, Arrow joins a column's chunks, and 32-bit offsets of strings end at 2 GiB."""
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    return table.cast(pa.schema(fields)).combine_chunks()


def _buckets(plan: Plan) -> np.ndarray:
    """Bucket of each plan file: consecutive files, together about `BUCKET_ROWS` rows or `BUCKET_BYTES`."""
    spilled = os.path.getsize(f"{plan.spill.name}/{SPILL_FILE}") / len(plan.shard_of)
    rows = np.add.reduceat(plan.shard_rows, np.arange(0, plan.shards, SHARDS_PER_FILE))
    return (np.cumsum(rows) - rows) // max(1, min(BUCKET_ROWS, int(BUCKET_BYTES / spilled)))


def _distribute(plan: Plan, bucket_of_file: np.ndarray, folder: str) -> None:
    """Copy the spilled rows of this generation, with final ids and seconds, to one Arrow file per bucket."""
    schema = PLAN_SCHEMA.append(pa.field("shard", pa.int32()))
    writers: dict[int, tuple[pa.OSFile, pa.ipc.RecordBatchStreamWriter]] = {}
    for bucket in np.unique(bucket_of_file).tolist():
        file = pa.OSFile(f"{folder}-{bucket}.arrow", "wb")
        writers[bucket] = file, pa.ipc.new_stream(file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
    for first, batch in read_spill(plan.spill.name):
        shard = plan.shard_of[first : first + len(batch)]
        ids = plan.renamed.apply(first, batch["id"])
        estimate = pa.array(plan.facts.audio_s[first : first + len(batch)].astype(np.float64))
        seconds = pc.coalesce(batch["audio_s"], estimate)
        given = pc.if_else(plan.renamed.mask(first, len(batch)), batch["id"], pa.scalar(None, pa.string()))
        batch = batch.set_column(0, PLAN_SCHEMA.field(0), ids)
        batch = batch.set_column(PLAN_SCHEMA.get_field_index("given_id"), PLAN_SCHEMA.field("given_id"), given)
        batch = batch.set_column(PLAN_SCHEMA.get_field_index("audio_s"), PLAN_SCHEMA.field("audio_s"), seconds)
        table = pa.Table.from_batches([batch]).append_column(schema.field("shard"), pa.array(shard))
        bucket = np.where(shard < 0, -1, bucket_of_file[shard // SHARDS_PER_FILE])
        order = np.argsort(bucket, kind="stable")
        values, starts = np.unique(bucket[order], return_index=True)
        for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
            if value >= 0:
                writers[value][1].write_table(table.take(pa.array(rows)))
    for file, writer in writers.values():
        writer.close()
        file.close()


def _parquet_bytes(groups: Iterable[pa.Table], schema: pa.Schema) -> bytes:
    """Parquet with one row group per table. Statistics would only make the footer larger."""
    sink = pa.BufferOutputStream()
    options = {
        "compression": "zstd",
        "write_statistics": False,
        "use_dictionary": ["layout", "error_kind", "plan_file"],
    }
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=max(1, len(group)))
    return sink.getvalue().to_pybytes()


__all__ = ["SHARD_SCHEMA", "read_plan", "read_shard", "write_plan"]
