"""The rows of one shard -> its items with their bytes, in a fixed order, fetched a little ahead of the consumer.

Whatever breaks, there is exactly one `ReadItem` per item: with bytes, with a seekable file, or with the error that
becomes its row. Knows nothing of decoding, of Ray, or of how shards were cut.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from jobs.reading_containers import read_container
from jobs.sources import ReadItem, SourceFile, SourceReader
from jobs.storage import DEFAULT_OPTIONS, StorageOptions
from parakeet_core.errors import ConfigError, ErrorKind, InputError

UNKNOWN_BYTES = 4 << 20  # what a source of unknown size is counted as, until it is here


@dataclass(frozen=True)
class ReadLimits:
    """How far reading may run ahead.

    Args:
        threads: requests at a time; a request to an object store waits 20-100 ms, so 8 keep a CPU actor busy.
        bytes_ahead: bytes fetched and not yet consumed. One source above it is still read, alone.
    """

    threads: int = 8
    bytes_ahead: int = 256 << 20


def read_items(
    rows: pa.Table, options: StorageOptions = DEFAULT_OPTIONS, limits: ReadLimits = ReadLimits()
) -> Iterator[ReadItem]:
    """All items of a shard, grouped by source, in the order of the rows. Each source is fetched once.

    Args:
        rows: of `PLAN_SCHEMA`, as `plan_store.read_shard` gives them.
    """
    reader = SourceReader(options)
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for index, row in enumerate(rows.to_pylist()):
        alone = index if row["layout"] != "file" or row["error_kind"] else -1
        groups.setdefault((row["source"], row["layout"], alone), []).append(row)
    with ThreadPoolExecutor(limits.threads, thread_name_prefix="fetch") as pool:
        try:
            for group, payload in _fetch_ahead(list(groups.values()), reader, pool, limits):
                if payload is None:
                    yield from read_container(group[0], reader)
                else:
                    yield from _file_items(group, payload, reader)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch_ahead(
    groups: list[list[dict]], reader: SourceReader, pool: ThreadPoolExecutor, limits: ReadLimits
) -> Iterator[tuple[list[dict], "bytes | SourceFile | InputError | None"]]:
    """(rows of one source, its payload) in order; None for containers, which are streamed by the consumer."""
    waiting: deque[tuple[list[dict], Future | None, int]] = deque()
    ahead_bytes, position = 0, 0
    while position < len(groups) or waiting:
        while position < len(groups) and len(waiting) < 4 * limits.threads:
            group = groups[position]
            direct = group[0]["layout"] != "file" or group[0]["error_kind"]
            cost = 0 if direct else group[0]["size_bytes"] or UNKNOWN_BYTES
            if waiting and ahead_bytes + cost > limits.bytes_ahead:
                break
            future = None if direct else pool.submit(_fetch, reader, group[0])
            waiting.append((group, future, cost))
            ahead_bytes += cost
            position += 1
        group, future, cost = waiting.popleft()
        if future is not None:
            yield group, future.result()
        elif group[0]["error_kind"]:
            yield group, InputError(ErrorKind(group[0]["error_kind"]), group[0]["error_message"] or "")
        else:
            yield group, None
        ahead_bytes -= cost


def _fetch(reader: SourceReader, row: dict) -> "bytes | SourceFile | InputError":
    try:
        return reader.fetch_or_open(row["source"], row["size_bytes"])
    except InputError as error:
        return error
    except ConfigError as error:  # a scheme without its package: on this machine the item cannot be had
        return InputError(ErrorKind.BAD_RECORD, str(error))


def _file_items(
    group: list[dict], payload: "bytes | SourceFile | InputError", reader: SourceReader
) -> Iterator[ReadItem]:
    for index, row in enumerate(group):
        if index and isinstance(payload, SourceFile):  # each item its own position in the file
            try:
                payload = SourceFile(row["source"], reader.options, payload.size_bytes)
            except InputError as error:
                payload = error
        columns = ("id", "source", "member", "offset_s", "duration_s", "channel", "reference", "extra")
        yield ReadItem(payload=payload, **{name: row[name] for name in columns})


__all__ = ["ReadItem", "ReadLimits", "SourceFile", "read_items"]
