"""Containers that declare the size of their samples (wav, rf64, w64, aiff, au, caf, nist), against the bytes present.

Knows nothing of the samples.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import replace

from parakeet_core.audio_info import Header
from parakeet_core.audio_source import Source

MAX_CHUNKS = 100_000  # a fragmented mp4 of 12 h may have two boxes a second; bounds the walk over junk
MAX_HEAD_BYTES = 1 << 20  # of chunks before the samples, copied to correct the sizes of a streamed file
MPEG_LAYER_III = 0x55  # the format tag of mp3 in a wav, as telephone systems store it
OPEN_SIZE = 2**63 - 2**16  # 64-bit sizes from here up come from writers to a pipe: ffmpeg's w64 has 2^63 - 1


def _walk_chunks(src: Source, start: int, layout: struct.Struct, align: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (id, offset of the body, size as written) of chunks; W64 counts the header in its sizes."""
    counts_header = layout.size == 24
    for _ in range(MAX_CHUNKS):
        raw = src.peek(start, layout.size)
        if len(raw) < layout.size:
            return
        name, size = layout.unpack(raw)
        body = start + layout.size
        size -= layout.size if counts_header else 0
        yield name[:4], body, size
        start = body + max(0, size)
        start += -start % align


def _is_placeholder(size: int) -> bool:
    """Tell whether a 32-bit data size stands for "not known when the header was written", as in a pipe.

    ffmpeg writes 0xFFFFFFFF, sox 0x7FFFF000 (aiff: 0x7F000000), arecord 0x80000000, all with or without the size of
    their header added; writers that were never closed leave 0.
    """
    return size == 0 or size >= 0xFFFF0000 or 0x7F000000 <= size <= 0x80000100


def compare_sizes(
    src: Source, container: str, rate: int | None, channels: int | None, body: int, size: int | None
) -> Header:
    """Header of a container whose samples begin at `body` and should be `size` bytes (None: to the end)."""
    present = max(0, src.size - body)
    if size is None or size <= present + 1:  # some writers count a padding byte that they leave out
        return Header(container, rate, channels)
    cut = f"the header declares {size} bytes of data, the file has {present}"
    return Header(container, rate, channels, declared_bytes=size, present_bytes=present, cut=cut)


def report_cut_header(src: Source, container: str, whole: int, rate: int | None, channels: int | None) -> Header:
    """Header of a container in which no samples begin; `whole` is the size of the file that it declares."""
    cut = f"the file ends inside its header, at byte {src.size} of {whole}" if src.size < whole else None
    return Header(container, rate, channels, cut=cut)


def read_riff(src: Source, magic: bytes) -> Header:
    order = ">" if magic[:4] == b"RIFX" else "<"
    codec = rate = channels = long_size = None
    ds64_at = 0
    for name, body, size in _walk_chunks(src, 12, struct.Struct(order + "4sI"), 2):
        if name == b"fmt " and len(fmt := src.peek(body, 8)) == 8:
            codec, channels, rate = struct.unpack(order + "HHI", fmt)
        elif name == b"ds64" and len(ds64 := src.peek(body, 16)) == 16:
            long_size, ds64_at = struct.unpack("<QQ", ds64)[1], body
        elif name == b"data":
            if codec == MPEG_LAYER_III:
                sized = None if _is_placeholder(size) else size
                return replace(compare_sizes(src, "WAV", rate, channels, body, sized), mpeg_at=body)
            if magic[:4] == b"RF64" and size == 0xFFFFFFFF:
                if ds64_at and (long_size >= OPEN_SIZE or long_size == 0 and not _ends_in_chunks(src, body, order)):
                    sizes = struct.pack("<QQQ", src.size - 8, max(0, src.size - body), 0)
                    return _close_stream(src, "RF64", rate, channels, body, ds64_at, sizes)
                return compare_sizes(src, "RF64", rate, channels, body, long_size)
            head = _correct_riff(src, order, body, size)
            if head is not None:
                return Header("WAV", rate, channels, head=(head, body))
            return compare_sizes(src, "WAV", rate, channels, body, None if _is_placeholder(size) else size)
    (declared,) = struct.unpack(order + "I", magic[4:8])
    return report_cut_header(src, "WAV", 0 if _is_placeholder(declared) else declared + 8, rate, channels)


def _correct_riff(src: Source, order: str, body: int, size: int) -> bytes | None:
    """Return what must stand before the samples at `body` for libsndfile to read them all; None if it already does."""
    present = src.size - body
    if present <= 0 or body > MAX_HEAD_BYTES:
        return None
    if order == "<" and present > 0xFFFFFFFF:  # sizes of 32 bits have wrapped, or are a placeholder: make it an RF64
        tail = (present - size) % 2**32  # chunks after the samples
        if not _is_placeholder(size):
            present -= tail
        if _is_placeholder(size) or tail < MAX_HEAD_BYTES:
            ds64 = struct.pack("<4sIQQQI", b"ds64", 28, present + body + 28, present, 0, 0)
            return b"RF64\xff\xff\xff\xffWAVE" + ds64 + src.peek(12, body - 16) + b"\xff\xff\xff\xff"
    elif size == 0 and not _ends_in_chunks(src, body, order):
        return src.peek(0, 4) + b"\xff\xff\xff\xff" + src.peek(8, body - 12) + b"\xff\xff\xff\xff"
    return None


