"""Generations of a plan: one more each time the input has grown, committed by a small JSON file that is written last.

plan/plan-0000.json   counts, fingerprint, names of the generation's other files (jobs.planning.store)
"""

import json
from dataclasses import dataclass

from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError

FOLDER = "plan"
PLAN_FORMAT = 3  # of the files of a generation
RACE = "another run has begun this output at the same moment; this one has written no transcript: run it again"


@dataclass(frozen=True)
class Generation:
    """What `plan-{g}.json` says."""

    generation: int
    fingerprint: str
    shards: int
    rows: int
    items: int
    exact: bool
    audio_s: float
    rejected: int
    duplicates: int
    shard_audio_s: float
    shards_file: str
    files: tuple[str, ...]
    items_files: tuple[str, ...]
    options: dict


def generation_name(generation: int) -> str:
    return f"plan-{generation:04d}.json"


def list_generations(storage: Storage) -> list[Generation]:
    """The committed generations, in order.

    Raises:
        ConfigError: a generation is missing, or was written by another version.
    """
    names = [name for name in storage.list_names(FOLDER) if name.endswith(".json")]
    # Some stores list a new object only after a while, and a job whose plan is overlooked would have nothing to do. So
    # the next name is asked for directly, which such stores answer correctly.
    while (following := generation_name(len(names))) not in names and storage.exists(f"{FOLDER}/{following}"):
        names.append(following)
    found = [read_generation(storage, name) for name in names]
    found.sort(key=lambda generation: generation.generation)
    if [generation.generation for generation in found] != list(range(len(found))):
        raise ConfigError(f"{storage.url}/{FOLDER}: found {names}; expected generations from 0 without a gap")
    return found


def read_generation(storage: Storage, name: str) -> Generation:
    """What a generation's JSON file says. Raises ConfigError if another program or version wrote it."""
    try:
        record = json.loads(storage.read_bytes(f"{FOLDER}/{name}"))
        version = record.pop("plan_format")
        if version != PLAN_FORMAT:
            raise ConfigError(
                f"{storage.url}/{FOLDER}/{name}: plan format {version}, expected {PLAN_FORMAT}; finish this output "
                "with the version of this program that began it, or use another --output"
            )
        return Generation(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{storage.url}/{FOLDER}/{name}: not a plan of this program ({error})") from error
