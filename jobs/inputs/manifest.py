"""NeMo JSONL manifests -> plan rows: one item per line, and one rejected row per line that does not describe an item.

A line: `{"audio_filepath": "a.wav", "offset": 1.5, "duration": 3.2, "text": "...", "channel": 0, "id": "...", ...}`.
`audio_filepath` is relative to the manifest's folder, absolute, or a URL. With `offset` (0 included) the item is a
segment; `duration` alone is the length of the whole file, as NeMo's dataset scripts write it, and only sizes shards.
Other keys are carried through as JSON. Signatures in URLs are not: they are used to open the audio, and not stored.

Source: https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html
"""

import codecs
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from jobs.inputs.plan_rows import PLAN_SCHEMA, plan_batch
from jobs.sources.rules import SourceRules
from jobs.storage.connections import storage_errors
from jobs.storage.files import Storage
from jobs.storage.redaction import mask_signatures, redact_text, redact_url
from parakeet_core.errors import ConfigError, ErrorKind, InputError

MAX_LINE_BYTES = 1 << 20  # a line describes one utterance; a megabyte is already a thousand times the usual size
BATCH_LINES = 16_384
BATCH_BYTES = 64 << 20  # of lines; long ones would fill the memory, and an Arrow string column ends at 2 GiB
MAX_CHANNEL = 1024  # far above any recorder; keeps the value inside the table's int32
_OWN_KEYS = frozenset({"audio_filepath", "offset", "duration", "text", "channel", "id"})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # NaN and Infinity would end up in `extra`


def manifest_rows(
    storage: Storage, listing: Iterator[pa.RecordBatch], rules: SourceRules, signed_urls: dict[str, str]
) -> Iterator[pa.RecordBatch]:
    """Plan rows of all listed manifests, in the order of their names and lines.

    Args:
        signed_urls: receives the full URL of each source that is redacted in its row (`StorageOptions`).
    """
    names = sorted(name for batch in listing for name in batch["name"].to_pylist())  # manifests are few, lines are many
    rows: list[dict] = []
    size_bytes = 0
    for name in names:
        folder = storage.source(name).rpartition("/")[0]
        for number, line in _numbered_lines(storage, name):
            row = _row_of(line, name, number, storage.source(name), folder, rules, signed_urls)
            if row is not None:
                rows.append(row)
                size_bytes += len(line) if isinstance(line, bytes) else 0
            if len(rows) == BATCH_LINES or size_bytes >= BATCH_BYTES:
                yield _batch(rows)
                rows, size_bytes = [], 0
    if rows:
        yield _batch(rows)


def _batch(rows: list[dict]) -> pa.RecordBatch:
    columns = [name for name in PLAN_SCHEMA.names if name != "layout"]
    return plan_batch("file", {name: [row.get(name) for row in rows] for name in columns})


def _numbered_lines(storage: Storage, name: str) -> Iterator[tuple[int, bytes | InputError]]:
    """The lines of one manifest, numbered from 1; where a gzip stream breaks, one last error stands for the rest."""
    number = 0
    try:
        with storage_errors(storage.source(name), storage.options), storage.open(name) as raw:
            buffered = io.BufferedReader(raw, 1 << 20)  # fsspec's own readline searches a block again for every line
            file = gzip.GzipFile(fileobj=buffered) if name.lower().endswith(".gz") else buffered
            try:
                for line in _bounded_lines(file):
                    number += 1
                    yield number, line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                message = f"the gzip stream breaks here ({error}); expected its end mark, write the file again"
                yield number + 1, InputError(ErrorKind.TORN_ARCHIVE, message)
    except InputError as error:  # not a row: the lines after it would be missing without a trace
        raise ConfigError(f"the manifest cannot be read after line {number}: {error.message}") from error


def _bounded_lines(file: IO[bytes]) -> Iterator[bytes | InputError]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield InputError(
            ErrorKind.BAD_RECORD, f"the line is longer than {MAX_LINE_BYTES} bytes; expected one JSON object"
        )


