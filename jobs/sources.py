"""Sources by their URL: fetched whole, opened seekable, or streamed; and the item that comes out of one.

Knows nothing of plans, of containers' insides, or of reading ahead.
"""

import io
from dataclasses import dataclass
from typing import IO

from jobs.guarded_http import fetch_http
from jobs.source_rules import HTTP_SCHEMES
from jobs.storage import DEFAULT_OPTIONS, StorageOptions, connect, read_object, scheme_of, storage_errors
from parakeet_core.errors import InputError

WHOLE_BYTES = 64 << 20  # 35 min of 16 kHz 16-bit; fetching more for a few segments costs more than seeking to them
SEEK_BLOCK_BYTES = 1 << 20  # 32 s of 16 kHz 16-bit: a segment is mostly one request
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


class SourceFile(io.RawIOBase):
    """A seekable file of an object store whose failures are `InputError`s.

    Decoders in C call `read` back and cannot pass a Python exception on: they see an end of file. So the first failure
    is kept in `error`; check it after decoding (`raise_error`) before believing that a file is truncated.
    """

    def __init__(
        self, source: str, options: StorageOptions, size_bytes: int | None = None, block_bytes: int = SEEK_BLOCK_BYTES
    ):
        self.source, self.options, self.size_bytes = source, options, size_bytes
        self.error: InputError | None = None
        with storage_errors(source, options):
            fs, path = connect(source, options)
            if scheme_of(source) == "file":
                self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed in `close`
            else:
                known = {"size": size_bytes} if size_bytes is not None else {}
                self._file = fs.open(path, "rb", block_size=block_bytes, cache_type="readahead", **known)

    def _guarded(self, call, *arguments):
        if self.error is None:
            try:
                with storage_errors(self.source, self.options):
                    return call(*arguments)
            except InputError as error:
                self.error = error
        raise self.error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._guarded(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._guarded(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def raise_error(self) -> None:
        """Raises the failure that a decoder may have seen as an end of file."""
        if self.error is not None:
            raise self.error


class SourceReader:
    """Opens and fetches sources of any storage by their URL. All methods raise `InputError`."""

    def __init__(self, options: StorageOptions = DEFAULT_OPTIONS):
        self.options = options

    def size(self, source: str) -> int:
        with storage_errors(source, self.options):
            fs, path = connect(source, self.options)
            return int(fs.info(path)["size"])

    def fetch(self, source: str) -> bytes:
        if scheme_of(source) in HTTP_SCHEMES:
            return fetch_http(source)
        with storage_errors(source, self.options):
            return read_object(*connect(source, self.options))

    def open(self, source: str, size_bytes: int | None = None) -> IO[bytes]:
        if scheme_of(source) in HTTP_SCHEMES:
            return io.BytesIO(fetch_http(source))
        return SourceFile(source, self.options, size_bytes)

    def fetch_or_open(self, source: str, size_bytes: int | None) -> "bytes | SourceFile":
        """The bytes of a source, or a seekable file if it is above `WHOLE_BYTES`."""
        if scheme_of(source) in HTTP_SCHEMES:
            return fetch_http(source)
        size = self.size(source) if size_bytes is None else size_bytes
        return SourceFile(source, self.options, size) if size > WHOLE_BYTES else self.fetch(source)

    def stream(self, source: str) -> SourceFile:
        """A file to read from front to back."""
        return SourceFile(source, self.options, block_bytes=STREAM_BLOCK_BYTES)
