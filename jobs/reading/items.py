"""The rows of one shard -> its items with their bytes, in a fixed order, fetched a little ahead of the consumer.

Whatever breaks, there is exactly one `ReadItem` per item: with bytes, with a seekable file, or with the error that
becomes its row. Knows nothing of decoding, of Ray, or of how shards were cut.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from jobs.reading.containers import read_container
from jobs.sources.reader import ReadItem, SourceFile, SourceReader
from jobs.storage.connections import DEFAULT_OPTIONS, StorageOptions
from parakeet_core.errors import ErrorKind, InputError

UNKNOWN_BYTES = 4 << 20  # what a source of unknown size counts as until it has arrived


@dataclass(frozen=True)
class ReadLimits:
    """How far reading may run ahead.

    Args:
        threads: requests at a time; a request to an object store waits 20-100 ms, so 8 keep a CPU actor busy.
        bytes_ahead: bytes fetched and not yet consumed. A single source above it is still read, alone. Sources of
            unknown size can exceed it by the size of `threads` of them: their length is known only on arrival.
    """

    threads: int = 8
    bytes_ahead: int = 256 << 20


def read_items(
    rows: pa.Table, options: StorageOptions = DEFAULT_OPTIONS, limits: ReadLimits = ReadLimits()
) -> Iterator[ReadItem]:
    """All items of a shard, in the order of the rows but grouped by source. Each source is fetched once.

    Args:
        rows: of `PLAN_SCHEMA`, as `jobs.planning.store.read_shard` gives them.
    """
    reader = SourceReader(options)
    files: dict[str, list[dict]] = {}
    containers = []
    for index, row in enumerate(rows.to_pylist()):
        if row["error_kind"]:
            files[f"rejected {index}"] = [row]
        elif row["layout"] == "file":
            files.setdefault(row["source"], []).append(row)
        else:
            containers.append(row)
    for group, payload in _fetch_ahead(list(files.values()), reader, limits):
        yield from _file_items(group, payload, reader)
    if containers:
        streamed = (item for row in containers for item in read_container(row, reader))
        yield from _stream_ahead(streamed, limits.bytes_ahead)


def _fetch_ahead(
    groups: list[list[dict]], reader: SourceReader, limits: ReadLimits
) -> Iterator[tuple[list[dict], "bytes | SourceFile | InputError"]]:
    """(rows of one source, its payload), in order, with requests running ahead of the consumer."""
    waiting: deque[tuple[list[dict], Future]] = deque()
    position = 0
    pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="fetch")
    try:
        while position < len(groups) or waiting:
            while position < len(groups) and len(waiting) < 4 * limits.threads:
                group = groups[position]
                if waiting and not _may_fetch(group[0], waiting, limits):
                    break
                waiting.append((group, pool.submit(_fetch, reader, group[0])))
                position += 1
            group, future = waiting.popleft()
            yield group, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _may_fetch(row: dict, waiting: Iterable[tuple[list[dict], Future]], limits: ReadLimits) -> bool:
    """Whether one more fetch stays within the limits. Arrived sources count by real length, others as announced."""
    ahead_bytes, unknown = 0, 0
    for size_bytes, future in [(row["size_bytes"], None), *((group[0]["size_bytes"], f) for group, f in waiting)]:
        if future is not None and future.done():
            payload = future.result()
            ahead_bytes += len(payload) if isinstance(payload, bytes) else 0
        else:
            ahead_bytes += UNKNOWN_BYTES if size_bytes is None else size_bytes
            unknown += size_bytes is None
    return ahead_bytes <= limits.bytes_ahead and unknown <= limits.threads


def _fetch(reader: SourceReader, row: dict) -> "bytes | SourceFile | InputError":
    if row["error_kind"]:
        return InputError(ErrorKind(row["error_kind"]), row["error_message"] or "")
    try:
        return reader.fetch_or_open(row["source"], row["size_bytes"])
    except InputError as error:
        return error


def _stream_ahead(items: Iterator[ReadItem], limit_bytes: int) -> Iterator[ReadItem]:
    """The same items, read by a thread that pauses while `limit_bytes` of them wait to be consumed."""
    waiting: deque[tuple[ReadItem, int]] = deque()
    changed = threading.Condition()
    ahead_bytes, stopped = 0, False

    def may_go_on() -> bool:
        return stopped or not waiting or ahead_bytes < limit_bytes

    def fill() -> None:
        nonlocal ahead_bytes
        with contextlib.closing(items):
            for item in items:
                cost = len(item.payload) if isinstance(item.payload, bytes) else 0
                with changed:
                    changed.wait_for(may_go_on)
                    if stopped:
                        return
                    waiting.append((item, cost))
                    ahead_bytes += cost
                    changed.notify_all()

    def wake(_: Future) -> None:
        with changed:
            changed.notify_all()

    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
        filling = pool.submit(fill)
        filling.add_done_callback(wake)
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: waiting or filling.done())
                    if not waiting:
                        break
                    item, cost = waiting.popleft()
                    ahead_bytes -= cost
                    changed.notify_all()
                yield item
            filling.result()  # what is not an item's error is a defect, and is raised here
        finally:
            with changed:
                stopped = True
                changed.notify_all()


def _file_items(
    group: list[dict], payload: "bytes | SourceFile | InputError", reader: SourceReader
) -> Iterator[ReadItem]:
    for index, row in enumerate(group):
        if index and isinstance(payload, SourceFile):  # each item needs its own position in the file
            try:
                payload = SourceFile(row["source"], reader.options, payload.size_bytes)
            except InputError as error:
                payload = error
        columns = ("id", "source", "member", "offset_s", "duration_s", "channel", "reference", "extra")
        yield ReadItem(payload=payload, **{name: row[name] for name in columns})


__all__ = ["ReadItem", "ReadLimits", "SourceFile", "read_items"]
