"""Any input layout -> a stream of plan rows: the listing decides the layout, the layout decides the items.

    files      a folder (with all below it) or a glob of audio files: one item per file, id = path under the input
    manifest   NeMo JSONL: one item per line (`manifest.py`)
    webdataset tar shards: one plan row per tar, expanded while it is read (`containers.py`)
    parquet    a Hugging Face audio column: one plan row per row group (`containers.py`)

Knows nothing of shards. Nothing here holds a Python object per file: the listing waits in an Arrow file on disk.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from jobs.inputs.containers import parquet_rows, tar_rows
from jobs.inputs.listing import LISTING_SCHEMA, hidden_files, list_files, resolve_input
from jobs.inputs.manifest import manifest_rows
from jobs.inputs.plan_rows import PLAN_SCHEMA, plan_batch
from jobs.sources.rules import SourceRules
from jobs.storage.connections import DEFAULT_OPTIONS, OWN_ERRORS, StorageOptions, scrub
from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError

AUDIO_EXTENSIONS = frozenset(
    ["wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "mp4", "aac", "webm", "wma", "aif", "aiff", "aifc"]
    + ["au", "snd", "caf", "w64", "rf64", "sph", "amr", "3gp"]
)
MANIFEST_EXTENSIONS = frozenset({"jsonl", "ndjson"})  # .json only when asked for: it is also an audio file's sidecar
TAR_EXTENSIONS = frozenset({"tar", "tgz"})  # and .tar.gz
PARQUET_EXTENSIONS = frozenset({"parquet"})
FORMATS = ("auto", "files", "manifest", "webdataset", "parquet")
_KINDS = {"files": "audio files", "manifest": "JSONL manifests", "webdataset": "tar shards", "parquet": "Parquet files"}


@dataclass(frozen=True)
class InputOptions:
    """What to read and what it may refer to.

    Args:
        url: local path or fsspec URL of a folder, a glob, or one file.
        format: one of `FORMATS`.
        allow_local_paths: a manifest in an object store may name files on the machine that reads it.
        allow_http: a manifest may name http(s) URLs (never those of private, loopback or link-local hosts).
        storage: how to reach object stores.
    """

    url: str
    format: str = "auto"
    allow_local_paths: bool = False
    allow_http: bool = False
    storage: StorageOptions = DEFAULT_OPTIONS

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ConfigError(f"format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if not self.url:
            raise ConfigError("no input: give a folder, a glob, a manifest, tar shards or Parquet files")


@dataclass(frozen=True)
class ListingCounts:
    """Files found under the input. `other`: unknown extensions; `hidden`: a name that starts with . or _."""

    files: int = 0
    manifest: int = 0
    webdataset: int = 0
    parquet: int = 0
    other: int = 0
    hidden: int = 0
    other_extensions: dict[str, int] = field(default_factory=dict)  # the ten most frequent

    def describe(self) -> str:
        known = [f"{getattr(self, kind)} {label}" for kind, label in _KINDS.items() if getattr(self, kind)]
        return ", ".join(known + [f"{self.other} other files", f"{self.hidden} hidden files"])


@dataclass
class InputScan:
    """An input whose layout is known: what was chosen and why, what is left out, and its plan rows on demand.

    `storage` reaches the sources of the rows yielded so far: it learns signed URLs while manifests are read.
    """

    format: str
    reason: str
    url: str
    storage: StorageOptions
    counts: ListingCounts
    left_out: str  # one line for the user: which files are not read; "" if all are
    open_batches: Callable[[], Iterator[pa.RecordBatch]] = field(repr=False)
    spill: tempfile.TemporaryDirectory = field(repr=False)  # the listing; removed by `close`

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Plan rows, batches of `PLAN_SCHEMA`; `audio_s` is null where it has to be estimated. May be called again."""
        return self.open_batches()

    def no_items(self, url: str) -> ConfigError:
        """The error to raise if `batches` yields no row.

        Args:
            url: the input as the user gave it.
        """
        found = f"the listing has {self.counts.describe()}, and there is no item in them"
        return ConfigError(f"{scrub(url)}: nothing to transcribe; {found}; expected at least one, check what writes it")

    def close(self) -> None:
        self.spill.cleanup()

    def __enter__(self) -> "InputScan":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def scan_input(options: InputOptions, listing: Iterator[pa.RecordBatch] | None = None) -> InputScan:
    """List the input, find its layout, and prepare its plan rows.

    Args:
        listing: batches of `LISTING_SCHEMA` to use instead of listing `options.url`: a catalogue made elsewhere.

    Raises:
        ConfigError: the input does not exist, may not be listed, holds nothing to transcribe, or mixes layouts.
    """
    try:
        if listing is None:
            storage, pattern, name = resolve_input(options.url, options.storage)
            listing = list_files(storage, pattern, name)
        else:
            storage, name = Storage(options.url, options.storage), None
        spill, counts = spill_listing(listing, named=name is not None)
    except OWN_ERRORS as error:
        raise ConfigError(f"the input cannot be listed: {error}") from error
    chosen, reason = choose_format(options, counts, name)
    sources = replace(options.storage, signed_urls={})
    extensions = _extensions_of(chosen, named=name is not None, asked=options.format != "auto")
    rules = SourceRules.of(storage, options.allow_local_paths, options.allow_http)

    def open_batches() -> Iterator[pa.RecordBatch]:
        selected = select_listing(spill, extensions)
        if chosen == "files":
            return file_rows(storage, selected)
        if chosen == "manifest":
            return manifest_rows(storage, selected, rules, sources.signed_urls)
        if chosen == "webdataset":
            return tar_rows(storage, selected)
        return parquet_rows(storage, selected)

    return InputScan(
        chosen, reason, storage.url, sources, counts, _left_out(counts, chosen, extensions), open_batches, spill
    )


