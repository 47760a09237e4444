"""Decoding in a separate process: a source that crashes or hangs its decoder, or exhausts the memory, harms no other.

    IsolatedDecoder <-> audio_child.py (one process, until a source ends it) -> load_audio

The results are those of `load_audio`, bit for bit; a source costs 0.3-0.6 ms more. Knows nothing of Ray or of where the
bytes are stored.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO

import numpy as np

from parakeet_core.audio import DEFAULT_MAX_DURATION_S, Audio, AudioInfo
from parakeet_core.audio_child import EXIT_MEMORY, receive_block, receive_header, send_message
from parakeet_core.errors import ErrorKind, InputError, WorkerError

# The budget of one source. It is generous, because a good source that exceeds it, on a machine that stalls for a while,
# would become an error row.
MEMORY_BYTES = 4 << 30  # besides the encoded bytes: 12 h of float32 at 16 kHz are 2.8 GB, in an array that grows by 1/4
LEAST_LIMIT_S = 10.0  # a usual source takes 10 ms; the rest is for a machine that swaps, or is moved by its host
BYTES_PER_S = 20_000  # beyond it, one second for every so many encoded bytes: Opus of 6 kbit/s at 27 times real time
MOST_LIMIT_S = 900.0  # 12 h, the longest source, at 48 times real time
READY_S = 300.0  # to start Python and numpy: 0.2 s, and far more when many actors start from a network disk
END_S = 5.0  # for the system to clean up a process that has ended or was killed


def decoding_limit_s(size_bytes: int) -> float:
    """Seconds that decoding so many encoded bytes may take, not counting the wait for them."""
    return min(LEAST_LIMIT_S + size_bytes / BYTES_PER_S, MOST_LIMIT_S)


class _ProcessEndedError(Exception):
    """The process ended, or had to be ended, before it answered; the message says how."""


class IsolatedDecoder:
    """`load_audio` and `probe_audio` in another process, which is started again when a source has ended it.

    May be called by several threads; one source is decoded at a time.

    Args:
        memory_bytes: that decoding one source may take besides its encoded bytes.
        time_limit_s: for one source, not counting the time its storage takes; by default it follows from the size.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES, time_limit_s: float | None = None):
        self.memory_bytes, self.time_limit_s = memory_bytes, time_limit_s
        self._turn = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._start()

    def load(
        self,
        source: bytes | BinaryIO,
        sample_rate_hz: int = 16000,
        offset_s: float = 0.0,
        duration_s: float | None = None,
        channel: str | int = "mix",
        max_duration_s: float | None = DEFAULT_MAX_DURATION_S,
    ) -> Audio:
        """As `load_audio`, for encoded bytes or a seekable binary file object, which is read in this process.

        Raises:
            InputError: as `load_audio`, and DECODER_CRASH.
            WorkerError: the other process cannot be started.
            RuntimeError: an exception in that process that is a defect; the message names it.
            OSError, InputError: what the file object raises.
        """
        arguments = {"sample_rate_hz": sample_rate_hz, "offset_s": offset_s, "duration_s": duration_s}
        arguments |= {"channel": channel, "max_duration_s": max_duration_s}
        found, waveform = self._ask("load", arguments, source)
        return Audio(waveform, AudioInfo(**found["info"]), found["duration_s"])

    def probe(self, source: bytes | BinaryIO) -> AudioInfo:
        """As `probe_audio`. Raises as `load`."""
        return AudioInfo(**self._ask("probe", {}, source)[0])

    def wait_until_ready(self) -> None:
        """Wait until the process has started; `load` and `probe` do so too.

        Raises:
            WorkerError: it cannot be started.
        """
        if self._process is None:
            self._start()
        if self._ready:
            return
        try:
            self._connection.settimeout(READY_S)
            receive_header(self._connection)
        except (EOFError, OSError) as error:  # a timeout is an OSError
            found = self._how_it_ended()
            self.close()
            raise WorkerError(f"the process for decoding did not start: it {found}; see the worker's log") from error
        self._ready = True

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "IsolatedDecoder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # The packages of this process, however it found them, and no credentials. One thread: what numpy reserves for
        # more would count as the decoder's memory.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "parakeet_core.audio_child"]
        command += [str(theirs.fileno()), str(self.memory_bytes)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
            except OSError as error:
                ours.close()
                raise WorkerError(f"the process for decoding cannot be started: {error}") from error
        self._connection, self._ready, self._used = ours, False, False

    def _ask(self, call: str, arguments: dict, source: bytes | BinaryIO) -> tuple[dict, np.ndarray]:
        """The answer to one request: its facts, and samples [S] float32."""
        in_memory = isinstance(source, bytes | bytearray | memoryview)
        size_bytes = len(source) if in_memory else source.seek(0, io.SEEK_END)
        limit_s = self.time_limit_s or decoding_limit_s(size_bytes)
        request = {"call": call, "arguments": arguments, "limit_s": limit_s}
        request["size_bytes"] = None if in_memory else size_bytes
        with self._turn:
            while True:
                self.wait_until_ready()
                first_of_process, self._used = not self._used, True
                try:
                    return self._exchange(request, source)
                except _ProcessEndedError as error:
                    # An earlier source may have damaged the process: a source is blamed only if it ends a new one.
                    if first_of_process:
                        advice = "nothing else is affected; convert it to flac with other software, or remove it"
                        raise InputError(ErrorKind.DECODER_CRASH, f"the decoder {error}; {advice}") from error

    def _exchange(self, request: dict, source: bytes | BinaryIO) -> tuple[dict, np.ndarray]:
        failure = None
        deadline = time.monotonic() + request["limit_s"]
        answered = False
        try:
            self._connection.settimeout(request["limit_s"])
            send_message(self._connection, request, source if request["size_bytes"] is None else b"")
            while True:
                self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
                answer, block_bytes = receive_header(self._connection)
                if "read" not in answer:
                    break
                started = time.monotonic()
                piece, failure = (b"", failure) if failure else _read(source, *answer["read"])
                deadline += time.monotonic() - started
                send_message(self._connection, {}, piece)
            samples = receive_block(self._connection, np.empty(block_bytes // 4, np.float32))
            answered = True
        except TimeoutError as error:
            raise _ProcessEndedError(f"ran longer than {request['limit_s']:.0f} s") from error
        except (EOFError, ConnectionError) as error:
            raise _ProcessEndedError(self._how_it_ended()) from error
        finally:
            if not answered:  # also on an interrupt: the next request would receive the answer to this one
                self.close()
        if failure is not None:
            raise failure
        return _result(answer), samples

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if status == EXIT_MEMORY:
            return f"needed more than {self.memory_bytes / 2**30:.3g} GiB of memory"
        return f"crashed with signal {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _read(source: BinaryIO, offset: int, count: int) -> tuple[bytes, BaseException | None]:
    """Up to `count` bytes at `offset`, fewer only at the end; or none, and what the file object raised."""
    try:
        source.seek(offset)
        pieces = []
        while count > 0 and (piece := source.read(count)):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces), None
    except Exception as error:  # noqa: BLE001 - cannot pass the C code that asks; raised once it has answered
        return b"", error


def _result(answer: dict) -> dict:
    if "error" in answer:
        raise InputError(*answer["error"])
    if "defect" in answer:
        raise RuntimeError(answer["defect"])
    return answer["result"]
