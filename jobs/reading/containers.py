"""Containers -> items while they are read: WebDataset tars as a stream, Parquet row groups page by page.

A torn container gives the items before the tear, and then errors for the rest. Member names are labels, never paths.
"""

import gzip
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.inputs.containers import REFERENCE_COLUMNS, AudioColumn, find_audio_column, plain_columns
from jobs.inputs.scan import AUDIO_EXTENSIONS
from jobs.sources.reader import ReadItem, SourceReader
from parakeet_core.errors import ErrorKind, InputError

MAX_MEMBER_BYTES = 1 << 30  # held in memory; a member of 9 h of 16 kHz 16-bit speech is a mistake, or a bomb
MAX_TAIL_BYTES = 1 << 20  # zeros after the end mark: tar writes at most one record of 10 KiB
STREAM_BYTES = (
    1 << 17
)  # read at a time from an archive; tarfile copies what is left of it at each read (10 KiB to 1 MiB tried)
MAX_TEXT_BYTES = 1 << 20  # reference texts and metadata of one utterance
PARQUET_BATCH_ROWS = 16  # rows decoded at a time: 16 clips of 30 s are about 15 MB
_META_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_META_TYPES += (tarfile.GNUTYPE_LONGLINK,)
_TEAR = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def read_container(row: dict, reader: SourceReader) -> Iterator[ReadItem]:
    """The items of one tar or row group.

    Args:
        row: a plan row as a dict.
    """
    if row["layout"] == "tar":
        return read_tar(row["id"], row["source"], reader)
    return read_row_group(row["id"], row["source"], row["row_group"], row["items"], reader)


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first member for the archive's end; here it is a tear."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise  # a block of zeros: the proper end
        except tarfile.HeaderError as error:
            found = str(error) if buf else f"{error}; the archive ends without its end mark"
            raise tarfile.ReadError(found) from error
        if (
            header.type in _META_TYPES and header.size > MAX_TEXT_BYTES
        ):  # tarfile reads these whole, whatever they claim
            raise tarfile.ReadError(f"a header of {header.size} bytes; expected at most {MAX_TEXT_BYTES}")
        return header


class _Pieces:
    """What tarfile reads from: pieces as they come, so that all bytes before a tear in a gzip stream are used.

    tarfile skips a member by reading as often as its claimed size says, even past the end of the file: a header that
    claims 4 EiB would hang it. Here the second read past the end is the tear.
    """

    def __init__(self, file: io.BufferedReader | gzip.GzipFile):
        self.file, self.ended = file, False

    def read(self, size: int) -> bytes:
        piece = self.file.read1(size)
        if not piece and self.ended:
            raise tarfile.ReadError("unexpected end of data")
        self.ended = not piece
        return piece


def read_tar(tar_id: str, source: str, reader: SourceReader) -> Iterator[ReadItem]:
    """The items of a WebDataset tar: its audio members, with the `.txt` and `.json` members of the same key.

    Ids are `tar_id/key`; the 2nd, 3rd, ... audio of one key get `~2`, `~3`. What lies after a tear is one error row,
    and so is a tar that has members but no audio; a tar without members gives no items.
    """
    taken: dict[str, int] = {}
    done, others, example = 0, 0, ""
    try:
        with reader.stream(source) as file:
            try:
                for key, members in _groups(file):
                    others, example = others + len(members), example or members[0][0].name
                    for item in _tar_items(key, members, tar_id, source):
                        item.id = _unused(item.id, taken)
                        done += 1
                        yield item
            except _TEAR as error:
                message = f"{source}: the archive breaks after {done} items ({error}); write it again or fetch it again"
                raise InputError(ErrorKind.TORN_ARCHIVE, message) from error
        if others and not done:
            found = f"{others} members, none of them audio, e.g. {example!r:.200}"
            advice = "expected members such as key.wav or key.flac; unpack archives inside, or leave this tar out"
            raise InputError(ErrorKind.BAD_RECORD, f"{source}: {found}; {advice}")
    except InputError as error:
        yield ReadItem(_unused(f"{tar_id}#rest", taken), source, error)


