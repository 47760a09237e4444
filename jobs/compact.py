"""Small parts -> files of a size that readers like: `python -m jobs.compact --output URL [--replace]`.

What a plain reader of a folder sees, at every moment and after a kill at any moment:

- Without --replace, nothing in OUTPUT/transcripts/ changes. A copy of the table is written under
  OUTPUT/compacted/<version>/; it is whole once OUTPUT/compacted/<version>.json exists, which is written last.
- With --replace on a local disk of Linux, the new transcripts/ is made beside the old one, and the two are swapped in
  one step: each listing shows either the old files or the new. A reader that has listed the old files and opens them
  after the swap finds them gone, and has to list again.
- With --replace on an object store, which has no such step, each merged file is put, and then the parts that it holds
  are removed. In between, for about as long as the two requests take, or from a kill until the next run of this
  command, the rows of that one file are there twice. None is ever missing from the store, but a listing of several
  requests (1000 names each) misses rows if it begins before the put and ends after the removal. A reader that cannot
  tolerate this should use the copy.

The table must be complete. After a stop, the same command continues where it was; run again after that, it does
nothing. A later run of the job accepts the merged files in place of the shards that they hold. Parts with errors that
`--retry-errors` may clear are left as they are, so that it still can.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.command_line import JobStoppedError, exit_status
from jobs.config import StorageConfig
from jobs.planning.generations import list_generations
from jobs.planning.store import read_plan
from jobs.report.progress import Tally
from jobs.report.receipt import RECEIPT_FILE, EventLog
from jobs.storage.files import TEMPORARY_FOLDER, Storage
from jobs.storage.local_files import try_lock
from jobs.table.folder_swap import recover_folder, swap_folder
from jobs.table.merging import merge_parts
from jobs.table.ownership import JOB_FILE, recorded_fingerprint
from jobs.table.parts import TABLE_FOLDER, Footer, find_committed, read_footers
from jobs.table.schema import METADATA_PREFIX, PartFacts, file_metadata
from jobs.table.shard_names import pack_shards, unpack_shards
from parakeet_core.errors import RETRYABLE_KINDS, ConfigError, ErrorKind, InputError

COMPACTED_FOLDER = "compacted"
REMOVAL_PROBE = ".removal-probe"  # never exists: a store's answer to its removal shows the caller's rights
VERSION_DIGITS = 12
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CompactConfig(StorageConfig):
    """Merge the small parts of a finished table."""

    output: str
    """The --output of the job: a path or URL."""
    target_mb: float = 256.0
    """MiB of a merged file. Parts are merged until they reach it, so no file exceeds 1.5 times this size."""
    replace: bool = False
    """Change OUTPUT/transcripts/ itself; default is to write a merged copy under OUTPUT/compacted/."""

    def __post_init__(self):
        super().__post_init__()
        if not self.output:
            raise ConfigError("--output is empty")
        if not 0 < self.target_mb <= 1024:  # a file is put in one request, from memory
            raise ConfigError(f"--target-mb {self.target_mb}: expected more than 0 and at most 1024")


@dataclass(frozen=True)
class TableFile:
    """A file of the table."""

    name: str
    shards: frozenset[str]
    footer: Footer

    @property
    def origin(self) -> dict[str, str]:
        """Its metadata without its own shards and counts: only files for which this is equal are merged."""
        own = ("shard", "shards", "facts", "schema_version")
        found = {key.decode(): value.decode() for key, value in self.footer.metadata.items()}
        named = {key.removeprefix(METADATA_PREFIX): text for key, text in found.items() if METADATA_PREFIX in key}
        return {key: text for key, text in named.items() if key not in own}


@dataclass(frozen=True)
class Compaction:
    """What was done: `folder` holds the table, which has `files` files; `merged` merged files were written."""

    folder: str
    files: int
    merged: int


def compact(config: CompactConfig) -> Compaction:
    """Merge the small parts of a table.

    Raises:
        ConfigError: the output holds no complete table.
        InputError: the storage failed; what is done stays, and the next run continues from there.
    """
    output = Storage(config.output, config.storage())
    if not (config.replace and output.is_local and output.exists(JOB_FILE)):
        return _compact(config, output)
    with try_lock(output.path(JOB_FILE)) as alone:
        if not alone:  # one would mistake the other's old folder for its new one
            raise ConfigError(f"{output.url}: another --replace is at work on this output")
        return _compact(config, output)


def _compact(config: CompactConfig, output: Storage) -> Compaction:
    output.remove_dead_temporaries()
    if config.replace:
        _finish_earlier(output)
    fingerprint, planned = _complete_table(output)
    target_bytes = int(config.target_mb * MEBIBYTE)
    events, merged = EventLog(output), 0
    while True:
        files = _table_files(output, fingerprint, planned)
        groups = choose_groups(files, target_bytes)
        version = _version(files, groups)
        act = _replace if config.replace else _write_copy
        done = act(output, files, groups, version, fingerprint)
        merged += done
        if done:
            events.add("compact", version=version, replace=config.replace, merged=done, parts=sum(map(len, groups)))
        if not (config.replace and done):  # merged files can still be small: rows take less space together
            break
    events.flush()
    folder = TABLE_FOLDER if config.replace else f"{COMPACTED_FOLDER}/{version}"
    return Compaction(output.source(folder), len(files) - sum(map(len, groups)) + len(groups), merged)


def _complete_table(output: Storage) -> tuple[str, set[str]]:
    """(fingerprint, shards) of a complete table, from its receipt."""
    try:
        receipt = json.loads(output.read_bytes(RECEIPT_FILE)) if output.exists(RECEIPT_FILE) else {"complete": False}
        if receipt["complete"]:
            return receipt["fingerprint"], unpack_shards(receipt["accounted"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{output.url}/{RECEIPT_FILE}: not a receipt of this program ({error})") from error
    raise ConfigError(f"{output.url} holds no complete table: run the job to its end first")


def _table_files(output: Storage, fingerprint: str, planned: set[str]) -> list[TableFile]:
    committed = find_committed(output, fingerprint, planned)
    if committed.doubled or committed.shards != planned:
        raise ConfigError(
            f"{output.url}: {len(committed.doubled)} shards stand in two files, {len(planned - committed.shards)} in "
            "none; if a replacement was stopped, finish it with --replace; else run the job again first"
        )
    footers = read_footers(output, committed.files)
    return [TableFile(name, committed.files[name], footers[name]) for name in sorted(committed.files)]


def choose_groups(files: Sequence[TableFile], target_bytes: int) -> list[list[TableFile]]:
    """Which small files become one: neighbours in shard order with the same origin, until they reach the target."""
    small = [f for f in files if f.footer.size_bytes < target_bytes / 2]
    small = [f for f in small if RETRYABLE_KINDS.isdisjoint(f.footer.facts.errors_by_kind)]
    groups: dict[str, list[list[TableFile]]] = {}
    for file in sorted(small, key=lambda file: min(file.shards)):
        of_origin = groups.setdefault(json.dumps(file.origin, sort_keys=True), [[]])
        if sum(member.footer.size_bytes for member in of_origin[-1]) >= target_bytes:
            of_origin.append([])
        of_origin[-1].append(file)
    return [group for of_origin in groups.values() for group in of_origin if len(group) > 1]


def _version(files: Sequence[TableFile], groups: Sequence[Sequence[TableFile]]) -> str:
    """A name for the result of the merging: the same for the same files and groups."""
    names = [[file.name for file in group] for group in groups]
    facts = [(file.name, file.footer.size_bytes, vars(file.footer.facts)) for file in files]
    return hashlib.sha256(json.dumps([names, facts]).encode()).hexdigest()[:VERSION_DIGITS]


def merged_name(group: Sequence[TableFile], fingerprint: str) -> str:
    return f"merged-{_version(group, [group])}-{fingerprint}.parquet"


def merged_metadata(group: Sequence[TableFile]) -> dict[bytes, bytes]:
    """The metadata of a merged file: that of its parts, their shards, and the sums of their counts."""
    tally = Tally()
    for file in group:
        tally.add(file.footer.facts)
    sums = {name: getattr(tally, name) for name in PartFacts.__dataclass_fields__}
    facts = PartFacts(**sums | {"audio_s": round(tally.audio_s, 3), "lost_s": round(tally.lost_s, 3)})
    return file_metadata(group[0].origin, facts, {"shards": json.dumps(pack_shards(_shards(group)))})


def _shards(files: Iterable[TableFile]) -> set[str]:
    return set().union(*(file.shards for file in files))


def _write_merged(output: Storage, group: Sequence[TableFile], name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="parakeet-compact-") as scratch:
        path = Path(scratch, "merged.parquet")
        rows = merge_parts(output, [f"{TABLE_FOLDER}/{file.name}" for file in group], merged_metadata(group), path)
        expected = sum(file.footer.facts.rows for file in group)
        if rows != expected:
            raise RuntimeError(f"{name}: {rows} rows of parts that hold {expected}")
        with path.open("rb") as file:
            output.write_atomic(name, file)


def _write_copy(
    output: Storage, files: Sequence[TableFile], groups: list[list[TableFile]], version: str, fingerprint: str
) -> int:
    """Write the table under compacted/<version>/, then its JSON file; returns how many files were merged now."""
    folder = f"{COMPACTED_FOLDER}/{version}"
    if output.exists(f"{folder}.json"):
        return 0
    there = set(output.list_names(folder))
    names, written = {merged_name(group, fingerprint): group for group in groups}, 0
    for name in names.keys() - there:
        _write_merged(output, names[name], f"{folder}/{name}")
        written += 1
    for file in _untouched(files, groups):
        names[file.name] = [file]
        if file.name not in there:
            output.write_atomic(f"{folder}/{file.name}", output.read_bytes(f"{TABLE_FOLDER}/{file.name}"))
    rows = sum(file.footer.facts.rows for file in files)
    record = {"files": sorted(names), "rows": rows, "fingerprint": fingerprint}
    output.write_atomic(f"{folder}.json", json.dumps(record, indent=1).encode())
    return written


def _untouched(files: Iterable[TableFile], groups: Iterable[Iterable[TableFile]]) -> list[TableFile]:
    merged = {file.name for group in groups for file in group}
    return [file for file in files if file.name not in merged]


def _replace(
    output: Storage, files: Sequence[TableFile], groups: list[list[TableFile]], version: str, fingerprint: str
) -> int:
    """Replace parts with merged files; returns the number of merged files."""
    beside = f"{TEMPORARY_FOLDER}/compact-{version}"
    _drop_folders(output, but=beside)
    names = {merged_name(group, fingerprint): group for group in groups}
    if output.is_local and groups:
        for name in names.keys() - set(output.list_names(beside)):
            _write_merged(output, names[name], f"{beside}/{name}")
        kept = [file.name for file in _untouched(files, groups)]
        if swap_folder(output.path(TABLE_FOLDER), output.path(beside), kept):
            recover_folder(output.path(TABLE_FOLDER), output.path(beside), _shards(files))
            _drop_folders(output)
            return len(groups)
    if groups:
        _check_removal(output)
    for name, group in names.items():
        _write_merged(output, group, f"{TABLE_FOLDER}/{name}")
        _remove(output, [file.name for file in group])
    return len(groups)


def _finish_earlier(output: Storage) -> None:
    """Finish a replacement that was stopped; until then a job on this output refuses to run."""
    planned = set(read_plan(output, list_generations(output))["shard"].to_pylist())
    committed = find_committed(output, recorded_fingerprint(output) or "", planned)
    if committed.doubled:
        merged = [held for held in committed.files.values() if held & committed.doubled and len(held) > 1]
        _remove(output, [name for name, held in committed.files.items() if any(held < other for other in merged)])
    for folder in _folders_beside(output):
        recover_folder(output.path(TABLE_FOLDER), str(folder), committed.shards)


def _folders_beside(output: Storage) -> list[Path]:
    """Folders that replacements made beside transcripts/: a new one before the swap, or the old one after it."""
    return list(Path(output.path(TEMPORARY_FOLDER)).glob("compact-*")) if output.is_local else []


def _drop_folders(output: Storage, but: str = "") -> None:
    for folder in _folders_beside(output):
        if str(folder) != output.path(but):
            shutil.rmtree(folder)


def _check_removal(output: Storage) -> None:
    """Refuse a caller who may put files but not remove them, before the rows of a merged file are there twice."""
    try:
        output.delete(f"{TABLE_FOLDER}/{REMOVAL_PROBE}")
    except InputError as error:
        if error.kind != ErrorKind.FORBIDDEN:
            raise
        raise ConfigError(f"--replace has to remove the parts that it has merged: {error.message}") from error


def _remove(output: Storage, names: Sequence[str]) -> None:
    """Remove files of the table."""
    output.delete_all([f"{TABLE_FOLDER}/{name}" for name in names])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 refused, 1 stopped in the middle."""
    return exit_status(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    try:
        done = compact(tyro.cli(CompactConfig, args=arguments, prog="python -m jobs.compact"))
    except OSError as error:  # from the local disk on which parts are sorted
        raise JobStoppedError(f"{error}; give TMPDIR more room and run the same command again") from error
    said = f"{done.merged} files made of small parts" if done.merged else "nothing to do"
    print(f"{said}; the table is {done.files} files in {done.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
