"""Frame headers of MPEG audio layer III (mp3).

Knows only what is needed to count the frames of a file that does not declare them, and to declare them for it.
"""

import struct
from dataclasses import dataclass

from parakeet_core.audio_source import Source

_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # ISO 11172-3 and 13818-3, layer III


@dataclass(frozen=True)
class MpegFrame:
    """Size and layout of one frame."""

    length: int  # bytes
    samples: int
    sample_rate_hz: int
    channels: int
    tag_offset: int  # of a Xing or Info tag: after the side information


def parse_frame_header(raw: bytes) -> MpegFrame | None:
    """Parse the 4 bytes of a layer III frame header; None if they are not one (or of "free" bit rate)."""
    if len(raw) < 4 or raw[0] != 0xFF or raw[1] & 0xE6 != 0xE2 or raw[1] & 0x18 == 0x08:
        return None
    bit_rate_index, rate_index = raw[2] >> 4, raw[2] >> 2 & 3
    if bit_rate_index in (0, 15) or rate_index == 3:
        return None
    version = {3: 1, 2: 2, 0: 2.5}[raw[1] >> 3 & 3]
    rate = (44100, 48000, 32000)[rate_index] // {1: 1, 2: 2, 2.5: 4}[version]
    kbps = _KBPS[1 if version == 1 else 2][bit_rate_index]
    samples = 1152 if version == 1 else 576
    mono = raw[3] >> 6 == 3
    side = (17 if mono else 32) if version == 1 else (9 if mono else 17)
    return MpegFrame(samples * kbps * 125 // rate + (raw[2] >> 1 & 1), samples, rate, 1 if mono else 2, 4 + side)


def skip_id3(src: Source, start: int) -> int:
    """Return the offset after any ID3v2 tags."""
    for _ in range(8):  # writers have been seen to stack two; junk may stack more
        tag = src.peek(start, 10)
        if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:10]) > 127:
            break
        start += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]) + (10 if tag[5] & 0x10 else 0)
    return start


def find_frame(src: Source, start: int) -> tuple[int, MpegFrame] | None:
    """Return the first frame header from `start` on whose frame is followed by another, or by the end of the file."""
    for size in (4, 1 << 16):  # most files begin with a frame; a decoder gives up on junk sooner than 64 KiB
        window = src.peek(start, size)
        at = window.find(b"\xff")
        while at >= 0:
            frame = parse_frame_header(window[at : at + 4])
            if frame:
                following = src.peek(start + at + frame.length, 4)
                if len(following) < 4 or parse_frame_header(following):
                    return start + at, frame
            at = window.find(b"\xff", at + 1)
    return None


def has_whole_frame(src: Source, start: int) -> bool:
    """Tell whether a frame begins at `start` and ends in the file."""
    frame = parse_frame_header(src.peek(start, 4))
    return frame is not None and start + frame.length <= src.size


def goes_on(src: Source, end: int) -> bool:
    """Tell whether more MPEG frames follow the part that the Xing tag counts: files joined end to end."""
    for _ in range(4):
        if src.peek(end, 3) == b"TAG":
            end += 128  # ID3v1
        end = skip_id3(src, end)
        if parse_frame_header(src.peek(end, 4)):
            return True
    return False


def count_frames(src: Source, start: int) -> int:
    """Count the frames from `start` on; junk between them is skipped, as decoders do."""
    count, position, base, window = 0, start, 0, b""
    lengths: dict[bytes, int] = {}
    while position + 4 <= src.size:
        if not base <= position <= base + len(window) - 4:
            base, window = position, src.peek(position, 1 << 18)
        raw = window[position - base : position - base + 3] + b"\0"  # mode bits do not change the length
        length = lengths.get(raw)
        if length is None:
            frame = parse_frame_header(raw)
            length = lengths[raw] = frame.length if frame else 0
        if not length:
            found = find_frame(src, position + 1)
            if found is None:
                return count
            position, frame = found
            length = frame.length
        position += length
        count += 1
    return count


def info_frame(first: bytes, frames: int) -> bytes:
    """Build a frame that holds only a Xing tag, so that libsndfile reads all `frames` of a file that has none.

    The tag makes the decoder drop its own delay of 529 samples at the start, in which there is no sound.
    """
    version_1 = first[1] & 0x18 == 0x18
    third = (first[2] & 0x0C) | (0x50 if version_1 else 0x80)  # same rate, 64 kbit/s, no padding
    header = bytes([0xFF, first[1] | 1, third, first[3]])  # | 1: no checksum
    frame = parse_frame_header(header)
    tag = b"Xing" + struct.pack(">II", 1, frames)
    return (header.ljust(frame.tag_offset, b"\0") + tag).ljust(frame.length, b"\0")
