"""Decoding by libsndfile: wav, flac, mp3, ogg vorbis and opus, aiff, au, caf and the rest of its list.

Knows nothing of mixing channels or resampling, and of a segment only its first frame and its length.
"""

from collections.abc import Iterator

import numpy as np
import soundfile

from parakeet_core.audio_info import ABSURD_FRAMES, MAX_FRAMES_PER_BYTE, AudioInfo, Header, check_layout
from parakeet_core.audio_source import Source
from parakeet_core.errors import ErrorKind

UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's SF_COUNT_MAX: a flac written to a pipe
SAMPLE_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
LOSSY_CODECS = frozenset({"VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"})
# Decoded before a segment in lossy formats. An mp3 frame may borrow 511 bytes of earlier frames, at most 1.1 s of the
# smallest ones. Measured: seeking without it gives errors up to 1.0 in mp3 and 1e-3 in Opus; with 1 s, 2e-7 and 0.
PREROLL_S = 2.0


class _Stream(soundfile.SoundFile):
    """A SoundFile that is read from front to back.

    SoundFile.read() ends with a seek to where it already is. In mp3 this resets the decoder (measured: blocks of 4096
    frames then differ from the whole by up to 1.0), and in a cut flac it fails. It is skipped for non-seekable files.
    """

    def seekable(self) -> bool:
        return False

    def can_seek(self) -> bool:
        return super().seekable()


class SndfileDecoder:
    """One source opened by libsndfile.

    Args:
        src: the source; its head may be replaced.
        header: what `read_header` found in it.

    Raises:
        InputError: NOT_AUDIO, TRUNCATED or ABSURD_HEADER.
    """

    def __init__(self, src: Source, header: Header | None):
        self._src = src
        self._header = header or Header("")
        if header and header.head and (header.mpeg_frames is None or header.mpeg_at is not None):
            src.replace_head(*header.head)
        self._file = self._open()
        if header and header.mpeg_frames is not None and self._file.frames < header.mpeg_frames:
            self._file.close()
            src.replace_head(*header.head)
            self._file = self._open()
        self.info = self._describe()
        self.cut = self._header.cut
        # Xing tags may count their own frame, and decoders drop a damaged first or last one.
        self.spare_frames = 2 * (1152 if self._file.samplerate >= 32000 else 576) if self._file.format == "MP3" else 0

    def _open(self) -> _Stream:
        header = self._header
        if header.sample_rate_hz is not None and header.channels is not None:
            check_layout(self._src, header.sample_rate_hz, header.channels)
        try:
            return _Stream(self._src.handle)
        except soundfile.LibsndfileError as error:
            reason = error.error_string.rstrip(".")
            if header.cut:
                raise self._src.fail(ErrorKind.TRUNCATED, f"{header.cut}; fetch the file again") from error
            raise self._src.fail(ErrorKind.NOT_AUDIO, self._explain_refusal(reason)) from error

    def _explain_refusal(self, reason: str) -> str:
        if self._header.container:
            return f"{self._header.container} file that libsndfile cannot read ({reason}); convert it to wav or flac"
        start = self._src.peek(0, 16)
        looks = "text" if start.isascii() and b"\0" not in start else "data"
        found = f"no known audio format ({reason}): {looks} that starts with {start!r}"
        return f"{found}; expected wav, flac, mp3, ogg or the like: remove or convert it"

    def _describe(self) -> AudioInfo:
        file, header, src = self._file, self._header, self._src
        check_layout(src, file.samplerate, file.channels)
        frames = file.frames
        if file.format == "MP3" and header.max_frames is None:
            frames = None  # layers I and II: libsndfile guesses from the bit rate
        elif header.mpeg_frames is not None:
            frames = min(frames, header.mpeg_frames)
        elif frames == UNKNOWN_FRAMES:
            frames = None
        elif header.declared_bytes:
            declared = frames * header.declared_bytes // max(1, header.present_bytes)
            if declared >= ABSURD_FRAMES:
                raise src.fail(ErrorKind.ABSURD_HEADER, f"{header.cut}, or {declared} frames; the header is damaged")
        elif frames > self._most_frames(src.size):
            found = f"the header declares {frames} frames, {src.size} bytes cannot hold them"
            kind = ErrorKind.ABSURD_HEADER if frames >= ABSURD_FRAMES else ErrorKind.TRUNCATED
            raise src.fail(kind, f"{found}; the header is damaged, fetch the file again")
        duration_s = None if frames is None else frames / file.samplerate
        return AudioInfo(file.samplerate, file.channels, frames, duration_s, file.format, file.subtype)

    def _most_frames(self, size: int) -> int:
        """Return an upper limit of the frames in `size` bytes, to refuse a header before memory is allocated."""
        file, header = self._file, self._header
        if file.format == "SDS":  # MIDI sample dump: a cut one would play silence to its declared end
            return (size - 21) // 127 * (120 // (SAMPLE_BYTES[file.subtype] + 1))  # header; packets of 7-bit bytes
        # Below the absurd number the decoder finds the cut, and segments before it are decoded.
        return max(ABSURD_FRAMES - 1, header.max_frames or size * MAX_FRAMES_PER_BYTE)

    def blocks(self, start: int, count: int, block_frames: int) -> Iterator[np.ndarray]:
        """Decode `count` frames from `start` on, or up to the end of the file.

        Args:
            start: first frame.
            count: number of frames.
            block_frames: frames to decode at a time; bounds the memory.

        Yields:
            [n, C] float32 at the file's rate, full scale 1.0.

        Raises:
            InputError: TRUNCATED if the decoder meets damage.
        """
        position = self._seek(start)
        while position < start + count:
            block = self._read(position, min(block_frames, start + count - position))
            if not len(block):
                return
            skip = max(0, start - position)
            position += len(block)
            if skip < len(block):
                yield block[skip:] if skip else block

    def _seek(self, start: int) -> int:
        """Seek to a frame not after `start`, and return it; 0 if the format cannot seek, or cannot find it."""
        target = start
        if self.info.codec in LOSSY_CODECS:
            target -= round(PREROLL_S * self.info.sample_rate_hz)
        if not self._file.can_seek():
            return 0
        if target <= 0:
            if self._file.format == "MP3":
                self._file.seek(0)  # as soundfile.read() does: mpg123 then rounds as it does there, bit for bit
            return 0
        try:
            if self._file.seek(target) == target:
                return target
        except soundfile.LibsndfileError:  # a flac without a length, or a cut one: reading up to there tells which
            pass
        self._file.close()
        self._file = self._open()
        return 0

    def _read(self, position: int, count: int) -> np.ndarray:
        try:
            return self._file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            rate, reason = self.info.sample_rate_hz, error.error_string.rstrip(".")
            where = f"between {position / rate:.3f} and {(position + count) / rate:.3f} s"
            found = f"decoding stopped {where} ({reason}): the file is cut or damaged"
            raise self._src.fail(ErrorKind.TRUNCATED, f"{found}; fetch it again") from error

    def close(self) -> None:
        self._file.close()
