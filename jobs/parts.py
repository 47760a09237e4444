"""Parts of the table: what they are called, which exist, how one is committed.

OUTPUT/transcripts/part-<generation>-<number>-<plan>-<job>.parquet
"""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.schema import PartFacts, facts_of_metadata
from jobs.storage import Storage
from parakeet_core.errors import ConfigError

TABLE_FOLDER = "transcripts"
LIST_SPAN = 4000  # parts listed one after the other; more are listed in ranges at a time, as pages of 1000 are slow
FOOTER_THREADS = 32  # requests for footers at a time; each waits 20-100 ms on an object store
PART_NAME = re.compile(r"^part-(?P<shard>\d{4}-\d{6}-[0-9a-f]+)-(?P<fingerprint>[0-9a-f]+)\.parquet$")


def part_name(shard: str, fingerprint: str) -> str:
    return f"{TABLE_FOLDER}/part-{shard}-{fingerprint}.parquet"


def committed_shards(output: Storage, fingerprint: str, planned: set[str]) -> set[str]:
    """The planned shards whose part exists; one listing, no part is opened.

    Raises:
        ConfigError: the table's folder holds files of another origin.
    """
    edges = sorted(planned)[LIST_SPAN::LIST_SPAN]
    names = output.list_names(TABLE_FOLDER, [f"part-{shard}" for shard in edges])
    found = {name: PART_NAME.match(name) for name in names}
    shards = {match["shard"] for match in found.values() if match and match["fingerprint"] == fingerprint}
    foreign = [
        name
        for name, match in found.items()
        if match is None or match["fingerprint"] != fingerprint or match["shard"] not in planned
    ]
    if foreign:
        raise ConfigError(
            f"{output.url}/{TABLE_FOLDER}: {len(foreign)} files are not parts of this table "
            f"({', '.join(foreign[:3])}); they would be read as rows of it: move them away or use another --output"
        )
    return shards


def commit_part(output: Storage, name: str, table: pa.Table, metadata: dict[bytes, bytes]) -> int:
    """Write a part, whole or not at all; the same table gives the same bytes. Returns its size in bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    content = sink.getvalue()
    output.write_atomic(name, content)
    return len(content)


def read_part_facts(output: Storage, shards: set[str], fingerprint: str) -> dict[str, PartFacts]:
    """Counts of committed parts, from their footers alone."""

    def read(shard: str) -> tuple[str, PartFacts]:
        name = part_name(shard, fingerprint)
        try:
            with output.open(name) as file:
                return shard, facts_of_metadata(pq.read_schema(file).metadata or {})
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise ConfigError(f"{output.source(name)}: not a part of this program ({error})") from error

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return dict(pool.map(read, sorted(shards)))
