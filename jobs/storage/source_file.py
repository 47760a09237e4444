"""A seekable file of any storage, read in blocks, each of which is tried again and whose failures are `InputError`s."""

import io
from functools import partial

from jobs.storage.connections import OWN_ERRORS, StorageOptions, connect, scheme_of, storage_call
from jobs.storage.local_files import check_regular
from parakeet_core.errors import CredentialsError, InputError

SEEK_BLOCK_BYTES = 1 << 20  # 32 s of 16 kHz 16-bit: most segments take one request


class SourceFile(io.RawIOBase):
    """An open file. A read that failed leaves the position where it was, so that it can be tried again.

    Decoders in C that call `read` cannot pass a Python exception on: they see an end of file. So the first failure
    is kept in `error`; check it after decoding (`raise_error`) before believing that a file is truncated.
    """

    def __init__(
        self, source: str, options: StorageOptions, size_bytes: int | None = None, block_bytes: int = SEEK_BLOCK_BYTES
    ):
        self.source, self.options, self.size_bytes = source, options, size_bytes
        self.error: InputError | CredentialsError | None = None
        fs, path = connect(source, options)
        if scheme_of(source) == "file":
            storage_call(partial(check_regular, path), source, options)
            opening = partial(open, path, "rb", buffering=0)
        else:
            known = {"size": size_bytes} if size_bytes is not None else {}
            opening = partial(fs.open, path, "rb", block_size=block_bytes, cache_type="readahead", **known)
        self._file = storage_call(opening, source, options)

    def _guarded(self, call, *arguments):
        if self.error is None:
            try:
                return storage_call(partial(call, *arguments), self.source, self.options)
            except OWN_ERRORS as error:
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
        """Raise the failure that a decoder may have seen as an end of file."""
        if self.error is not None:
            raise self.error
