"""Sources by their URL: fetched whole, opened seekable, or streamed; and the item that comes out of one.

Knows nothing of plans, of containers' insides, or of reading ahead.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO

from jobs.sources.guarded_http import fetch_http
from jobs.sources.rules import HTTP_SCHEMES
from jobs.storage.connections import (
    DEFAULT_OPTIONS,
    StorageOptions,
    connect,
    read_object,
    scheme_of,
    scrub,
    storage_call,
)
from jobs.storage.local_files import check_regular
from jobs.storage.source_file import SourceFile
from parakeet_core.errors import ConfigError, ErrorKind, InputError

WHOLE_BYTES = 64 << 20  # 35 min of 16 kHz 16-bit; fetching more for a few segments costs more than seeking to them
STREAM_BLOCK_BYTES = 8 << 20  # tars are read front to back: few requests, and one block in memory


@dataclass
class ReadItem:
    """One item as it comes from storage. `payload` is bytes, a `SourceFile` for large sources, or the item's error."""

    id: str
    source: str
    payload: "bytes | SourceFile | InputError"
    member: str | None = None
    offset_s: float | None = None
    duration_s: float | None = None
    channel: int | None = None
    reference: str | None = None
    extra: str | None = None


class SourceReader:
    """Opens and fetches sources of any storage by their URL. All methods raise `InputError` and `CredentialsError`."""

    def __init__(self, options: StorageOptions = DEFAULT_OPTIONS):
        self.options = options

    def size(self, source: str) -> int:
        with _item_errors(source):
            fs, path = connect(source, self.options)
            return int(storage_call(partial(fs.info, path), source, self.options)["size"])

    def fetch(self, source: str) -> bytes:
        if scheme_of(source) in HTTP_SCHEMES:
            return self._fetch_http(source)
        with _item_errors(source):
            fs, path = connect(source, self.options)
            if scheme_of(source) == "file":
                storage_call(partial(check_regular, path), source, self.options)
            return storage_call(partial(read_object, fs, path), source, self.options)

    def _fetch_http(self, source: str) -> bytes:
        return fetch_http(self.options.signed_urls.get(source, source), self.options.patience_s)

    def open(self, source: str, size_bytes: int | None = None) -> IO[bytes]:
        if scheme_of(source) in HTTP_SCHEMES:
            return io.BytesIO(self._fetch_http(source))
        with _item_errors(source):
            return SourceFile(source, self.options, size_bytes)

    def fetch_or_open(self, source: str, size_bytes: int | None) -> "bytes | SourceFile":
        """The bytes of a source, or a seekable file if it is above `WHOLE_BYTES`."""
        if scheme_of(source) in HTTP_SCHEMES:
            return self._fetch_http(source)
        size = self.size(source) if size_bytes is None else size_bytes
        return self.open(source, size) if size > WHOLE_BYTES else self.fetch(source)

    def stream(self, source: str) -> SourceFile:
        """A file to read from front to back."""
        with _item_errors(source):
            return SourceFile(source, self.options, block_bytes=STREAM_BLOCK_BYTES)


@contextmanager
def _item_errors(source: str) -> Iterator[None]:
    """Turn errors in the source's name, as opposed to its storage, into the item's error."""
    try:
        yield
    except ConfigError as error:  # the scheme's package is missing: the item cannot be read on this machine
        raise InputError(ErrorKind.STORAGE, str(error)) from error
    except ValueError as error:  # from s3fs, for a URL that names a bucket but no object
        message = (
            f"{scrub(source)[:200]!r} does not name an object ({scrub(str(error))[:200]}); expected s3://bucket/key"
        )
        raise InputError(ErrorKind.BAD_RECORD, message) from error


__all__ = ["ReadItem", "SourceFile", "SourceReader"]
