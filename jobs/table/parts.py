"""Files of the table: what they are called, which exist, how one is committed.

OUTPUT/transcripts/part-<generation>-<number>-<plan>-<job>.parquet   one shard
OUTPUT/transcripts/merged-<digest>-<job>.parquet                     many shards; its metadata says which (jobs.compact)
"""

import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.storage.connections import storage_errors
from jobs.storage.files import Storage
from jobs.table.schema import METADATA_PREFIX, PartFacts, facts_of_metadata
from jobs.table.shard_names import unpack_shards
from parakeet_core.errors import ConfigError

TABLE_FOLDER = "transcripts"
LIST_SPAN = 3990  # parts in one range of a listing, four pages of 1000; many ranges are listed at a time
FOOTER_THREADS = 32  # requests for footers at a time; each waits 20-100 ms on an object store
PART_NAME = re.compile(r"^part-(?P<shard>\d{4,}-\d{6,}-[0-9a-f]+)-(?P<fingerprint>[0-9a-f]+)\.parquet$")
MERGED_NAME = re.compile(r"^merged-[0-9a-f]+-(?P<fingerprint>[0-9a-f]+)\.parquet$")
SHARDS_KEY = f"{METADATA_PREFIX}shards".encode()  # in the metadata of a merged file


@dataclass(frozen=True)
class Committed:
    """The files of a table.

    Attributes:
        files: name -> the shards whose rows it holds.
    """

    files: dict[str, frozenset[str]]

    @cached_property
    def shards(self) -> set[str]:
        return set().union(*self.files.values())

    @cached_property
    def doubled(self) -> set[str]:
        """Shards that are in two files: merging was stopped between its put and its deletes, or is still running."""
        if sum(map(len, self.files.values())) == len(self.shards):
            return set()
        seen: set[str] = set()
        return {shard for held in self.files.values() for shard in held if shard in seen or seen.add(shard)}


def part_name(shard: str, fingerprint: str) -> str:
    return f"{TABLE_FOLDER}/part-{shard}-{fingerprint}.parquet"


def listing_edges(planned: set[str]) -> list[str]:
    """Names that cut the listing of a table into ranges of `LIST_SPAN` parts."""
    return [f"part-{shard}" for shard in sorted(planned)[LIST_SPAN::LIST_SPAN]]


def find_committed(output: Storage, fingerprint: str, planned: set[str]) -> Committed:
    """The files of the table; one listing, and the footers of merged files. No part is opened.

    Raises:
        ConfigError: the table's folder holds files of another origin.
    """
    names = output.list_names(TABLE_FOLDER, listing_edges(planned))
    merged = [name for name in names if (found := MERGED_NAME.match(name)) and found["fingerprint"] == fingerprint]
    files = {name: _merged_shards(output, name, footer) for name, footer in read_footers(output, merged).items()}
    for name in names:
        if (found := PART_NAME.match(name)) and found["fingerprint"] == fingerprint:
            files[name] = frozenset([found["shard"]])
    seen = [name for name in names if not name.startswith((".", "_"))]  # readers of a table skip such names
    foreign = [name for name in seen if not (name in files and files[name] <= planned)]
    if foreign:
        raise ConfigError(
            f"{output.url}/{TABLE_FOLDER}: {len(foreign)} files are not parts of this table "
            f"({', '.join(foreign[:3])}); they would be read as rows of it: move them away or use another --output"
        )
    return Committed(files)


def commit_part(output: Storage, name: str, table: pa.Table, metadata: dict[bytes, bytes]) -> int:
    """Write a part, whole or not at all; the same table gives the same bytes. Returns its size in bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    content = sink.getvalue()
    output.write_atomic(name, content)
    return len(content)


@dataclass(frozen=True)
class Footer:
    """What the end of a file of the table says: key-value metadata, counts, and its size."""

    metadata: dict[bytes, bytes]
    facts: PartFacts
    size_bytes: int


def read_footers(output: Storage, names: Iterable[str]) -> dict[str, Footer]:
    """The footers of files of the table, by their names in its folder.

    Raises:
        ConfigError: one was not written by this program.
    """

    def read(name: str) -> tuple[str, Footer]:
        path = f"{TABLE_FOLDER}/{name}"
        try:
            with storage_errors(output.source(path), output.options), output.open(path) as file:
                metadata = pq.read_schema(file).metadata or {}
                return name, Footer(metadata, facts_of_metadata(metadata), file.seek(0, io.SEEK_END))
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise ConfigError(f"{output.source(path)}: not a part of this program ({error})") from error

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return dict(pool.map(read, sorted(names)))


def read_facts(output: Storage, names: Iterable[str]) -> dict[str, PartFacts]:
    """Counts of files of the table, from their footers alone."""
    return {name: footer.facts for name, footer in read_footers(output, names).items()}


def _merged_shards(output: Storage, name: str, footer: Footer) -> frozenset[str]:
    try:
        return frozenset(unpack_shards(json.loads(footer.metadata[SHARDS_KEY])))
    except (KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{output.source(f'{TABLE_FOLDER}/{name}')}: does not say its shards ({error})") from error
