"""Files by name under a folder of a local disk or a prefix of an object store: atomic writes, listings, temporaries.

Knows nothing of audio, plans or Ray. Nothing here caches a listing: a job relies on what the storage says now.
"""

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO

from jobs.storage.connections import (
    DEFAULT_OPTIONS,
    S3_SCHEMES,
    SCHEME,
    StorageOptions,
    connect,
    read_object,
    s3_delete,
    s3_keys,
    scheme_of,
    scrub,
    storage_call,
    storage_errors,
)
from jobs.storage.local_files import HIDDEN_PREFIX, check_regular, remove_dead_temporaries, write_local
from jobs.storage.source_file import SourceFile
from parakeet_core.errors import ConfigError, ErrorKind, InputError

READ_BLOCK_BYTES = 8 << 20  # of `Storage.open`; s3fs would read 50 MiB ahead
SINGLE_PUT_LIMIT = 5 * 2**30 - 1  # S3 refuses a larger put_object; parts and plan files are a few hundred MiB at most
TEMPORARY_FOLDER = ".tmp"  # under the root: what a killed writer leaves must not lie among the files of a table


class Storage:
    """A folder on a local disk or a prefix of an object store, reached by names relative to it. Can be pickled.

    All methods raise `CredentialsError`, and `InputError` of kind MISSING_OBJECT, FORBIDDEN or STORAGE; `open` also
    BAD_RECORD.

    Raises:
        ConfigError: the URL has an unknown scheme, or names nothing after it.
    """

    def __init__(self, url: str, options: StorageOptions = DEFAULT_OPTIONS):
        if SCHEME.match(url) and not SCHEME.sub("", url).strip("/"):
            raise ConfigError(f"{url} names no bucket and no folder; expected s3://bucket/folder or a path")
        self.url = url.rstrip("/") if len(url) > 1 else url
        self.options = options
        self.scheme = scheme_of(url)
        self.fs, self.root = connect(self.url, options)
        if self.is_local:
            self.url = self.root  # the same folder in a worker, whatever its working directory

    def __reduce__(self):
        return type(self), (self.url, self.options)

    def __repr__(self) -> str:
        return f"Storage({scrub(self.url)!r})"

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    def path(self, name: str = "") -> str:
        """The path of `name` in `self.fs`."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def source(self, name: str) -> str:
        """The URL or absolute path that opens `name` from anywhere."""
        return self.path(name) if self.is_local else f"{self.scheme}://{self.path(name)}"

    def call(self, name: str, function: Callable, *arguments):
        """Call `function(*arguments)`, a request for `name`: tried again while that may help, its errors mapped."""
        return storage_call(partial(function, *arguments), self.source(name), self.options)

    def size(self, name: str) -> int:
        return int(self.call(name, self.fs.info, self.path(name))["size"])

    def exists(self, name: str) -> bool:
        try:
            self.call(name, self.fs.info, self.path(name))
        except InputError as error:
            if error.kind == ErrorKind.MISSING_OBJECT:
                return False
            raise
        return True

    def read_bytes(self, name: str) -> bytes:
        return self.call(name, read_object, self.fs, self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A seekable file for reading, whose failures are `InputError`s; BAD_RECORD if it is a pipe or a device."""
        if self.is_local:  # a real file: Arrow reads it faster than a Python object
            self.call(name, check_regular, self.path(name))
            return self.call(name, open, self.path(name), "rb")
        return SourceFile(self.source(name), self.options, block_bytes=READ_BLOCK_BYTES)

    def list_names(self, folder: str = "", edges: Sequence[str] = ()) -> list[str]:
        """Names of the files directly in `folder`, sorted; none if it does not exist, and no half-written ones.

        Args:
            edges: names, ascending, that cut a long listing of an object store into ranges listed at the same time.
        """
        with storage_errors(self.source(folder), self.options):
            if self.is_local:
                try:
                    with os.scandir(self.path(folder)) as entries:
                        names = [entry.name for entry in entries if entry.is_file()]
                except FileNotFoundError:
                    return []
            elif self.scheme in S3_SCHEMES:
                prefix = f"{self.path(folder)}/"
                names = [key[len(prefix) :] for key in s3_keys(self.fs, prefix, edges, self.options)]
            else:
                try:
                    entries = self.call(folder, partial(self.fs.ls, detail=True, refresh=True), self.path(folder))
                except InputError as error:
                    if error.kind == ErrorKind.MISSING_OBJECT:
                        return []
                    raise
                names = [entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
        return sorted(name for name in names if name and not name.startswith(HIDDEN_PREFIX))

    def write_atomic(self, name: str, data: bytes | IO[bytes], exclusive: bool = False) -> bool:
        """Make `name` hold `data`, whole or not at all: no reader ever sees a part of it.

        Local: a temporary file in a hidden folder of the root, fsync, rename. Object store: one put request.

        Args:
            exclusive: only if `name` does not exist yet. Certain on local disk and on stores that honour If-None-Match
                (AWS); elsewhere two writers in the same instant both succeed and the last one stays: read it back.

        Returns:
            False if `exclusive` and the name already existed; else True.
        """
        with storage_errors(self.source(name), self.options):
            if self.is_local:
                return write_local(self.path(name), data, exclusive, self.path(TEMPORARY_FOLDER))
            body = data if isinstance(data, bytes) else data.read()
            if len(body) > SINGLE_PUT_LIMIT:
                raise OSError(errno.EFBIG, f"{len(body)} bytes are over the limit of one put request")
        if exclusive and self.exists(name):  # some servers ignore If-None-Match: rclone 1.75 overwrites
            return False
        return self.call(name, self._put, self.path(name), body, exclusive)

    def _put(self, path: str, body: bytes, exclusive: bool) -> bool:
        try:
            if self.scheme in S3_SCHEMES:
                # The chunk size decides between one put and a multipart upload: above half of the body, one put.
                mode = "create" if exclusive else "overwrite"
                self.fs.pipe_file(path, body, mode=mode, chunksize=max(50 * 2**20, len(body)))
            else:
                self.fs.pipe_file(path, body)
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Remove one file; no error if it is already gone."""
        try:
            self.call(name, self.fs.rm_file, self.path(name))
        except InputError as error:
            if error.kind != ErrorKind.MISSING_OBJECT:
                raise

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove files, on S3 many in one request; no error for those that are already gone."""
        if self.scheme in S3_SCHEMES:
            s3_delete(self.fs, [self.path(name) for name in names], self.options)
        else:
            for name in names:
                self.delete(name)

    def remove_dead_temporaries(self) -> int:
        """Remove what killed writers have left; returns how many files. Object stores keep nothing of a broken put."""
        if not self.is_local:
            return 0
        with storage_errors(self.source(TEMPORARY_FOLDER), self.options):
            return remove_dead_temporaries(self.path(TEMPORARY_FOLDER))
