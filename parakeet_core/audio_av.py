"""Decoding by FFmpeg through PyAV, an optional extra: m4a, mp4, aac, webm, mkv, chained Ogg, and FLAC and Speex in Ogg.

The demuxer is chosen from the header that was read, never guessed by FFmpeg, whose list includes playlists: these would
open the files and addresses that the content names.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np

from parakeet_core.audio_info import AudioInfo, Header, check_layout
from parakeet_core.audio_source import Source
from parakeet_core.errors import ErrorKind

DEMUXERS = {"MP4": "mov", "MATROSKA": "matroska", "ADTS": "aac", "OGG": "ogg"}
SEEKABLE = frozenset({"MP4", "MATROSKA"})  # by time stamp: exact in mp4, to 1 ms in Matroska; not ADTS, not chains
PREROLL_S = 2.0  # decoded before a segment: several frames of AAC with its band replication, and more than Opus's 80 ms
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # FFmpeg's names, packed
SCALES = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31, "i8": 2.0**63}  # integer sample formats to full scale 1.0


def needs_av(header: Header | None) -> bool:
    """Tell whether libsndfile lacks the format, or would read only a part of it."""
    if header is None or header.container not in DEMUXERS:
        return False
    return header.container != "OGG" or header.chained or header.foreign


class AvDecoder:
    """One source opened by PyAV: the first audio stream in it.

    Args:
        src: the source.
        header: what `read_header` found in it; `needs_av` is true of it.

    Raises:
        InputError: DECODER_MISSING, NOT_AUDIO, TRUNCATED or ABSURD_HEADER.
    """

    spare_frames = 0

    def __init__(self, src: Source, header: Header):
        self._src, self._header = src, header
        self.cut = header.cut
        try:
            import av
        except ImportError as error:
            lacks = "lacks this format" if not header.chained else "reads only the first of the Ogg streams joined here"
            hint = "pip install 'parakeet-batch[av]', or convert it to flac"
            raise src.fail(
                ErrorKind.DECODER_MISSING, f"{header.container} needs PyAV, as libsndfile {lacks}: {hint}"
            ) from error
        self._av = av
        self._open()
        self.info = self._describe()

    def _open(self) -> None:
        src, header = self._src, self._header
        try:
            self._container = self._av.open(src.handle, format=DEMUXERS[header.container], metadata_errors="ignore")
        except self._av.FFmpegError as error:
            if header.cut:
                raise src.fail(ErrorKind.TRUNCATED, f"{header.cut}; fetch the file again") from error
            found = f"{header.container} by its first bytes, but FFmpeg cannot read it ({error.strerror})"
            raise src.fail(ErrorKind.NOT_AUDIO, f"{found}; convert it to wav or flac") from error
        if not self._container.streams.audio:
            self._container.close()
            found = f"{len(self._container.streams)} streams, none of them audio"
            raise src.fail(ErrorKind.NOT_AUDIO, f"{header.container} with {found}; remove it from the input")
        self._stream = self._container.streams.audio[0]

    def _describe(self) -> AudioInfo:
        stream, container = self._stream, self._container
        codec = stream.codec_context
        if codec is None or not codec.sample_rate or not codec.channels:  # unknown codec, or no frame found
            found = f"{self._header.container} by its first bytes, but no audio that FFmpeg knows in it"
            raise self._src.fail(ErrorKind.NOT_AUDIO, f"{found}; remove it from the input")
        check_layout(self._src, codec.sample_rate, codec.channels)
        duration_s = None
        if stream.duration is not None and self._header.container == "MP4":
            duration_s = float(stream.duration * stream.time_base)
        elif container.duration is not None and self._header.container == "MATROSKA":
            duration_s = container.duration / self._av.time_base
        # The duration is known to about a codec frame; the number of samples only after decoding.
        return AudioInfo(
            codec.sample_rate, codec.channels, None, duration_s, self._header.container, codec.name.upper()
        )

    def blocks(self, start: int, count: int, block_frames: int) -> Iterator[np.ndarray]:
        """Decode `count` frames from `start` on, or up to the end; one codec frame at a time.

        Args:
            start: first sample frame.
            count: number of sample frames.
            block_frames: not used, since codec frames are smaller.

        Yields:
            [n, C] float32 at the file's rate, full scale 1.0.

        Raises:
            InputError: TRUNCATED if the decoder meets damage, NOT_AUDIO if rate or channels change.
        """
        position, frames = self._seek(start)
        for frame in frames:
            samples = self._to_samples(frame, position)
            begin, end = max(0, start - position), min(len(samples), start + count - position)
            position += len(samples)
            if begin < end:
                yield samples[begin:end]
            if position >= start + count:
                return

    def _seek(self, start: int) -> tuple[int, Iterator]:
        """Return a sample frame not after `start`, and the codec frames from there on."""
        rate, stream = self.info.sample_rate_hz, self._stream
        target_s = start / rate - PREROLL_S
        if target_s <= 0 or self._header.container not in SEEKABLE:
            return 0, self._decode()
        origin = stream.start_time or 0
        try:
            self._container.seek(origin + int(target_s / stream.time_base), stream=stream)
        except self._av.FFmpegError:  # no index, or a target after the end: reading up to there tells which
            pass
        else:
            frames = self._decode()
            first = next(frames, None)
            if first is not None and first.pts is not None:
                position = round((first.pts - origin) * stream.time_base * rate)
                if 0 <= position <= start:
                    return position, chain([first], frames)
        self.close()
        self._open()
        return 0, self._decode()

    def _decode(self) -> Iterator:
        try:
            yield from self._container.decode(self._stream)
        except self._av.FFmpegError as error:
            found = f"decoding stopped ({error.strerror}): cut or damaged"
            raise self._src.fail(ErrorKind.TRUNCATED, f"{found}; fetch the file again") from error

    def _to_samples(self, frame, position: int) -> np.ndarray:
        """Return a codec frame as [n, C] float32."""
        found = (frame.sample_rate, frame.layout.nb_channels)
        expected = (self.info.sample_rate_hz, self.info.channels)
        if found != expected:
            change = f"{expected} to {found} after {position / expected[0]:.3f} s"
            raise self._src.fail(ErrorKind.NOT_AUDIO, f"rate and channels change from {change}; split or convert it")
        samples = self._stored_samples(frame)
        if samples.dtype.kind == "f":
            return samples.astype(np.float32)
        scale = SCALES[samples.dtype.str[1:]]
        offset = scale if samples.dtype.kind == "u" else 0.0
        return ((samples - np.float64(offset)) / scale).astype(np.float32)

    def _stored_samples(self, frame) -> np.ndarray:
        """[n, C] in the type of the codec.

        `frame.to_ndarray()` is not used: it goes through the planes up to a null pointer, which is missing from 8
        channels on, and crashes (PyAV 18).
        """
        dtype, channels = DTYPES[frame.format.packed.name], self.info.channels
        plane = self._av.audio.plane.AudioPlane
        if not frame.format.is_planar:
            return np.frombuffer(plane(frame, 0), dtype, frame.samples * channels).reshape(-1, channels)
        return np.stack([np.frombuffer(plane(frame, index), dtype, frame.samples) for index in range(channels)]).T

    def close(self) -> None:
        self._container.close()
