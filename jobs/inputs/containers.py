"""Containers -> plan rows: one per WebDataset tar, one per row group of a Parquet file with an audio column.

Knows nothing of what is inside a tar (`jobs.reading`); of a Parquet file it reads only the footer.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.inputs.plan_rows import PLAN_SCHEMA, plan_batch
from jobs.sources.reader import SourceFile
from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError, ErrorKind, InputError

FOOTER_THREADS = 16  # a footer is two small requests; 16 at a time read 10,000 footers at 50 ms each in about a minute
SIGNATURE_BYTES = 28  # nonce and tag after a plain footer of encrypted columns (Parquet's Encryption.md, section 4.2)
REFERENCE_COLUMNS = ("text", "transcription", "sentence")  # as the audio sets on the Hugging Face hub name them


def tar_rows(storage: Storage, listing: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """One plan row per listed tar; how many items it holds becomes known when it is read."""
    for batch in listing:
        sources = pa.array([storage.source(name) for name in batch["name"].to_pylist()], pa.string())
        yield plan_batch("tar", {"id": batch["name"], "source": sources, "size_bytes": batch["size_bytes"]})


def parquet_rows(storage: Storage, listing: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """One plan row per row group that has rows. A file that cannot be used is one rejected row.

    The id of a row group is the id of its first item, `file.parquet#row`; the following items count on from there.
    """
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for batch in listing:
            names = batch["name"].to_pylist()
            sizes = batch["size_bytes"].to_pylist()
            for start in range(0, len(names), 256):  # bounds the footers in flight
                chosen = slice(start, start + 256)
                found = pool.map(lambda name, size: _row_groups(storage, name, size), names[chosen], sizes[chosen])
                rows = [row for group in found for row in group]
                columns = [name for name in PLAN_SCHEMA.names if name != "layout"]
                if rows:
                    yield plan_batch("parquet", {name: [row.get(name) for row in rows] for name in columns})


def _row_groups(storage: Storage, name: str, size_bytes: int) -> list[dict]:
    source = storage.source(name)
    try:
        with SourceFile(source, storage.options, size_bytes) as file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=False)
                find_audio_column(parquet.schema_arrow)
                _check_not_encrypted(file, parquet.metadata)
                return [
                    {
                        "id": f"{name}#{first}",
                        "source": source,
                        "row_group": group,
                        # Of all columns: when asked for a single one of a damaged footer, Arrow 26 can end the process.
                        "size_bytes": parquet.metadata.row_group(group).total_byte_size,
                        "items": rows,
                    }
                    for group, first, rows in _first_rows(parquet.metadata)
                    if rows
                ]
            # Damaged Thrift raises OSError, a name that is not UTF-8 ValueError; storage failures are InputErrors.
            except (pa.ArrowException, OSError, ValueError) as error:
                reason = (
                    f"no usable Parquet footer ({str(error)[:200]}); expected a complete file, found {size_bytes} bytes"
                )
                raise InputError(ErrorKind.TORN_ARCHIVE, reason) from error
    except InputError as error:
        if error.kind == ErrorKind.STORAGE:
            raise ConfigError(f"the footers of the input cannot be read: {error.message}") from error
        row = {"id": name, "source": source, "audio_s": 0.0, "items": 1, "size_bytes": size_bytes}
        return [row | {"error_kind": str(error.kind), "error_message": f"{name}: {error.message}"}]


def _check_not_encrypted(file: IO[bytes], metadata: pq.FileMetaData) -> None:
    """Refuse a file with encrypted columns: when asked for the size of one, Arrow 26 ends the process."""
    file.seek(-8, io.SEEK_END)  # the length of the footer, and PAR1
    if int.from_bytes(file.read(4), "little") == metadata.serialized_size + SIGNATURE_BYTES:
        raise InputError(ErrorKind.BAD_RECORD, "the file has encrypted columns; expected plain ones, write it again")


def _first_rows(metadata: pq.FileMetaData) -> Iterator[tuple[int, int, int]]:
    """(row group, index of its first row in the file, number of its rows)."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        yield group, first, rows
        first += rows


@dataclass(frozen=True)
class AudioColumn:
    """Where a Parquet file keeps its audio.

    Args:
        name: the column, a struct `{bytes, path}`, or plain binary.
        is_struct: the bytes are the struct's field `bytes`.
        reference: the text column, if there is one.
        extra: other columns of scalar type.
    """

    name: str
    is_struct: bool
    reference: str | None
    extra: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return [self.name, *([self.reference] if self.reference else []), *self.extra]


def find_audio_column(schema: pa.Schema) -> AudioColumn:
    """The audio column by its type (a struct with binary `bytes`), or a binary column named `audio`.

    Raises:
        InputError: BAD_RECORD, none or several.
    """
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and _has_bytes(field.type)]
    plain = [field.name for field in schema if field.name == "audio" and _is_binary(field.type)]
    candidates = structs or plain
    if "audio" in candidates:
        candidates = ["audio"]
    if len(candidates) != 1:
        found = f"columns {schema.names}" if not candidates else f"several: {candidates}"
        raise InputError(
            ErrorKind.BAD_RECORD, f"expected one audio column {{bytes, path}}, found {found}; name it audio"
        )
    name = candidates[0]
    reference = next((column for column in REFERENCE_COLUMNS if column in schema.names), None)
    extra = tuple(f.name for f in schema if f.name not in (name, reference) and _is_scalar(f.type))
    return AudioColumn(name, bool(structs), reference, extra)


def _has_bytes(struct: pa.StructType) -> bool:
    return any(field.name == "bytes" and _is_binary(field.type) for field in struct)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # the categories of pandas and Polars
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)
    return text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)


def plain_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with its dictionary columns decoded, so that each value can be read as what it is."""
    arrays = [pc.cast(a, a.type.value_type) if pa.types.is_dictionary(a.type) else a for a in batch.columns]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)
