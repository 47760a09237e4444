"""Decoding the items of a shard so that an item that ends its process costs one row, not the job.

    first try of a shard    in the worker: at full speed, under limits of time and memory that end the worker
    after a worker is lost  in a process beside it (`IsolatedDecoder`): an item that ends that one gets its error row

So a usual shard pays four system calls per item, 7 us with the code around them. A shard whose worker was lost, to an
item or with its node, is tried again a little slower and gives the same rows. Ray knows which shards those are: it
starts the actor again and first gives it the calls that were lost with it. Nothing has to be written down.
"""

import functools
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.sources.reader import SourceFile
from parakeet_core.audio import Audio, load_audio
from parakeet_core.audio_isolated import MEMORY_BYTES, IsolatedDecoder, decoding_limit_s
from parakeet_core.errors import ErrorKind, InputError


@functools.cache
def was_restarted() -> bool:
    """Whether this process is a Ray actor that took the place of a lost one."""
    import ray  # only here: the rest also works where Ray is not installed

    context = ray.get_runtime_context() if ray.is_initialized() else None
    return context is not None and context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


class ShardDecoder:
    """`load_audio` for the items of one shard after another.

    Args:
        careful_shards: how many of the next shards are decoded in a separate process.
    """

    def __init__(self, careful_shards: int = 0):
        self.careful_shards = careful_shards
        self._isolated: IsolatedDecoder | None = None
        self._most_data_bytes = resource.RLIM_INFINITY

    @contextmanager
    def shard(self) -> Iterator[None]:
        """The context in which the items of one shard are read and decoded.

        Raises:
            WorkerError: the separate process cannot be started.
        """
        self._most_data_bytes = _data_bytes() + MEMORY_BYTES
        if self.careful_shards > 0:
            self.careful_shards -= 1
            self._isolated = IsolatedDecoder()
        try:
            if self._isolated is not None:
                self._isolated.wait_until_ready()
            yield
        except MemoryError:  # in a reading thread, while a decoder took all that the limit allows
            os.kill(os.getpid(), signal.SIGKILL)  # a lost worker: Ray tries the shard again
        finally:
            if self._isolated is not None:
                self._isolated.close()
                self._isolated = None

    def load(self, payload: bytes | SourceFile, *arguments, **options) -> Audio:
        """As `load_audio`.

        Raises:
            InputError: as `load_audio`, and DECODER_CRASH.
            WorkerError: the separate process cannot be started.
        """
        if self._isolated is None:
            size_bytes = len(payload) if isinstance(payload, bytes) else payload.size_bytes
            try:
                with _limits(decoding_limit_s(size_bytes or 0), self._most_data_bytes):
                    return load_audio(payload, *arguments, **options)
            except MemoryError:  # this process's limit says nothing about the item alone
                self._isolated = IsolatedDecoder()
        try:
            return self._isolated.load(payload, *arguments, **options)
        except InputError as error:
            if error.kind is ErrorKind.DECODER_CRASH:  # one such item is seldom alone, and each other would cost a
                self.careful_shards = math.inf  # worker, which takes longer to start than careful decoding ever costs
            raise


@contextmanager
def _limits(time_s: float, data_bytes: int) -> Iterator[None]:
    """End this process, whatever it is doing, after `time_s`; refuse it more than `data_bytes` of private memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed_bytes = min([data_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (allowed_bytes, hard))
    signal.setitimer(signal.ITIMER_REAL, time_s)  # a thread of faulthandler would take 2 ms to start and to stop
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it: shared memory, such as Ray's store, is not."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