def _groups(file: IO[bytes]) -> Iterator[tuple[str, list[tuple[tarfile.TarInfo, bytes | None]]]]:
    """(key, members) of consecutive members with one key; the bytes are None for members that are not read.

    Raises:
        tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile: after the last complete group.
    """
    buffered = io.BufferedReader(file, 1 << 20)
    plain = gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == b"\x1f\x8b" else buffered
    key, group, tear = None, [], None
    try:
        for archive, member in _members(plain):
            if member.size < 0:
                raise tarfile.ReadError(f"member {member.name!r:.100} claims {member.size} bytes")
            if member.isdir() or _is_apple_double(member.name):
                continue
            data = _member_bytes(archive, member)
            if key is not None and _key(member.name) != key:
                yield key, group
                group = []
            key = _key(member.name)
            group.append((member, data))
        if plain is not buffered:
            plain.read(MAX_TAIL_BYTES)  # the checksum of a gzip stream comes after the end mark of the archive
    except _TEAR as error:
        tear = error
    if group:
        yield key, group  # before a tear as well: its audio is whole, only a text after the tear may be missing
    if tear is not None:
        raise tear


def _members(plain: io.BufferedReader | gzip.GzipFile) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """(archive, member) of each header; what the consumer raises does not pass through here."""
    try:
        archive = tarfile.open(fileobj=_Pieces(plain), mode="r|", bufsize=STREAM_BYTES, tarinfo=_Header)  # noqa: SIM115 - owns no file
        for member in archive:
            archive.members = []  # tarfile keeps every header it has seen
            yield archive, member
    except ValueError as error:  # tarfile does not wrap what damaged pax headers of sparse members raise
        raise tarfile.ReadError(f"a damaged header: {str(error)[:100]}") from error


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    extension = _extension(member.name)
    limit = MAX_MEMBER_BYTES if extension in AUDIO_EXTENSIONS else MAX_TEXT_BYTES
    wanted = extension in AUDIO_EXTENSIONS or extension in ("txt", "json")
    if not _is_plain(member) or not wanted or member.size > limit:
        return None
    data = archive.extractfile(member).read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"member {member.name!r} has {len(data)} of its {member.size} bytes")
    return data


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()  # a sparse member of a few bytes can unfold to gigabytes of zeros


def _is_apple_double(name: str) -> bool:
    """Whether this is what tar on a Mac writes before each file that has attributes: `._a.wav` before `a.wav`."""
    return name.rpartition("/")[2].startswith("._")


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.split('.', 1)[0]}"


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _stem(name: str) -> str:
    return name.removeprefix("./").rpartition(".")[0]


def _tar_items(
    key: str, members: list[tuple[tarfile.TarInfo, bytes | None]], tar_id: str, source: str
) -> Iterator[ReadItem]:
    audio = [(member, data) for member, data in members if _extension(member.name) in AUDIO_EXTENSIONS]
    stems = {_stem(member.name) for member, _ in audio}
    texts, records = _by_stem(members, "txt"), _by_stem(members, "json")
    shared_text, shared_record = _shared(texts, key, stems), _shared(records, key, stems)
    for member, data in audio:
        stem = _stem(member.name)
        reference, extra = _texts(texts.get(stem, shared_text), records.get(stem, shared_record))
        payload: bytes | InputError = data if data is not None else _unreadable(member)
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        item_id = f"{tar_id}/{key}".encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        yield ReadItem(item_id, source, payload, member=name, reference=reference, extra=extra)


def _by_stem(members: list[tuple[tarfile.TarInfo, bytes | None]], extension: str) -> dict[str, bytes]:
    return {_stem(m.name): data for m, data in members if data is not None and _extension(m.name) == extension}


def _shared(texts: dict[str, bytes], key: str, stems: set[str]) -> bytes | None:
    """The text for audio without one of its own name: that named like the key, or the only one named like no audio.

    `c.left.txt` is not the text of `c.right.wav`, and `c.old.txt` is not that of `c.wav` if there is a `c.txt`.
    """
    others = [data for stem, data in texts.items() if stem not in stems]
    return texts.get(key, others[0] if len(others) == 1 else None)


def _unreadable(member: tarfile.TarInfo) -> InputError:
    if not _is_plain(member):
        found = f"member {member.name!r:.200} is a link, a device or sparse"
        return InputError(ErrorKind.BAD_RECORD, f"{found}; store a plain file")
    message = f"member {member.name!r} has {member.size} bytes, more than {MAX_MEMBER_BYTES}; store it as a file"
    return InputError(ErrorKind.TOO_LONG, message)


