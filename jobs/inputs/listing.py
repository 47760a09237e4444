"""What lies under an input: Arrow batches of (name, size), page by page or folder by folder, never all at once.

Knows nothing of layouts, ids or plans. Names are relative to the input's root, with `/` between folders.
"""

import os
import re
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from jobs.storage.connections import S3_SCHEMES, StorageOptions, s3_pages, scrub, storage_errors
from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError

LISTING_SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("size_bytes", pa.int64())])
BATCH_FILES = 16_384  # about 1.5 MB of names: large enough for Arrow to be fast, small enough to hold several
WILDCARD = r"[*?\[]"  # what makes a URL a glob, as in fsspec
HIDDEN = r"(^|/)[._]"  # the rule of Hadoop and Spark: a file or folder that starts with . or _ is not data


def resolve_input(url: str, options: StorageOptions) -> tuple[Storage, str | None, str | None]:
    """Split an input URL into the storage of its root and what to read from it.

    Returns:
        (storage, pattern, name): the whole folder if both are None; files matching the glob `pattern`, if
        the URL holds `*`, `?` or `[`; or the one file `name`.

    Raises:
        ConfigError: the URL holds `*`, `?` or `[`, but is not a valid pattern; or it names no bucket.
        InputError: nothing is there, or the storage fails.
    """
    storage = Storage(url, options)
    whole = storage.root
    # Only the URL as given: the working directory is not a pattern, even if its name contains a bracket.
    given = os.path.normpath(url.removeprefix("file://")) if storage.is_local else whole
    if re.search(WILDCARD, given) and not storage.exists(""):
        return _resolve_glob(storage, given)
    if is_file(storage, slash=url.endswith("/")):
        parent, _, name = whole.rpartition("/")
        return Storage((parent or "/") if storage.is_local else f"{storage.scheme}://{parent}", options), None, name
    return storage, None, None


def _resolve_glob(storage: Storage, given: str) -> tuple[Storage, str, None]:
    """The storage of the folders before the first wildcard of `given`, and the rest of it."""
    parts = given.split("/")
    first = next(number for number, part in enumerate(parts) if re.search(WILDCARD, part))
    folders, glob = "/".join(parts[:first]), "/".join(parts[first:])
    try:
        glob_translate(glob)
    except ValueError as error:
        raise ConfigError(
            f"{scrub(given)}: not a pattern; `**` stands for whole folders, as in `folder/**/*.flac`; "
            "within a name, use `*`"
        ) from error
    if storage.is_local:
        root = folders or ("/" if given.startswith("/") else os.curdir)
        return Storage(os.path.abspath(root), storage.options), glob, None
    if not folders:
        raise ConfigError(f"{scrub(storage.url)}: the bucket is a pattern; expected its name, and a pattern behind it")
    return Storage(f"{storage.scheme}://{folders}", storage.options), glob, None


def is_file(storage: Storage, slash: bool = False) -> bool:
    """Whether the storage's own root is an object rather than a folder; MISSING_OBJECT if it is neither.

    Args:
        slash: its URL ended with one, so where an object and a folder share the name, the folder is meant.
    """
    with storage_errors(storage.url, storage.options):
        if storage.is_local:
            return not os.path.isdir(storage.root) and os.stat(storage.root) is not None
        if storage.scheme in S3_SCHEMES:
            if "/" not in storage.root:
                return False
            exact = next(s3_pages(storage.fs, storage.root, options=storage.options), [])
            is_object = any(key == storage.root for key, _ in exact)
            if is_object and not slash:
                return True
            if any(key.startswith(f"{storage.root}/") for key, _ in exact):
                return False
            below = s3_pages(storage.fs, f"{storage.root}/", options=storage.options)
            if next((page for page in below if page), None):
                return False
            if is_object:
                return True
            raise FileNotFoundError(storage.url)
        return storage.call("", storage.fs.info, storage.root)["type"] == "file"


