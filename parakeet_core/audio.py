"""Encoded audio to a mono waveform at the model's rate.

    source -> Source -> read_header -> libsndfile or PyAV -> channel -> finite? -> soxr -> [S] float32

    audio_source.py   bytes, path or file object as one seekable source
    audio_info.py     header facts, their types and limits
    audio_headers.py  what the container declares, against the bytes present
    audio_chunks.py   the same for wav and similar containers
    audio_mp3.py      frame headers of mp3
    audio_sndfile.py  blocks of samples by libsndfile
    audio_av.py       blocks of samples by PyAV, for what libsndfile lacks

Knows nothing of Ray, object stores or models. Shapes: `S` samples, `C` channels, `n` frames of one block.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soxr

from parakeet_core.audio_av import AvDecoder, needs_av
from parakeet_core.audio_headers import read_header
from parakeet_core.audio_info import AudioInfo
from parakeet_core.audio_sndfile import SAMPLE_BYTES, SndfileDecoder
from parakeet_core.audio_source import Source
from parakeet_core.errors import ErrorKind, InputError

__all__ = [
    "DEFAULT_MAX_DURATION_S",
    "MAX_LEVEL",
    "SEGMENT_TOLERANCE_S",
    "Audio",
    "AudioInfo",
    "decode_audio",
    "load_audio",
    "probe_audio",
]

DEFAULT_MAX_DURATION_S = 12 * 3600.0  # 2.8 GB of float32 at 16 kHz; longer recordings are better given as segments
# A segment may end this far after the end of the audio, and is clipped. Manifests round durations, some to 0.1 s, and
# other tools count the delay and padding of mp3 and AAC (at 16 kHz up to 0.11 s and 0.2 s), which libsndfile and FFmpeg
# cut off.
SEGMENT_TOLERANCE_S = 0.25
# Full scale is 1.0, or 2^31 if 32-bit integers were stored as floats. Nothing louder was ever recorded, and from about
# 2^60 on squares overflow: all features of the item would be NaN, and its text empty or junk.
MAX_LEVEL = 2.0**40
LONGEST_S = 1e9  # 31 years; sample numbers beyond it may not fit the decoders' integers
BLOCK_SAMPLES = 1 << 16  # decoded at a time, over all channels; 256 KiB, soxr's fastest (measured 64 KiB to 4 MiB)
DIRECT_SAMPLES = 1 << 20  # the same without resampling: 65 s at 16 kHz need no copy

SourceLike = bytes | bytearray | memoryview | str | os.PathLike | BinaryIO


@dataclass(frozen=True)
class Audio:
    """One decoded item.

    Args:
        waveform: [S] float32, mono, at the requested rate; full scale is 1.0, and is not enforced.
        info: header facts of the source.
        duration_s: of the decoded part, from its frames at the source's own rate.
    """

    waveform: np.ndarray
    info: AudioInfo
    duration_s: float


def probe_audio(source: SourceLike) -> AudioInfo:
    """Read the header facts of a source without decoding a sample.

    Raises:
        InputError: EMPTY_FILE, NOT_AUDIO, ABSURD_HEADER, DECODER_MISSING, or TRUNCATED if the header itself is cut.
        OSError: what the path or the file object raises.
    """
    with Source(source) as src:
        decoder = _open_decoder(src)
        decoder.close()
        return decoder.info


def decode_audio(
    source: SourceLike,
    sample_rate_hz: int = 16000,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: str | int = "mix",
) -> np.ndarray:
    """Decode to a mono waveform: `load_audio(...).waveform`, [S] float32."""
    return load_audio(source, sample_rate_hz, offset_s, duration_s, channel).waveform


def load_audio(
    source: SourceLike,
    sample_rate_hz: int = 16000,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: str | int = "mix",
    max_duration_s: float | None = DEFAULT_MAX_DURATION_S,
) -> Audio:
    """Decode a source, or a segment of it, to mono at one rate.

    The format is detected from the content, never from a name. A segment begins at frame `round(offset_s * rate)` and
    has `round(duration_s * rate)` frames, at the source's own rate (half rounds up). F frames become
    `round(F * sample_rate_hz / rate)` samples. A segment is resampled alone, as if silence surrounded it. Without
    resampling the samples are those of libsndfile, bit for bit.

    Args:
        source: bytes, bytearray or memoryview; a path; or a seekable binary file object (read from its first byte, left
            open).
        sample_rate_hz: rate of the result.
        offset_s: where to start.
        duration_s: how much to decode; None: up to the end. A segment that ends up to
            `SEGMENT_TOLERANCE_S` after the end is clipped.
        channel: "mix" (the mean over channels, before resampling), "first", or an index.
        max_duration_s: longest part to decode; None: no limit.

    Returns:
        Audio: the waveform, [S] float32, and what is known of its source.

    Raises:
        InputError: EMPTY_FILE, NOT_AUDIO, TRUNCATED, ABSURD_HEADER, NON_FINITE, DECODER_MISSING, BAD_CHANNEL,
            BAD_SEGMENT or TOO_LONG. A segment that lies before the cut of a truncated file is decoded.
        OSError: what the path or the file object raises.
        ValueError: `sample_rate_hz` is not positive.
    """
    if sample_rate_hz <= 0:
        raise ValueError(f"sample_rate_hz is {sample_rate_hz}, expected a positive rate")
    with Source(source) as src:
        decoder = _open_decoder(src)
        try:
            return _load(src, decoder, sample_rate_hz, offset_s, duration_s, channel, max_duration_s)
        finally:
            decoder.close()


def _open_decoder(src: Source) -> SndfileDecoder | AvDecoder:
    if src.size == 0:
        raise src.fail(ErrorKind.EMPTY_FILE, "0 bytes; expected an audio file: fetch it again or remove it")
    header = read_header(src)
    return AvDecoder(src, header) if needs_av(header) else SndfileDecoder(src, header)


def _load(src, decoder, sample_rate_hz, offset_s, duration_s, channel, max_duration_s) -> Audio:
    info = decoder.info
    rate = info.sample_rate_hz
    if info.frames == 0:
        raise _empty(src, decoder)
    column = _resolve_channel(src, info, channel)
    start, count = _resolve_segment(src, decoder, offset_s, duration_s)
    limit = None if max_duration_s is None else math.floor(max_duration_s * rate)
    if limit is not None and count is not None and count > limit:
        raise _too_long(src, count / rate, max_duration_s)

    frames = 0  # decoded so far

    def mono_blocks() -> Iterator[np.ndarray]:
        nonlocal frames
        wanted = count if count is not None else limit + 1 if limit is not None else 1 << 62
        block_samples = DIRECT_SAMPLES if rate == sample_rate_hz and count is not None else BLOCK_SAMPLES
        for block in decoder.blocks(start, wanted, max(1, block_samples // info.channels)):
            mono = _to_mono(block, column)
            if info.codec not in SAMPLE_BYTES:  # libsndfile's integer formats cannot hold NaN
                _require_finite(src, mono, (start + frames) / rate)
            frames += len(block)
            yield mono

    chunks = mono_blocks()
    waveform = _gather(chunks if rate == sample_rate_hz else _resample(chunks, rate, sample_rate_hz))
    if limit is not None and frames > limit:
        raise _too_long(src, frames / rate, max_duration_s)
    _check_end(src, decoder, start, count, frames)
    return Audio(waveform, info, frames / rate)


def _resolve_channel(src: Source, info: AudioInfo, channel: str | int) -> int | None:
    """Return the index of the channel to take, None for the mean."""
    if channel == "mix":
        return None
    index = 0 if channel == "first" else channel
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < info.channels:
        expected = f'"mix", "first" or an index from 0 to {info.channels - 1}'
        raise src.fail(ErrorKind.BAD_CHANNEL, f"channel {channel!r} of audio with {info.channels}, expected {expected}")
    return int(index)


def _resolve_segment(src: Source, decoder, offset_s: float, duration_s: float | None) -> tuple[int, int | None]:
    """Return first frame and number of frames (None: up to an unknown end)."""
    for name, value in (("offset", offset_s), ("duration", duration_s)):
        if value is not None and not 0 <= value < LONGEST_S:  # NaN compares as false
            found = f"{name} {value} s, expected 0 or more and less than {LONGEST_S:.0e}"
            raise src.fail(ErrorKind.BAD_SEGMENT, f"{found}: correct the manifest")
    rate, total = decoder.info.sample_rate_hz, decoder.info.frames
    start = math.floor(offset_s * rate + 0.5)
    count = None if duration_s is None else math.floor(duration_s * rate + 0.5)
    if total is None:
        return start, count
    end = max(total, start + 1) if count is None else start + count
    if decoder.cut and (count is None or end > total):
        raise _truncated(src, decoder, total)
    if start >= total or end - total > SEGMENT_TOLERANCE_S * rate:
        raise _outside(src, start, count, total, rate)
    return start, min(end, total) - start


def _check_end(src: Source, decoder, start: int, count: int | None, frames: int) -> None:
    """Raise unless the frames decoded are those asked for, and the end of the bytes is the end of the audio."""
    info = decoder.info
    rate = info.sample_rate_hz
    if count is not None and frames >= count:
        return
    if decoder.cut:
        raise _truncated(src, decoder, start + frames)
    if start == 0 and frames == 0:
        raise _empty(src, decoder)
    if info.frames is not None:
        if count - frames > decoder.spare_frames:
            raise _truncated(src, decoder, start + frames)
    elif frames == 0 or (count is not None and count - frames > SEGMENT_TOLERANCE_S * rate):
        raise _outside(src, start, count, start + frames, rate)


def _empty(src: Source, decoder) -> InputError:
    found = f"{decoder.info.container} header without samples" + (f" ({decoder.cut})" if decoder.cut else "")
    return src.fail(ErrorKind.EMPTY_FILE, f"{found}; fetch the file again or remove it")


def _truncated(src: Source, decoder, frames: int) -> InputError:
    rate, declared = decoder.info.sample_rate_hz, decoder.info.frames
    found = decoder.cut or f"the header declares {declared} frames, decoding ends early"
    return src.fail(ErrorKind.TRUNCATED, f"{found}; {frames / rate:.3f} s are left at most; fetch the file again")


def _outside(src: Source, start: int, count: int | None, total: int, rate: int) -> InputError:
    end = "end" if count is None else f"{(start + count) / rate:.3f}"
    found = f"segment {start / rate:.3f} to {end} s of audio that ends by {total / rate:.3f} s"
    return src.fail(ErrorKind.BAD_SEGMENT, f"{found}; correct offset and duration in the manifest")


def _too_long(src: Source, duration_s: float, max_duration_s: float) -> InputError:
    found = f"{duration_s:.1f} s or more to decode, the limit is {max_duration_s:.1f} s"
    return src.fail(ErrorKind.TOO_LONG, f"{found}; give it as segments or raise the limit")


def _to_mono(block: np.ndarray, column: int | None) -> np.ndarray:
    """Return [n] of [n, C]: one column, or the mean, added up by columns: a mean over rows of 2 is 10 times slower."""
    if block.shape[1] == 1:
        return block[:, 0]
    if column is not None:
        return np.ascontiguousarray(block[:, column])
    with np.errstate(over="ignore", invalid="ignore"):  # sums that are not finite are reported later
        mono = block[:, 0] + block[:, 1]
        for index in range(2, block.shape[1]):
            mono += block[:, index]
        mono /= block.shape[1]
    return mono


def _require_finite(src: Source, mono: np.ndarray, at_s: float) -> None:
    if not (usable := np.abs(mono) <= MAX_LEVEL).all():  # NaN compares as false
        found = f"{np.count_nonzero(~usable)} values that are NaN, infinite or over {MAX_LEVEL:.0e}"
        where = f"in the {len(mono)} samples from {at_s:.3f} s on"
        raise src.fail(ErrorKind.NON_FINITE, f"{found} {where}; expected a full scale of 1.0: encode it again")


def _resample(chunks: Iterator[np.ndarray], rate: int, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Resample a stream of [n] blocks; the result does not depend on their sizes. Quality: soxr's HQ (20 bit)."""
    stream = soxr.ResampleStream(rate, sample_rate_hz, 1, dtype="float32", quality="HQ")
    for chunk in chunks:
        yield stream.resample_chunk(chunk)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _gather(chunks: Iterator[np.ndarray]) -> np.ndarray:
    """Join blocks in one array that grows by a quarter with realloc: memory follows what has arrived, not a header."""
    waveform = next(chunks, np.empty(0, np.float32))
    filled = len(waveform)
    for chunk in chunks:
        if filled + len(chunk) > len(waveform):
            if not waveform.flags.owndata:
                waveform = waveform.copy()
            waveform.resize(filled + len(chunk) + filled // 4, refcheck=False)
        waveform[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled < len(waveform):
        waveform.resize(filled, refcheck=False)
    return waveform