def _close_stream(
    src: Source, container: str, rate: int | None, channels: int | None, body: int, at: int, sizes: bytes
) -> Header:
    """Header of a file whose writer could not go back to write `sizes` at `at`; all from `body` on is samples."""
    if body > MAX_HEAD_BYTES:
        return Header(container, rate, channels)
    head = src.peek(0, at) + sizes + src.peek(at + len(sizes), body - at - len(sizes))
    return Header(container, rate, channels, head=(head, body))


def _ends_in_chunks(src: Source, start: int, order: str) -> bool:
    """Tell whether the rest of the file, to its last byte, is named chunks, and so holds no samples."""
    end = start
    for name, body, size in _walk_chunks(src, start, struct.Struct(order + "4sI"), 2):
        if not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        end = body + size
    return src.size - 1 <= end <= src.size + 1  # the padding byte of the last chunk may be left out


def read_w64(src: Source) -> Header:
    rate = channels = None
    for name, body, size in _walk_chunks(src, 40, struct.Struct("<16sq"), 8):
        if name == b"fmt " and len(fmt := src.peek(body, 8)) == 8:
            _, channels, rate = struct.unpack("<HHI", fmt)
        elif name == b"data" and size >= OPEN_SIZE:
            return _close_stream(src, "W64", rate, channels, body, body - 8, struct.pack("<q", src.size - body + 24))
        elif name == b"data":
            return compare_sizes(src, "W64", rate, channels, body, size if size > 0 else None)
    return report_cut_header(src, "W64", 0, rate, channels)


def read_aiff(src: Source) -> Header | None:
    if src.peek(8, 4) not in (b"AIFF", b"AIFC"):
        return None
    rate = channels = None
    for name, body, size in _walk_chunks(src, 12, struct.Struct(">4sI"), 2):
        if name == b"COMM" and len(comm := src.peek(body, 18)) == 18:
            (channels,) = struct.unpack(">H", comm[:2])
            exponent, mantissa = struct.unpack(">HQ", comm[8:])  # 80-bit extended float
            rate = mantissa >> max(0, min(64, 16446 - (exponent & 0x7FFF)))
        elif name == b"SSND":
            (skip,) = struct.unpack(">I", src.peek(body, 4).ljust(4, b"\0"))
            samples = None if _is_placeholder(size) or size < 8 else size - 8 - skip
            return compare_sizes(src, "AIFF", rate, channels, body + 8 + skip, samples)
    (declared,) = struct.unpack(">I", src.peek(4, 4))
    return report_cut_header(src, "AIFF", 0 if _is_placeholder(declared) else declared + 8, rate, channels)


def read_au(src: Source) -> Header:
    raw = src.peek(0, 24)
    if len(raw) < 24:
        return report_cut_header(src, "AU", 24, None, None)
    offset, size, _, rate, channels = struct.unpack((">" if raw[:4] == b".snd" else "<") + "5I", raw[4:])
    return compare_sizes(src, "AU", rate, channels, offset, None if _is_placeholder(size) else size)


def read_caf(src: Source) -> Header:
    rate = channels = None
    for name, body, size in _walk_chunks(src, 8, struct.Struct(">4sq"), 1):
        if name == b"desc" and len(desc := src.peek(body, 32)) == 32:
            hz, channels = struct.unpack(">d16xI4x", desc)
            rate = int(hz) if 0 <= hz < 1 << 32 else 0  # also for NaN and infinity
        elif name == b"data" and size == -1:
            return _close_stream(src, "CAF", rate, channels, body, body - 8, struct.pack(">q", src.size - body))
        elif name == b"data":
            return compare_sizes(src, "CAF", rate, channels, body, size if size > 0 else None)
    return report_cut_header(src, "CAF", 0, rate, channels)


def read_nist(src: Source) -> Header:
    text = src.peek(0, 1024)
    fields = dict(re.findall(rb"^(\w+) -(?:i|s\d+) (\S+)", text, re.MULTILINE))
    number = {key: int(value) for key, value in fields.items() if value.isdigit() and len(value) < 19}
    rate, channels = number.get(b"sample_rate"), number.get(b"channel_count")
    frame_bytes = number.get(b"sample_n_bytes", 0) * (channels or 0)
    count = number.get(b"sample_count")
    if count is None or not frame_bytes or b"shorten" in fields.get(b"sample_coding", b""):
        return Header("NIST", rate, channels)
    size = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", text)
    return compare_sizes(src, "NIST", rate, channels, int(size[1]) if size else 1024, count * frame_bytes)
