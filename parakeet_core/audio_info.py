"""What is known of a source before it is decoded: types and limits that header readers and decoders share."""

from dataclasses import dataclass

from parakeet_core.audio_source import Source
from parakeet_core.errors import ErrorKind

MIN_SAMPLE_RATE_HZ = 1_000  # below it no speech is left, and a small file would resample to a huge one
MAX_SAMPLE_RATE_HZ = 1_000_000  # above the highest PCM rate sold, 768 kHz
MAX_CHANNELS = 256  # microphone arrays reach 128; libsndfile's own limit is 1024
ABSURD_FRAMES = 2**31  # 37 h at 16 kHz, 12.4 h at 48 kHz: a header that declares them without the bytes is damaged
MAX_FRAMES_PER_BYTE = 8192  # Vorbis: its longest block from one byte; flac 65535 frames from 10, Opus 5760 from 1


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a source says; no sample is decoded for it.

    Args:
        sample_rate_hz, channels: of the source.
        frames: samples per channel, None when the container does not say. For a file that was cut, this is what its
            bytes hold if the container counts bytes, else what it declares.
        duration_s: frames as seconds, or the container's own duration; None when it does not say.
        container, codec: as libsndfile or FFmpeg name them, such as "FLAC" and "PCM_16".
    """

    sample_rate_hz: int
    channels: int
    frames: int | None
    duration_s: float | None
    container: str
    codec: str


@dataclass(frozen=True)
class Header:
    """What the first bytes, and for Ogg the last, say. None if the container does not say, or the value is not needed.

    Args:
        container: short name, such as "WAV", "FLAC", "MP4".
        sample_rate_hz, channels: as declared, unchecked.
        declared_bytes, present_bytes: payload as declared, and as present in the file; None if nothing is missing.
        cut: what shows that the file once continued after its last byte.
        max_frames: the bytes cannot hold more frames than this.
        mpeg_at: where the frames of an mp3 inside a wav begin.
        mpeg_frames: sample frames found by walking an mp3 that does not declare them.
        head: first bytes with which libsndfile can read the file, and how many bytes they replace.
        chained: an Ogg file of several logical streams.
        foreign: an Ogg file of a codec that libsndfile lacks.
    """

    container: str
    sample_rate_hz: int | None = None
    channels: int | None = None
    declared_bytes: int | None = None
    present_bytes: int | None = None
    cut: str | None = None
    max_frames: int | None = None
    mpeg_at: int | None = None
    mpeg_frames: int | None = None
    head: tuple[bytes, int] | None = None
    chained: bool = False
    foreign: bool = False


def check_layout(src: Source, sample_rate_hz: int, channels: int) -> None:
    """Raise InputError (ABSURD_HEADER) for a rate or a channel count that no recording has."""
    if not MIN_SAMPLE_RATE_HZ <= sample_rate_hz <= MAX_SAMPLE_RATE_HZ:
        limits = f"{MIN_SAMPLE_RATE_HZ} to {MAX_SAMPLE_RATE_HZ}"
        raise src.fail(ErrorKind.ABSURD_HEADER, f"the header declares {sample_rate_hz} Hz, expected {limits}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise src.fail(
            ErrorKind.ABSURD_HEADER, f"the header declares {channels} channels, expected 1 to {MAX_CHANNELS}"
        )
