"""The process behind `IsolatedDecoder`: decodes what it is sent over a socket, one source at a time, under limits.

It opens no file and needs no credentials: the bytes come with the request, or are requested piece by piece. Messages
are a JSON object and a block of bytes, never pickle: whoever takes over this process with a damaged file gains nothing.

    <- {ready: true}, once
    -> {call, arguments, limit_s, size_bytes} + encoded bytes, or no bytes and the size of a file to read
    <- {read: [offset, count]}     -> {} + bytes, fewer only at the end
    <- {result: ...} + waveform, float32   or {error: [kind, message]}, or {defect: text}
"""

import dataclasses
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

import numpy as np

from parakeet_core.audio import load_audio, probe_audio
from parakeet_core.errors import InputError

PREFIX = struct.Struct("<IQ")  # bytes of JSON, bytes of the block
EXIT_MEMORY = 77  # exit status after a refused allocation; not a signal's, and none of Python's own
READ_BYTES = 256 << 10  # requested at a time: 100 us of exchange for 8 s of 16-bit audio at 16 kHz
ORPHAN_GRACE_S = 10  # the parent ends a process that hangs; this ends one whose parent was killed before it could


def send_message(connection: socket.socket, header: dict, block: bytes | memoryview = b"") -> None:
    """Send a JSON object and a block of bytes."""
    text = json.dumps(header).encode()
    connection.sendall(PREFIX.pack(len(text), len(block)) + text)
    if len(block):
        connection.sendall(block)


def receive_header(connection: socket.socket) -> tuple[dict, int]:
    """The JSON object of a message, and the bytes of its block, which are still to be received.

    Raises:
        EOFError: the other side is gone.
    """
    text_bytes, block_bytes = PREFIX.unpack(receive_block(connection, bytearray(PREFIX.size)))
    return json.loads(receive_block(connection, bytearray(text_bytes))), block_bytes


def receive_block(connection: socket.socket, buffer: bytearray | np.ndarray) -> bytearray | np.ndarray:
    """Fill `buffer`, and return it.

    Raises:
        EOFError: the other side is gone.
    """
    view = memoryview(buffer).cast("B")
    while len(view):
        received = connection.recv_into(view)
        if not received:
            raise EOFError("the other process has ended")
        view = view[received:]
    return buffer


class _AskedFile(io.RawIOBase):
    """A seekable file whose bytes the other process reads."""

    def __init__(self, connection: socket.socket, size_bytes: int, limit_s: float):
        self._connection, self._size, self._limit_s, self._position = connection, size_bytes, limit_s, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        signal.alarm(0)  # waiting for storage is not decoding
        send_message(self._connection, {"read": [self._position, len(buffer)]})
        _, count = receive_header(self._connection)
        receive_block(self._connection, memoryview(buffer)[:count])
        self._position += count
        _set_alarm(self._limit_s)
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position


def _set_alarm(limit_s: float) -> None:
    signal.alarm(int(limit_s) + ORPHAN_GRACE_S)  # the signal's default action ends the process, whatever it is doing


def _serve(connection: socket.socket, memory_bytes: int) -> None:
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    while True:
        request, block_bytes = receive_header(connection)
        allowed_bytes = used_bytes + memory_bytes + 2 * block_bytes  # as received, and as the decoder holds it
        if most_bytes != resource.RLIM_INFINITY:
            allowed_bytes = min(allowed_bytes, most_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (allowed_bytes, most_bytes))
        _set_alarm(request["limit_s"])
        if request["size_bytes"] is None:
            source = receive_block(connection, bytearray(block_bytes))
        else:
            asked = _AskedFile(connection, request["size_bytes"], request["limit_s"])
            source = io.BufferedReader(asked, READ_BYTES)
        answer, block = _answer(request, source)
        signal.alarm(0)
        send_message(connection, answer, block)


def _answer(request: dict, source: bytearray | io.BufferedReader) -> tuple[dict, bytes | memoryview]:
    try:
        if request["call"] == "probe":
            return {"result": dataclasses.asdict(probe_audio(source))}, b""
        audio = load_audio(source, **request["arguments"])
        result = {"info": dataclasses.asdict(audio.info), "duration_s": audio.duration_s}
        return {"result": result}, memoryview(audio.waveform).cast("B") if len(audio.waveform) else b""
    except InputError as error:
        return {"error": [error.kind, error.message]}, b""
    except MemoryError:
        os._exit(EXIT_MEMORY)  # what else the refused allocation broke is not known
    except Exception as error:  # noqa: BLE001 - reported to the other process, which decides what a defect means
        return {"defect": f"{type(error).__name__}: {error}"}, b""


def main() -> None:
    """Serve until the other side of the socket, whose number is the first argument, is closed."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps of gigabytes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job, which closes the socket
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    try:
        send_message(connection, {"ready": True})
        _serve(connection, int(sys.argv[2]))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main()