def _row_of(
    line: bytes | InputError,
    manifest: str,
    number: int,
    source: str,
    folder: str,
    rules: SourceRules,
    signed_urls: dict[str, str],
) -> dict | None:
    """The plan row of one line; None for a blank line."""
    try:
        if isinstance(line, InputError):
            raise line
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            return None
        row = parse_line(line, folder, rules)
        shown = redact_url(row["source"])
        if shown != row["source"]:
            signed_urls[shown] = row["source"]
        return row | {"source": shown}
    except InputError as error:
        message = f"{manifest}, line {number}: {redact_text(error.message)}"
        content = line if isinstance(line, bytes) else error.message.encode()
        return {
            # Named by its content: lines inserted before it later must not make it another item.
            "id": f"{manifest}#bad-{hashlib.blake2b(content.strip(), digest_size=6).hexdigest()}",
            "source": source,
            "audio_s": 0.0,
            "items": 1,
            "error_kind": str(error.kind),
            "error_message": message,
        }


def parse_line(line: bytes, folder: str, rules: SourceRules) -> dict:
    """One manifest line -> the columns of its plan row, of which only `source` may hold a secret.

    Raises:
        InputError: BAD_RECORD or BAD_SEGMENT.
    """
    try:
        record = _DECODER.decode(line.decode("utf-8-sig").strip())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        found = _shown(line.decode(errors="replace"))
        raise _bad(f"not JSON ({type(error).__name__}: {error}); found {found}") from error
    if not isinstance(record, dict):
        raise _bad(f"expected a JSON object, found {type(record).__name__}")
    path = record.get("audio_filepath")
    if not isinstance(path, str):
        raise _bad(f"expected a string under audio_filepath, found {_shown(path)}")
    offset_s, duration_s = _seconds(record, "offset"), _seconds(record, "duration")
    channel = _channel(record.get("channel"))
    text = record.get("text")
    segment = offset_s is not None
    row = {
        "id": _identity(record.get("id"), path, offset_s, duration_s, channel),
        "source": rules.resolve(path, folder),
        "offset_s": offset_s,
        "duration_s": duration_s if segment else None,
        "channel": channel,
        "audio_s": duration_s,
        "items": 1,
        "reference": text if isinstance(text, str) else None,
        "extra": _extra(record),
    }
    for value in row.values():
        if isinstance(value, str):
            _check_text(value)
    return row


def _extra(record: dict) -> str | None:
    """The other keys of a line, as JSON; None if there are none."""
    extra = {key: value for key, value in record.items() if key not in _OWN_KEYS}
    if not extra:
        return None
    try:
        return mask_signatures(json.dumps(extra, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity; lists 994 deep can be read, not written
        raise _bad(
            f"the keys {_shown(', '.join(extra))} cannot be carried through as JSON ({error}); "
            "expected finite numbers, and fewer levels"
        ) from error


def _identity(given: object, path: str, offset_s: float | None, duration_s: float | None, channel: int | None) -> str:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise _bad(f"expected a string or an integer under id, found {_shown(given)}")
        return redact_url(str(given))  # in some manifests it is the URL itself
    segment = "" if offset_s is None else f"#{offset_s:.10g}-{'' if duration_s is None else format(duration_s, '.10g')}"
    return f"{redact_url(path)}{segment}{'' if channel is None else f'@{channel}'}"


def _seconds(record: dict, key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(f"expected a number of seconds under {key}, found {_shown(value)}")
    if not 0 <= value < 1e9 or not math.isfinite(value):  # 1e9 s are 31 years
        message = f"{key} is {value!r:.60} s; expected 0 or more" + (", inside the audio" if key == "offset" else "")
        raise InputError(ErrorKind.BAD_SEGMENT, message)
    if key == "duration" and value == 0 and record.get("offset") is not None:
        raise InputError(ErrorKind.BAD_SEGMENT, "the segment's duration is 0 s; expected more")
    return float(value)


def _channel(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(
            f"expected one channel number (from 0) under channel, found {_shown(value)}; write one line per channel"
        )
    if not 0 <= value <= MAX_CHANNEL:
        raise InputError(ErrorKind.BAD_CHANNEL, f"channel {value!r:.60}: expected 0 to {MAX_CHANNEL}")
    return value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can express half a surrogate pair, Arrow strings cannot hold it
        raise _bad(f"holds a character that is not Unicode text ({error.reason})") from error


def _shown(value: object) -> str:
    """The beginning of a value, for a message; redacted before it is cut: half a URL may not be recognised as one."""
    return redact_text(repr(value))[:60]


def _bad(message: str) -> InputError:
    return InputError(ErrorKind.BAD_RECORD, message)
