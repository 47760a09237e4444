"""Parts of the table: what they are called, which exist, how one is committed; and what an output folder belongs to.

OUTPUT/job.json                                 the fingerprint this output belongs to, written once
OUTPUT/transcripts/part-<shard>-<fingerprint>.parquet
"""

import hashlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.schema import SCHEMA_VERSION, PartFacts, facts_of_metadata
from jobs.storage import Storage
from parakeet_core.errors import ConfigError

TABLE_FOLDER = "transcripts"
JOB_FILE = "job.json"
RESULTS_VERSION = 1  # raise it when a change of the code gives other transcripts for the same audio and weights
FINGERPRINT_DIGITS = 10  # of 64: names stay short, and one output never sees many configurations
FOOTER_THREADS = 32  # requests for footers at a time; each waits 20-100 ms on an object store
PART_NAME = re.compile(r"^part-(?P<shard>\d{4}-\d{6})-(?P<fingerprint>[0-9a-f]+)\.parquet$")


@dataclass(frozen=True)
class JobIdentity:
    """What decides the text of a row besides its audio. Two runs with one identity may share an output.

    Attributes:
        weights_sha256: digest of the checkpoint's weights.
        dtype: the model runs in.
        model: name of the checkpoint, for people; not part of the fingerprint.
    """

    weights_sha256: str
    dtype: str
    model: str

    @property
    def fingerprint(self) -> str:
        values = [SCHEMA_VERSION, RESULTS_VERSION, self.weights_sha256, self.dtype]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def recorded_dtype(output: Storage) -> str | None:
    """The dtype that an output was begun with; None for an output that nobody has begun."""
    return _job_record(output).get("dtype") if output.exists(JOB_FILE) else None


def claim_output(output: Storage, identity: JobIdentity) -> None:
    """Mark an output as this identity's, or check that it is.

    Raises:
        ConfigError: it belongs to another model or dtype.
    """
    record = {"fingerprint": identity.fingerprint, **vars(identity), "results_version": RESULTS_VERSION}
    output.write_atomic(JOB_FILE, json.dumps(record, indent=1).encode(), exclusive=True)
    check_output(output, identity)


def check_output(output: Storage, identity: JobIdentity) -> None:
    """Refuse an output that another model or dtype has begun; an output that nobody has begun is fine."""
    if not output.exists(JOB_FILE):
        return
    found = _job_record(output)
    fingerprint = found["fingerprint"]
    if fingerprint != identity.fingerprint:
        raise ConfigError(
            f"{output.url} holds transcripts of another configuration: found {fingerprint} "
            f"(model {found.get('model')}, weights {str(found.get('weights_sha256'))[:12]}, {found.get('dtype')}), "
            f"this run is {identity.fingerprint} "
            f"(model {identity.model}, weights {identity.weights_sha256[:12]}, {identity.dtype}); "
            "use another --output, or the same model and --dtype"
        )


def _job_record(output: Storage) -> dict:
    try:
        record = json.loads(output.read_bytes(JOB_FILE))
        return record | {"fingerprint": record["fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{output.url}/{JOB_FILE}: not a record of this program ({error}); use an empty --output"
        ) from error


def part_name(shard: str, fingerprint: str) -> str:
    return f"{TABLE_FOLDER}/part-{shard}-{fingerprint}.parquet"


def committed_shards(output: Storage, fingerprint: str) -> set[str]:
    """Shards whose part exists; one listing, no part is opened.

    Raises:
        ConfigError: the table's folder holds files of another origin.
    """
    shards, foreign = set(), []
    for name in output.list_names(TABLE_FOLDER):
        found = PART_NAME.match(name)
        if found and found["fingerprint"] == fingerprint:
            shards.add(found["shard"])
        else:
            foreign.append(name)
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