def file_rows(storage: Storage, listing: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """One plan row per listed audio file."""
    prefix = storage.source("") if storage.source("").endswith("/") else f"{storage.source('')}/"
    for batch in listing:
        names = batch["name"]
        sources = pc.binary_join_element_wise(pa.scalar(prefix), names, "")
        items = pa.array([1] * len(names), pa.int64())
        yield plan_batch("file", {"id": names, "source": sources, "size_bytes": batch["size_bytes"], "items": items})


def spill_listing(
    listing: Iterator[pa.RecordBatch], named: bool = False
) -> tuple[tempfile.TemporaryDirectory, ListingCounts]:
    """Write the listing to a temporary Arrow file, without hidden files, and count what it holds.

    The layout is known only after the last file, and 10 million names are a gigabyte, so they wait on disk.

    Args:
        named: the listing is the one file that the user named; it is kept even if its name is hidden.
    """
    folder = tempfile.TemporaryDirectory(prefix="parakeet-listing-")
    hidden, extensions = 0, Counter()
    with pa.OSFile(f"{folder.name}/listing.arrow", "wb") as file, _ipc_writer(file, LISTING_SCHEMA) as writer:
        for batch in listing:
            kept = batch if named else batch.filter(pc.invert(hidden_files(batch["name"])))
            hidden += len(batch) - len(kept)
            for entry in pc.value_counts(extension_of(kept["name"])).to_pylist():
                extensions[entry["values"]] += entry["counts"]
            if len(kept):
                writer.write_batch(kept)

    def count(names: frozenset[str]) -> int:
        return sum(extensions[name] for name in names)

    known = AUDIO_EXTENSIONS | MANIFEST_EXTENSIONS | TAR_EXTENSIONS | PARQUET_EXTENSIONS
    other = Counter({name: number for name, number in extensions.items() if name not in known})
    return folder, ListingCounts(
        files=count(AUDIO_EXTENSIONS),
        manifest=count(MANIFEST_EXTENSIONS),
        webdataset=count(TAR_EXTENSIONS),
        parquet=count(PARQUET_EXTENSIONS),
        other=other.total(),
        hidden=hidden,
        other_extensions=dict(other.most_common(10)),
    )


def select_listing(folder: tempfile.TemporaryDirectory, extensions: frozenset[str] | None) -> Iterator[pa.RecordBatch]:
    """The spilled files that have one of `extensions` (all if None)."""
    with pa.OSFile(f"{folder.name}/listing.arrow") as file:
        for batch in pa.ipc.open_stream(file):
            if extensions is not None:
                batch = batch.filter(pc.is_in(extension_of(batch["name"]), pa.array(sorted(extensions))))
            if len(batch):
                yield batch


def extension_of(names: pa.Array) -> pa.Array:
    """Lower-case extension without the dot, "" if there is none; `tgz` for `.tar.gz`, `jsonl` for `.jsonl.gz`."""
    plain = pc.replace_substring_regex(pc.utf8_lower(names), r"\.tar\.gz$", ".tgz")
    plain = pc.replace_substring_regex(plain, r"\.(jsonl|ndjson|json)\.gz$", r".\1")
    found = pc.struct_field(pc.extract_regex(plain, r"[^/]\.(?P<extension>[^./]+)$"), "extension")
    return pc.fill_null(found, "")


def choose_format(options: InputOptions, counts: ListingCounts, name: str | None) -> tuple[str, str]:
    """The layout and why.

    Raises:
        ConfigError: nothing to read, or several layouts and no `format` option.
    """
    url = scrub(options.url)
    found = {kind: getattr(counts, kind) for kind in _KINDS if getattr(counts, kind)}
    if name is not None and options.format == "auto" and name.lower().endswith((".json", ".json.gz")):
        return "manifest", "the input is one .json file"
    if name is not None and not found and options.format == "auto":
        raise ConfigError(f"{url}: this file's extension is none of audio, .jsonl, .tar or .parquet; say --format")
    if options.format != "auto":
        if not found.get(options.format) and name is None and not (options.format == "manifest" and counts.other):
            raise ConfigError(f"{url}: --format {options.format}, but the listing has {counts.describe()}")
        return options.format, "asked for by the format option"
    if not found:
        raise ConfigError(f"{url}: nothing to transcribe; the listing has {counts.describe()}")
    if len(found) > 1:
        raise ConfigError(f"{url}: a mix ({counts.describe()}); say which is the input with --format {'|'.join(found)}")
    chosen = next(iter(found))
    return chosen, f"the listing has {counts.describe()}"


def _extensions_of(chosen: str, named: bool, asked: bool) -> frozenset[str] | None:
    if named:
        return None  # the one file that was named, whatever it is called
    if chosen == "manifest":
        return MANIFEST_EXTENSIONS | {"json"} if asked else MANIFEST_EXTENSIONS
    return {"files": AUDIO_EXTENSIONS, "webdataset": TAR_EXTENSIONS, "parquet": PARQUET_EXTENSIONS}[chosen]


def _left_out(counts: ListingCounts, chosen: str, read: frozenset[str] | None) -> str:
    parts = [f"{getattr(counts, kind)} {label}" for kind, label in _KINDS.items() if kind != chosen]
    parts = [part for part in parts if not part.startswith("0 ")]
    others = {name: number for name, number in counts.other_extensions.items() if name not in (read or ())}
    if others:
        often = ", ".join(f"{number} .{name}" if name else f"{number} without" for name, number in others.items())
        number = counts.other - sum(counts.other_extensions.values()) + sum(others.values())
        parts.append(f"{number} files of other extensions ({often})")
    if counts.hidden:
        parts.append(f"{counts.hidden} hidden files (a name that starts with . or _)")
    return "not read: " + "; ".join(parts) if parts else ""


def _ipc_writer(file: pa.NativeFile, schema: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
    return pa.ipc.new_stream(file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))


__all__ = ["PLAN_SCHEMA", "InputOptions", "InputScan", "ListingCounts", "scan_input"]