def list_files(storage: Storage, pattern: str | None = None, name: str | None = None) -> Iterator[pa.RecordBatch]:
    """All files under the storage's root as batches of `LISTING_SCHEMA`, in no guaranteed order.

    Args:
        pattern: keep only names that match this glob.
        name: only this one file.

    Raises:
        InputError: the root does not exist or may not be listed.
    """
    with storage_errors(storage.url, storage.options):
        if name is not None:
            yield _batch([name], [storage.size(name)])
            return
        if storage.is_local:
            found = _walk_local(storage.root, pattern)
        elif storage.scheme in S3_SCHEMES:
            found = _walk_s3(storage)
        else:
            found = _walk_fsspec(storage)
        names, sizes = [], []
        for file_name, size in found:
            names.append(file_name)
            sizes.append(size)
            if len(names) == BATCH_FILES:
                yield _matching(_batch(names, sizes), pattern)
                names, sizes = [], []
        yield _matching(_batch(names, sizes), pattern)


def _batch(names: list[str], sizes: list[int]) -> pa.RecordBatch:
    # A name that is not UTF-8 (possible on local disks) cannot be a string of the table; opening it would fail as well.
    safe = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
    return pa.RecordBatch.from_arrays([pa.array(safe, pa.string()), pa.array(sizes, pa.int64())], schema=LISTING_SCHEMA)


def _matching(batch: pa.RecordBatch, pattern: str | None) -> pa.RecordBatch:
    if pattern is None:
        return batch
    matcher = re.compile(glob_translate(pattern))
    return batch.filter(pa.array([matcher.match(name) is not None for name in batch["name"].to_pylist()], pa.bool_()))


def _may_hold(folder: str, pattern: str | None) -> bool:
    """Whether a file below `folder` can match the glob; `/*.wav` must not walk the whole machine."""
    if pattern is None:
        return True
    parts, names = pattern.split("/"), folder.split("/")
    fixed = parts[: parts.index("**")] if "**" in parts else parts[:-1]
    if len(names) > len(fixed) and "**" not in parts:
        return False
    return all(re.match(glob_translate(part), name) for part, name in zip(fixed, names, strict=False))


def _walk_local(root: str, pattern: str | None) -> Iterator[tuple[str, int]]:
    if not os.path.isdir(root):
        raise FileNotFoundError(root)
    inside = os.path.join(os.path.realpath(root), "")
    waiting, links, entered = [""], [], set()
    link, own = "", None  # the link being followed, and its target relative to the root; None if outside it
    while waiting or links:
        if not waiting:
            # Links to folders come last and sorted, so that of two links to one folder always the same counts.
            links.sort()
            link = links.pop(0)
            target = os.path.join(os.path.realpath(os.path.join(root, link)), "")
            own = target[len(inside) : -1] if target.startswith(inside) else None
            if inside.startswith(target) or target in entered or (pattern is None and _is_listed(own, None)):
                continue  # a cycle, or already listed
            entered.add(target)
            waiting.append(link)
        folder = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if _may_hold(name, pattern):
                        waiting.append(name)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    if _may_hold(name, pattern):
                        links.append(name)
                elif own is None or not _is_listed(own + name[len(link) :], pattern):
                    yield name, _local_size(entry)


def _is_listed(own: str | None, pattern: str | None) -> bool:
    """Whether the target of a link is also listed under its own name, which is relative to the root."""
    if own is None or re.search(HIDDEN, own):
        return False
    return pattern is None or re.match(glob_translate(pattern), own) is not None


def _local_size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0  # deleted since, a broken link, a link to itself: it stays an item; reading it says what is wrong


def _walk_s3(storage: Storage) -> Iterator[tuple[str, int]]:
    prefix = f"{storage.root.rstrip('/')}/"
    empty = True
    for page in s3_pages(storage.fs, prefix, options=storage.options):
        for key, size in page:
            empty = False
            if not key.endswith("/"):  # a folder marker that some tools write, not a file
                yield key[len(prefix) :], size
    if empty and "/" in storage.root:
        raise FileNotFoundError(storage.url)


def _walk_fsspec(storage: Storage) -> Iterator[tuple[str, int]]:
    prefix = f"{storage.root.rstrip('/')}/"
    waiting = [storage.root]
    while waiting:
        for entry in storage.call("", partial(storage.fs.ls, detail=True, refresh=True), waiting.pop()):
            if entry["type"] == "directory":
                waiting.append(entry["name"])
            else:
                yield entry["name"].removeprefix(prefix), int(entry.get("size") or 0)


def hidden_files(names: pa.Array) -> pa.Array:
    """Boolean mask: names with a file or folder that starts with `.` or `_`."""
    return pc.match_substring_regex(names, HIDDEN)