def _texts(text: bytes | None, metadata: bytes | None) -> tuple[str | None, str | None]:
    """(reference, extra) from a `.txt` and a `.json` member, both valid UTF-8 and `extra` valid JSON.

    Bytes that are not UTF-8 become replacement characters and a byte order mark is dropped; NaN, Infinity and numbers
    beyond the range of a float become null.
    """
    reference = text.decode("utf-8-sig", "replace").strip() if text is not None else None
    if metadata is None:
        return reference, None
    raw = metadata.decode("utf-8-sig", "replace")
    try:
        record = json.loads(raw, parse_float=_finite, parse_constant=_finite)
        extra = _utf8(json.dumps(record, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return reference, json.dumps({"json": raw})  # passed on as it is
    if reference is None and isinstance(record, dict):
        found = next((record[name] for name in REFERENCE_COLUMNS if isinstance(record.get(name), str)), None)
        reference = _utf8(found) if found is not None else None
    return reference, extra


def _finite(number: str | float) -> float | None:
    return float(number) if math.isfinite(float(number)) else None  # JSON cannot express the others


def _utf8(text: str) -> str:
    """`text` with `?` for each half of a surrogate pair, which JSON can express and Arrow refuses."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unused(item_id: str, taken: dict[str, int]) -> str:
    """The id, or the first `id~2`, `id~3`, ... that is not taken.

    Args:
        taken: id -> the number to continue from: a tar may have 100,000 members of one key.
    """
    candidate, occurrence = item_id, taken.get(item_id, 1)
    while candidate in taken:
        occurrence += 1
        candidate = f"{item_id}~{occurrence}"
    taken[item_id] = occurrence
    taken.setdefault(candidate, 1)
    return candidate


def read_row_group(first_id: str, source: str, row_group: int, items: int, reader: SourceReader) -> Iterator[ReadItem]:
    """The items of one row group of a Parquet file, one per row.

    Args:
        first_id: `file.parquet#row` of the first row.
        items: rows of the group when it was planned. Rows that are missing become error items. Rows beyond them are
            left out: the shard's count is fixed, so a file that grew has to be planned again under a new name.
    """
    prefix, _, first = first_id.rpartition("#")
    done = 0
    try:
        with reader.stream(source) as file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
                audio = find_audio_column(parquet.schema_arrow)
                batches = parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=[row_group], columns=audio.columns)
                for batch in batches:
                    for row in plain_columns(batch).to_pylist():
                        yield _parquet_item(row, audio, f"{prefix}#{int(first) + done}", source)
                        done += 1
                        if done == items:
                            return
            # The storage's own failures are InputErrors already. ValueError and OverflowError: text that is not UTF-8,
            # times that Python cannot hold.
            except (pa.ArrowException, OSError, IndexError, ValueError, OverflowError) as error:
                message = f"{source}, row group {row_group}: breaks after {done} rows ({str(error)[:200]})"
                raise InputError(ErrorKind.TORN_ARCHIVE, message) from error
            if done < items:
                message = f"{source}, row group {row_group}: {done} rows, {items} when it was planned"
                raise InputError(ErrorKind.TORN_ARCHIVE, message)
    except InputError as error:
        for row in range(done, items):
            yield ReadItem(f"{prefix}#{int(first) + row}", source, error)


def _parquet_item(row: dict, audio: AudioColumn, item_id: str, source: str) -> ReadItem:
    value = row[audio.name]
    data = value.get("bytes") if audio.is_struct and value is not None else value
    member = value.get("path") if audio.is_struct and value is not None else None
    if data is None:
        found = "null" if member is None else f"only the path {member[:100]!r}"
        payload = InputError(ErrorKind.BAD_RECORD, f"{item_id}: the audio is {found}; expected its bytes in the row")
    else:
        payload = data
    reference = row[audio.reference] if audio.reference else None
    extra = {name: row[name] for name in audio.extra if row[name] is not None}
    extra = {name: _finite(value) if isinstance(value, float) else value for name, value in extra.items()}
    return ReadItem(
        item_id,
        source,
        payload,
        member=member,
        reference=reference if isinstance(reference, str) else None,
        extra=json.dumps(extra, ensure_ascii=False, allow_nan=False, default=str) if extra else None,
    )
