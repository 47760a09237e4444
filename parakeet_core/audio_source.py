"""Bytes, a path or a file object as one seekable source that decoders written in C can read.

Knows nothing of audio formats or of where the bytes are stored.
"""

import io
import os
from typing import BinaryIO

from parakeet_core.errors import ErrorKind, InputError

FIND_BYTES = 1 << 20  # searched at a time in a file


class Source(io.RawIOBase):
    """A whole source, from its first byte to its last, whatever the position of the file object given.

    Reads are complete (a decoder takes a short read for the end). An error of the storage underneath is kept and raised
    on leaving the `with` block: a C decoder would swallow it, and the item would be called truncated, for good.

    Args:
        source: bytes, bytearray or memoryview; a path; or a seekable binary file object, which stays open.
    """

    def __init__(self, source: bytes | bytearray | memoryview | str | os.PathLike | BinaryIO):
        super().__init__()
        self._owned = True
        self._data: bytes | None = None
        self._error: BaseException | None = None
        self._head, self._skip, self._position = b"", 0, 0
        self._name = ""
        if isinstance(source, bytes | bytearray | memoryview):
            self._data = source if isinstance(source, bytes) else bytes(source)
            self._file = io.BytesIO(self._data)  # shares the memory
        elif isinstance(source, str | os.PathLike):
            self._file = open(source, "rb")  # noqa: SIM115  closed by close()
            self._name = f"{os.fspath(source)}: "
        elif all(hasattr(source, method) for method in ("read", "seek", "tell")):
            self._file, self._owned = source, False
        else:
            raise TypeError(
                f"source is {type(source).__name__}, expected bytes, a path or a seekable binary file object"
            )
        self._file.seek(0, io.SEEK_END)
        self._file_size = self._file.tell()

    @property
    def size(self) -> int:
        """Bytes of the source, including a replaced head."""
        return len(self._head) + self._file_size - self._skip

    @property
    def handle(self) -> BinaryIO:
        """The object for a decoder: the plain BytesIO if it will do, as its reads cost no Python call."""
        self.seek(0)
        if self._data is not None and not self._head and not self._skip:
            self._file.seek(0)
            return self._file
        return self

    def peek(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes at `offset`, fewer only at the end."""
        if self._data is not None and not self._head and not self._skip:
            return self._data[offset : offset + count]
        if offset >= self.size:
            return b""
        self._position = offset
        buffer = bytearray(min(count, self.size - offset))
        return bytes(buffer[: self._fill(memoryview(buffer))])

    def find(self, pattern: bytes, start: int) -> int:
        """Return where `pattern` is, from `start` on; -1 if nowhere, and for any file object, as it may be far away."""
        if self._data is not None and not self._head and not self._skip:
            return self._data.find(pattern, start)
        while self._owned and start < self.size:
            window = self.peek(start, FIND_BYTES)
            if (at := window.find(pattern)) >= 0:
                return start + at
            start += max(1, len(window) - len(pattern) + 1)
        return -1

    def replace_head(self, head: bytes, count: int) -> None:
        """Make the source begin with `head` in place of its first `count` bytes."""
        self._head, self._skip = head, count

    def fail(self, kind: ErrorKind, message: str) -> InputError:
        """Build the error of this item, with the path in front if there is one."""
        return InputError(kind, self._name + message)

    def _fill(self, view: memoryview) -> int:
        done = 0
        if self._position < len(self._head):
            part = self._head[self._position : self._position + len(view)]
            view[: len(part)] = part
            done = len(part)
        if done < len(view):
            self._file.seek(self._position + done - len(self._head) + self._skip)
        while done < len(view):
            part = self._file.read(len(view) - done)
            if not part:
                break
            if not isinstance(part, bytes | bytearray | memoryview):
                raise TypeError(f"the file object gave {type(part).__name__}, expected bytes: open it in binary mode")
            view[done : done + len(part)] = part
            done += len(part)
        self._position += done
        return done

    def readinto(self, buffer) -> int:
        """Fill `buffer`; a storage error is kept, and read as if the source ended there."""
        if self._error is not None:
            return 0
        try:
            return self._fill(memoryview(buffer).cast("B"))
        except BaseException as error:  # noqa: BLE001  cannot pass the C code above; raised by __exit__
            self._error = error
            return 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._owned and not self.closed:
            self._file.close()
        super().close()

    def __exit__(self, kind, error, traceback) -> None:
        self.close()
        if self._error is not None:
            raise self._error from error
