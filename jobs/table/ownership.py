"""What an output folder belongs to: one model in one dtype. Other versions of its table lie in folders of their own.

OUTPUT/job.json                  the identity this output belongs to, written once
OUTPUT/versions/<fingerprint>/   the output of another identity, laid out like OUTPUT itself
"""

import hashlib
import json
import time
from dataclasses import dataclass, field, replace

from jobs.planning.generations import RACE, Generation, list_generations
from jobs.storage.files import Storage
from jobs.table.schema import SCHEMA_VERSION
from parakeet_core.config import differing_files
from parakeet_core.errors import ConfigError

JOB_FILE = "job.json"
VERSIONS_FOLDER = "versions"
RESULTS_VERSION = 1  # raise it when a code change gives other transcripts for the same audio and weights
FINGERPRINT_DIGITS = 10  # of 64: names stay short, and one output never sees many configurations
SETTLE_S = 2.0  # a put of a few hundred bytes takes 20-100 ms, with a retry less than a second


@dataclass(frozen=True)
class JobIdentity:
    """What decides the text of a row besides its audio. Two runs with one identity may share an output.

    Attributes:
        weights_sha256: digest of the checkpoint's weights.
        dtype: in which the model runs.
        model: name of the checkpoint, for people; not part of the fingerprint.
        files: name -> sha256 of what affects texts besides the weights: configuration, front end and tokenizer. Empty
            for an output that was begun before these were recorded: there they are not compared.
    """

    weights_sha256: str
    dtype: str
    model: str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        values = [SCHEMA_VERSION, RESULTS_VERSION, self.weights_sha256, self.dtype]
        values += [sorted(self.files.items())] if self.files else []
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def recorded_dtype(output: Storage) -> str | None:
    """The dtype that an output was begun with; None for an output that no run has begun."""
    return (_job_record(output) or {}).get("dtype")


def recorded_fingerprint(output: Storage) -> str | None:
    """The fingerprint of the table in an output; None for an output that no run has begun."""
    return (_job_record(output) or {}).get("fingerprint")


def as_begun(output: Storage, identity: JobIdentity) -> tuple[Storage, JobIdentity]:
    """The output, and the identity as it records it: without files if it was begun before they were recorded."""
    record = _job_record(output)
    return output, identity if record is None or record.get("files") else replace(identity, files={})


def version_of(output: Storage, identity: JobIdentity) -> tuple[Storage, JobIdentity]:
    """Where this identity's table lies: the output itself if it is free or its own, else a folder for this version."""
    versions = [identity, replace(identity, files={})]  # the second: a folder that was begun before files were recorded
    folders = [Storage(f"{output.url}/{VERSIONS_FOLDER}/{found.fingerprint}", output.options) for found in versions]
    for place in (output, folders[1]):
        record, (_, found) = _job_record(place), as_begun(place, identity)
        free = record is None and place is output
        if free or (record is not None and record["fingerprint"] == found.fingerprint):
            return place, found
    return folders[0], identity


def claim_output(output: Storage, identity: JobIdentity, generations: list[Generation]) -> None:
    """Mark an output as this identity's, and check that no driver of the same moment has replaced the mark or the plan.

    Without conditional put a second driver may still overwrite what this one wrote, if it looked before and its request
    was on its way. After SETTLE_S that request has arrived, and what is there then holds for all.

    Args:
        generations: the plan that this run would carry out.

    Raises:
        ConfigError: it belongs to another model or dtype, or another driver's plan holds.
    """
    record = {"fingerprint": identity.fingerprint, **vars(identity), "results_version": RESULTS_VERSION}
    output.write_atomic(JOB_FILE, json.dumps(record, indent=1).encode(), exclusive=True)
    if not output.is_local:
        time.sleep(SETTLE_S)
    check_output(output, identity)
    if recorded_dtype(output) is None or list_generations(output) != generations:
        raise ConfigError(f"{output.url}: {RACE}")


def check_output(output: Storage, identity: JobIdentity) -> None:
    """Refuse an output that was begun with another model or dtype; one that no run has begun is fine."""
    found = _job_record(output)
    if found is not None and found["fingerprint"] != identity.fingerprint:
        same = all(found.get(name) == getattr(identity, name) for name in ("weights_sha256", "dtype"))
        changed = differing_files(found.get("files") or {}, identity.files)
        if same and changed:
            raise ConfigError(
                f"{output.url} was begun with another {changed} beside the same weights (model {found.get('model')}), "
                f"which gives other texts than that of {identity.model}; restore that file, use another "
                f"--output, or --new-version to have both: this one's table would come under "
                f"{output.url}/{VERSIONS_FOLDER}/{identity.fingerprint}/"
            )
        raise ConfigError(
            f"{output.url} holds transcripts of another configuration: found {found['fingerprint']} "
            f"(model {found.get('model')}, weights {str(found.get('weights_sha256'))[:12]}, {found.get('dtype')}), "
            f"this run is {identity.fingerprint} "
            f"(model {identity.model}, weights {identity.weights_sha256[:12]}, {identity.dtype}); use the same model "
            f"and --dtype, another --output, or --new-version to have both: this one's table would come under "
            f"{output.url}/{VERSIONS_FOLDER}/{identity.fingerprint}/"
        )


def _job_record(output: Storage) -> dict | None:
    if not output.exists(JOB_FILE):
        return None
    try:
        record = json.loads(output.read_bytes(JOB_FILE))
        return record | {"fingerprint": record["fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{output.url}/{JOB_FILE}: not a record of this program ({error}); use an empty --output"
        ) from error
